// Two columns, one prompt. Each column streams from the OpenAI-shaped endpoint on its own, so
// that an error or a slow delta stays in its column. The whole state lives in the query string.

const form = document.getElementById("playground");
const stopButton = document.getElementById("stop");
const runButton = document.getElementById("run");
const columns = [...document.querySelectorAll("[data-column]")].map(bindColumn);
let running = 0;

function bindColumn(root) {
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  return {
    select: root.querySelector("select"),
    answer: part("answer"),
    error: part("error"),
    errorTitle: part("error-title"),
    errorText: part("error-text"),
    stats: part("stats"),
    curl: part("curl"),
    abort: null,
  };
}

function settings() {
  const data = new FormData(form);
  return {
    mode: data.get("mode"),
    prompt: data.get("prompt"),
    max_tokens: Number(data.get("max")),
    temperature: Number(data.get("t")),
    seed: Number(data.get("seed")),
  };
}

function requestFor(model, { mode, prompt, ...sampling }) {
  const body = { model, ...sampling, stream: true, stream_options: { include_usage: true } };
  if (mode === "chat") {
    return { url: "/v1/chat/completions", body: { ...body, messages: [{ role: "user", content: prompt }] } };
  }
  return { url: "/v1/completions", body: { ...body, prompt } };
}

function saveState() {
  const query = new URLSearchParams(new FormData(form));
  query.delete("csrfmiddlewaretoken");
  for (const column of columns) query.append("d", column.select.value);
  history.replaceState(null, "", `?${query}`);
}

function showCurl(column) {
  const { url, body } = requestFor(column.select.value, settings());
  const json = JSON.stringify({ ...body, stream: false, stream_options: undefined }).replaceAll("'", "'\\''");
  column.curl.textContent =
    `curl ${location.origin}${url} \\\n  -H "Authorization: Bearer $DELTACOME_TOKEN" \\\n` +
    `  -H "Content-Type: application/json" \\\n  -d '${json}'`;
}

// Yields the JSON of each `data:` line; OpenAI streams end with the literal [DONE].
async function* events(response) {
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

function showError(column, title, text) {
  column.errorTitle.textContent = title;
  column.errorText.textContent = text;
  column.error.hidden = false;
}

async function explainRefusal(column, response) {
  const body = await response.json().catch(() => ({}));
  const error = body.error ?? body;
  const message = error.message || `The server answered ${response.status}.`;
  showError(column, "No answer", [message, error.do].filter(Boolean).join(" "));
}

function showStats(column, { started, first, last, tokens, finish }) {
  const parts = [];
  if (first) parts.push(`first token ${Math.round(first - started)} ms`);
  if (tokens > 1 && last > first) parts.push(`${((tokens - 1) / ((last - first) / 1000)).toFixed(1)} tokens/s`);
  if (tokens) parts.push(`${tokens} tokens`);
  if (finish) parts.push(finish);
  column.stats.textContent = parts.join(" · ");
}

async function stream(column, response, seen) {
  for await (const chunk of events(response)) {
    if (chunk.error) {
      showError(column, "The answer broke off", chunk.error.message);
      return;
    }
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text ?? "";
    if (text) {
      seen.last = performance.now();
      seen.first ??= seen.last;
      seen.tokens += 1;
      column.answer.append(text);
    }
    seen.finish = choice?.finish_reason ?? seen.finish;
    seen.tokens = chunk.usage?.completion_tokens ?? seen.tokens;
    showStats(column, seen);
  }
}

async function run(column) {
  column.answer.textContent = "";
  column.error.hidden = true;
  column.stats.textContent = "waiting for the first token…";
  column.abort = new AbortController();
  const seen = { started: performance.now(), first: null, last: null, tokens: 0, finish: "" };
  const { url, body } = requestFor(column.select.value, settings());
  try {
    const response = await fetch(url, {
      method: "POST",
      headers: {
        "Content-Type": "application/json",
        "X-CSRFToken": form.elements.csrfmiddlewaretoken.value,
      },
      body: JSON.stringify(body),
      signal: column.abort.signal,
    });
    if (!response.ok) {
      column.stats.textContent = "";
      await explainRefusal(column, response);
      return;
    }
    await stream(column, response, seen);
  } catch (error) {
    if (error.name === "AbortError") seen.finish = "stopped";
    else showError(column, "The connection broke", "Check that the server is reachable and run it again.");
  }
  showStats(column, seen);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!form.reportValidity()) return;
  saveState();
  columns.forEach(showCurl);
  running += 1;
  runButton.disabled = true;
  stopButton.disabled = false;
  await Promise.all(columns.filter((column) => column.select.value).map(run));
  running -= 1;
  runButton.disabled = running > 0;
  stopButton.disabled = running === 0;
});

stopButton.addEventListener("click", () => {
  for (const column of columns) column.abort?.abort();
});

form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

for (const element of [form, ...columns.map((column) => column.select)]) {
  element.addEventListener("change", () => {
    saveState();
    columns.forEach(showCurl);
  });
}
columns.forEach(showCurl);
