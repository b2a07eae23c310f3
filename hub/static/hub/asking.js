// What the playground asks for and how an answer arrives: requests, snippets, streams.

const JSON_HEADERS = { "Content-Type": "application/json" };

export function requestFor(model, { mode, prompt, ...sampling }) {
  if (mode === "chat") {
    const messages = [{ role: "user", content: prompt }];
    return { url: "/v1/chat/completions", body: { model, ...sampling, messages } };
  }
  return { url: "/v1/completions", body: { model, ...sampling, prompt } };
}

export function post(url, body, { csrf, signal }) {
  const headers = { ...JSON_HEADERS, "X-CSRFToken": csrf };
  return fetch(url, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function explainRefusal(response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? body;
  const message = error.message || `The server answered ${response.status}.`;
  return [message, error.do].filter(Boolean).join(" ");
}

export function asCurl({ url, body }) {
  const json = JSON.stringify(body).replaceAll("'", "'\\''");
  return (
    `curl ${location.origin}${url} \\\n  -H "Authorization: Bearer $DELTACOME_TOKEN" \\\n` +
    `  -H "Content-Type: application/json" \\\n  -d '${json}'`
  );
}

// A JSON string is a Python string too, and so are numbers; lists and objects of them as well.
export function asPython({ body }) {
  const isChat = "messages" in body;
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${JSON.stringify(value)},`);
  return [
    "import os",
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=os.environ["DELTACOME_TOKEN"])`,
    `answer = client.${isChat ? "chat.completions" : "completions"}.create(`,
    ...fields,
    ")",
    `print(answer.choices[0].${isChat ? "message.content" : "text"})`,
  ].join("\n");
}

// Yields the JSON of each `data:` line; OpenAI streams end with the literal [DONE].
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const text = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (text === "[DONE]") return;
      if (text) yield JSON.parse(text);
    }
  }
}
