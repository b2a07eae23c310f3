// Where a model departs from another along the other's answer, token by token.

import { explainRefusal, post } from "./asking.js";

const LIMITS = [0.001, 0.01, 0.05, 0.2, 1];
// What the engine compares at most.
const MAX_TOKENS = 512;
const byId = (id) => document.getElementById(id);
const section = byId("departure");
const reference = byId("reference");
const status = byId("departure-status");
const button = byId("compare");
let answers = [];

const binOf = (kl) => LIMITS.filter((limit) => kl >= limit).length;
const round = (value) => (value > 0 && value < 0.0005 ? value.toExponential(1) : value.toFixed(3));
// Adding nothing turns -0 into 0.
const logChance = (value) => (Math.round(value * 100) / 100 + 0).toFixed(2);
const visible = (text) => (text.trim() ? text : text.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅");

// `given` holds the finished answers: { model, request, tokenIds }.
export function offer(given) {
  answers = given.filter((answer) => answer.tokenIds.length);
  section.hidden = answers.length < 2;
  status.textContent = "";
  byId("departures").replaceChildren();
  byId("departure-legend").hidden = true;
  reference.replaceChildren(...answers.map((answer, index) => new Option(answer.model, index)));
  const finetune = answers.findIndex((answer) => answer.model.endsWith(":finetune"));
  reference.selectedIndex = Math.max(0, finetune);
}

function requestBody(answer, along) {
  const { messages, prompt } = along.request.body;
  const body = { model: answer.model, reference: along.model };
  const completion = along.tokenIds.slice(0, MAX_TOKENS);
  return messages ? { ...body, messages, completion } : { ...body, prompt, completion };
}

function tokenSpan(token, index, first) {
  const span = document.createElement("span");
  span.className = `token kl-${binOf(token.kl)}`;
  span.classList.toggle("departs", token.likeliest !== token.reference_likeliest);
  span.classList.toggle("is-first", index === first);
  span.title = `KL ${round(token.kl)} · would say ${JSON.stringify(token.likeliest)}`;
  span.textContent = token.token.replaceAll("\n", "⏎\n") || "∅";
  return span;
}

function tokenRow(token, index) {
  const row = document.createElement("tr");
  const cells = [
    [index + 1, "num"],
    [visible(token.token), "path"],
    [round(token.kl), "num"],
    [logChance(token.logprob), "num"],
    [logChance(token.reference_logprob), "num"],
    [visible(token.likeliest), "path"],
    [visible(token.reference_likeliest), "path"],
  ];
  for (const [text, kind] of cells) {
    const cell = row.insertCell();
    cell.className = kind;
    cell.textContent = text;
  }
  return row;
}

function summary(found) {
  const n = found.tokens.length;
  const where =
    found.first_departure === null
      ? `the same first choice at all ${n} tokens`
      : `another first choice at ${found.departures} of ${n} tokens, first at token ${found.first_departure + 1}`;
  return `${where} · mean KL ${round(found.mean_kl)} nats · largest ${round(found.max_kl)}`;
}

function article(found) {
  const root = byId("departure-template").content.cloneNode(true).firstElementChild;
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  root.querySelector("h3").textContent = `${found.model} along ${found.reference}`;
  part("summary").textContent = summary(found);
  part("tokens").setAttribute("aria-label", `Tokens, ${found.model}`);
  part("tokens").append(
    ...found.tokens.map((token, index) => tokenSpan(token, index, found.first_departure)),
  );
  root.querySelector("tbody").append(...found.tokens.map(tokenRow));
  root.querySelector(".scroll").setAttribute("aria-label", `Table of tokens, ${found.model}`);
  return root;
}

async function compare(answer, along, csrf) {
  const response = await post("/v1/compare", requestBody(answer, along), { csrf });
  if (!response.ok) throw new Error(await explainRefusal(response));
  return article(await response.json());
}

button.addEventListener("click", async () => {
  const along = answers[reference.value];
  const others = answers.filter((answer) => answer !== along);
  const csrf = document.querySelector("[name=csrfmiddlewaretoken]").value;
  button.disabled = true;
  status.textContent = "reading the text with each model…";
  byId("departures").replaceChildren();
  const failures = [];
  for (const answer of others) {
    try {
      byId("departures").append(await compare(answer, along, csrf));
    } catch (error) {
      failures.push(`${answer.model}: ${error.message}`);
    }
  }
  byId("departure-legend").hidden = failures.length === others.length;
  const cut = along.tokenIds.length > MAX_TOKENS ? ` The first ${MAX_TOKENS} tokens were read.` : "";
  status.textContent = failures.join(" ") || `Compared along ${along.tokenIds.length} tokens.${cut}`;
  button.disabled = false;
});
