// Columns side by side, one prompt. Each column streams from the OpenAI-shaped endpoint on its own,
// so that an error or a slow delta stays in its column. The whole state lives in the address.

import { asCurl, asPython, events, explainRefusal, post, requestFor } from "./asking.js";
import * as blind from "./blind.js";
import * as departure from "./departure.js";
import { writeWords } from "./words.js";

// Servers refuse longer addresses; the part after # never leaves the browser.
const MAX_QUERY_CHARS = 4000;
const LEAST_MS_OF_A_RATE = 20;
const byId = (id) => document.getElementById(id);
const form = byId("playground");
const columns = [...document.querySelectorAll("[data-column]")].map(bindColumn);
let isBlindRun = false;

function bindColumn(root) {
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  return {
    root,
    part,
    select: root.querySelector("select"),
    answer: part("answer"),
    stats: part("stats"),
    title: part("title"),
    number: part("title").textContent,
    model: "",
    request: null,
    seen: null,
    tokenIds: [],
    abort: null,
  };
}

const csrf = () => form.elements.csrfmiddlewaretoken.value;
const shown = () => columns.filter((column) => !column.root.hidden);
const filled = () => shown().filter((column) => column.select.value);

function settings() {
  const data = new FormData(form);
  return {
    mode: data.get("mode"),
    prompt: data.get("prompt"),
    max_tokens: Number(data.get("max")),
    temperature: Number(data.get("t")),
    top_p: Number(data.get("top_p")),
    seed: Number(data.get("seed")),
  };
}

// ---- the address

function pinned(select) {
  const name = select.value;
  const revision = select.selectedOptions[0]?.dataset.revision;
  if (!revision || name.includes("@")) return name;
  const [repo, suffix] = name.split(":");
  return `${repo}@${revision}${suffix ? `:${suffix}` : ""}`;
}

function address(nameOf) {
  const query = new URLSearchParams(new FormData(form));
  query.delete("csrfmiddlewaretoken");
  for (const column of shown()) query.append("d", nameOf(column.select));
  if (`${query}`.length <= MAX_QUERY_CHARS) return `${location.pathname}?${query}`;
  const fragment = new URLSearchParams({ prompt: query.get("prompt") });
  query.delete("prompt");
  return `${location.pathname}?${query}#${fragment}`;
}

function saveState() {
  history.replaceState(null, "", address((select) => select.value));
  byId("permalink").textContent = location.origin + address(pinned);
  for (const column of columns) {
    const request = requestFor(column.select.value, settings());
    column.part("curl").textContent = asCurl(request);
    column.part("python").textContent = asPython(request);
  }
}

function readFragment() {
  const prompt = new URLSearchParams(location.hash.slice(1)).get("prompt");
  if (prompt !== null) form.elements.prompt.value = prompt;
}

// ---- one column

function showError(column, title, text) {
  column.part("error-title").textContent = title;
  writeWords(column.part("error-text"), text);
  column.part("error").hidden = false;
}

function showStats(column, { started, first, last, tokens, finish, canary }) {
  const parts = [];
  if (first) parts.push(`first token ${Math.round(first - started)} ms`);
  // Tokens that came in one piece have no rate.
  if (tokens > 1 && last - first >= LEAST_MS_OF_A_RATE) parts.push(`${((tokens - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s`);
  if (tokens) parts.push(`${tokens} tokens`);
  if (finish) parts.push(finish);
  if (canary === "applied") parts.push("delta proven applied");
  column.stats.textContent = isBlindRun ? "" : parts.join(" · ");
}

async function stream(column, response, seen) {
  for await (const chunk of events(response)) {
    if (chunk.error) {
      showError(column, "The answer broke off", chunk.error.message);
      return;
    }
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (choice?.token_ids?.length) {
      column.tokenIds.push(...choice.token_ids);
      seen.last = performance.now();
      seen.first ??= seen.last;
      seen.tokens += choice.token_ids.length;
    }
    if (text) column.answer.append(text);
    seen.finish = choice?.finish_reason ?? seen.finish;
    seen.tokens = chunk.usage?.completion_tokens ?? seen.tokens;
    showStats(column, seen);
  }
  column.isDone = true;
}

