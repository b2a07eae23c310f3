// htmx builds fragments from HTML that this server rendered and escaped. The content security
// policy lets only the policy named here do so; a call from anywhere else is refused.

const policy = globalThis.trustedTypes?.createPolicy("htmx", { createHTML: (html) => html });

htmx.registerExtension("trusted", {
  init: (api) => policy && api.initSecurity(policy),
});
