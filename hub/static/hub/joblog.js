// Follows a job. The server renders the state; this module appends the log, moves the progress
// bar, and asks for the state again when a step changes. EventSource reconnects by itself and
// sends Last-Event-ID, so that nothing is shown twice or lost.

const MAX_LINES = 2000;
const STICKY_PX = 40;

const log = document.getElementById("log");
const lines = document.getElementById("lines");
const status = document.getElementById("log-status");
const announce = document.getElementById("announce");
const state = document.getElementById("state");
const isLive = hasOpenStep();

// An event id begins with the milliseconds of its moment; 0 where only the end is known.
function timeOf(eventId) {
  const moment = Number(eventId.split("-")[0]);
  return moment ? new Date(moment).toLocaleTimeString([], { hour12: false }) : "";
}

function append(eventId, text, kind) {
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < STICKY_PX;
  const line = document.createElement("li");
  const time = document.createElement("time");
  const words = document.createElement("span");
  time.textContent = timeOf(eventId);
  words.textContent = text;
  words.className = `is-${kind}`;
  line.append(time, words);
  lines.append(line);
  if (lines.childElementCount > MAX_LINES) lines.firstElementChild.remove();
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function describe({ done, total, step, ...detail }) {
  const rest = Object.entries(detail).map(([name, value]) => {
    const shown = typeof value === "number" ? Number(value.toPrecision(3)) : value;
    return name === "seconds" ? `${shown} s` : `${name.replaceAll("_", " ")} ${shown}`;
  });
  return [`${done} of ${total}`, ...rest].join(" · ");
}

function showProgress(data) {
  const bar = document.getElementById("progress");
  if (!bar) return;
  bar.max = data.total;
  bar.value = data.done;
  document.getElementById("progress-text").textContent = describe(data);
}

function tell(data) {
  const words = `${data.step} ${data.state.toLowerCase()}`;
  if (isLive) announce.textContent = words;
  return data.attempt > 1 ? `${words}, attempt ${data.attempt}` : words;
}

const source = new EventSource(log.dataset.events);
// Events of the past arrive first, and a retried job has an end among them: what counts is the
// state the server renders once they are through.
const SETTLE_MS = 300;
let refresh = 0;

function hasOpenStep() {
  return state.querySelector("[data-state='queued'], [data-state='running']") !== null;
}

function settle() {
  if (!isLive) return;
  clearTimeout(refresh);
  refresh = setTimeout(() => state.dispatchEvent(new CustomEvent("stage")), SETTLE_MS);
}

// The server ends the stream at each end of the job; after the last there is nothing to wait for.
let endsLeft = Number(log.dataset.ends);

function countEnd() {
  endsLeft -= 1;
  if (isLive || endsLeft > 0) return;
  source.close();
  status.textContent = "Read from the stored events.";
}

document.addEventListener("htmx:after:swap", () => {
  if (hasOpenStep()) return;
  source.close();
  location.reload();
});

function listen(type, handle) {
  source.addEventListener(type, (event) => handle(event.lastEventId, JSON.parse(event.data)));
}

function showMove(id, data) {
  append(id, tell(data), "step");
  if (data.text) append(id, data.text, "error");
}

listen("log", (id, data) => append(id, data.text, "log"));
listen("progress", (id, data) => {
  if (data.layer || data.subject || data.done === data.total) append(id, `${data.step} ${describe(data)}`, "log");
  if (isLive) showProgress(data);
});
for (const type of ["stage", "done"]) {
  listen(type, (id, data) => {
    showMove(id, data);
    settle();
    if (type === "done") countEnd();
  });
}
source.onopen = () => { if (isLive) status.textContent = "Live."; };
source.onerror = () => {
  status.textContent = source.readyState === EventSource.CONNECTING
    ? "Reconnecting…"
    : "The live log is not available; reload the page for the state.";
};