function clear(column) {
  column.answer.textContent = "";
  column.stats.textContent = "";
  column.part("error").hidden = true;
  column.tokenIds = [];
  column.isDone = false;
}

async function run(column) {
  column.stats.textContent = isBlindRun ? "" : "waiting for the first token…";
  column.abort = new AbortController();
  const seen = { started: performance.now(), first: null, last: null, tokens: 0, finish: "" };
  column.seen = seen;
  column.request = requestFor(column.model, settings());
  const extras = { stream: true, stream_options: { include_usage: true }, return_token_ids: true };
  try {
    const body = { ...column.request.body, ...extras };
    const response = await post(column.request.url, body, { csrf: csrf(), signal: column.abort.signal });
    if (response.headers.get("x-deltacome-device") === "cpu") byId("cpu-note").hidden = false;
    seen.canary = response.headers.get("x-deltacome-canary")?.split(";")[0];
    if (!response.ok) {
      column.stats.textContent = "";
      showError(column, "No answer", await explainRefusal(response));
      return;
    }
    await stream(column, response, seen);
  } catch (error) {
    if (error.name === "AbortError") seen.finish = "stopped";
    else showError(column, "The connection broke", "Check that the server is reachable and run it again.");
  }
  showStats(column, seen);
}

// ---- all columns

function setBlind(on) {
  isBlindRun = on;
  for (const [index, column] of shown().entries()) {
    column.root.classList.toggle("is-blind", on);
    column.title.classList.toggle("visually-hidden", !on);
    column.title.textContent = on ? `Answer ${"AB"[index] ?? ""}` : column.number;
    column.part("choice").hidden = on;
    column.part("copies").hidden = on;
  }
}

function refuse(text) {
  byId("form-error").textContent = text;
  byId("form-error").hidden = !text;
}

function setRunning(on) {
  byId("run").disabled = on;
  byId("stop").disabled = !on;
  byId("add-column").disabled = on || shown().length === columns.length;
}

function openBallot(pair) {
  const [left, right] = pair;
  blind.open({
    left: left.model,
    right: right.model,
    question: JSON.stringify(settings()),
    csrf: csrf(),
    reveal() {
      for (const column of pair) column.select.value = column.model;
      setBlind(false);
      for (const column of pair) showStats(column, column.seen);
      saveState();
      departure.offer(pair);
    },
  });
}

async function runAll() {
  const asked = filled();
  const wantsBlind = form.elements.blind.checked;
  if (wantsBlind && (asked.length !== 2 || asked[0].select.value === asked[1].select.value)) {
    refuse("A blind vote needs two different models: choose them, and set the other columns to None.");
    return;
  }
  refuse("");
  saveState();
  blind.withdraw();
  departure.offer([]);
  setBlind(false);
  shown().forEach(clear);
  const models = asked.map((column) => column.select.value);
  const order = wantsBlind ? blind.shuffled(models) : models;
  for (const [index, column] of asked.entries()) column.model = order[index];
  if (wantsBlind) {
    for (const column of shown()) column.root.hidden = !asked.includes(column);
    setBlind(true);
  }
  setRunning(true);
  await Promise.all(asked.map(run));
  setRunning(false);
  const done = asked.filter((column) => column.isDone);
  if (!wantsBlind) departure.offer(done);
  else if (done.length === 2) openBallot(done);
  else setBlind(false);
}

function addColumn() {
  const next = columns.find((column) => column.root.hidden);
  next.root.hidden = false;
  byId("add-column").disabled = shown().length === columns.length;
  next.select.focus();
  saveState();
}

function removeColumn(column) {
  const before = shown();
  column.abort?.abort();
  column.select.value = "";
  clear(column);
  column.root.hidden = true;
  byId("add-column").disabled = false;
  saveState();
  (before[before.indexOf(column) - 1] ?? before[1])?.select.focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (form.reportValidity()) runAll();
});
byId("stop").addEventListener("click", () => {
  for (const column of columns) column.abort?.abort();
});
byId("add-column").addEventListener("click", addColumn);
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
form.addEventListener("change", saveState);
for (const column of columns) {
  column.select.addEventListener("change", saveState);
  column.part("remove").addEventListener("click", () => removeColumn(column));
}
readFragment();
saveState();
setRunning(false);
