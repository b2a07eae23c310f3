// The upload page: choose a folder, have its headers checked, send what is missing.

import { Hasher, readHeader, Refusal, send, sendJson, Transfer } from "./transfer.js";
import { writeWords } from "./words.js";

const KEPT = /\.(safetensors|json|txt|jsonl|jinja|md|model)$/;
const PICKLED = /\.(bin|pt|pth|ckpt|pkl|h5|msgpack|gguf|npz)$/i;
const RATE_WINDOW_S = 20;
const UNITS = ["kB", "MB", "GB", "TB"];

const form = document.getElementById("upload");
const byId = (id) => document.getElementById(id);
const rows = new Map();
let chosen = [];
let uploadUrl = form.dataset.upload ? `${form.dataset.api}/${form.dataset.upload}` : null;
let transfer = null;
let isSending = false;

function formatSize(bytes) {
  let value = bytes;
  let unit = "B";
  for (const next of UNITS) {
    if (value < 1000) break;
    value /= 1000;
    unit = next;
  }
  return `${value >= 100 || unit === "B" ? value.toFixed(0) : value.toFixed(1)} ${unit}`;
}

function formatDuration(seconds) {
  if (seconds < 60) return `${Math.ceil(seconds)} s`;
  const minutes = Math.ceil(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// --- Choosing the folder ---

function whyIgnored({ path, file }) {
  const name = path.split("/").pop();
  if (path.includes("/")) return "in a sub-folder";
  if (name.startsWith(".")) return "hidden";
  if (PICKLED.test(name)) return "can run code when opened; convert it with save_pretrained(safe_serialization=True)";
  if (!KEPT.test(name) && !name.toUpperCase().startsWith("LICENSE")) return "not part of a checkpoint";
  return file.size ? "" : "empty";
}

async function readEntries(entry, prefix) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => { entry.file(resolve, reject); });
    return [{ path: prefix + entry.name, file }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    // A reader hands out a hundred entries at a time.
    const batch = await new Promise((resolve, reject) => { reader.readEntries(resolve, reject); });
    if (!batch.length) return found;
    for (const child of batch) found.push(...await readEntries(child, `${prefix}${entry.name}/`));
  }
}

function withoutFolder(files) {
  return files.map(({ path, file }) => ({ file, path: path.replace(/^[^/]+\//, "") }));
}

function item(cells, className = "") {
  const row = document.createElement("li");
  row.className = className;
  for (const [name, text] of cells) {
    const cell = document.createElement("span");
    cell.className = name;
    cell.textContent = text;
    row.append(cell);
  }
  return row;
}

function describeChoice(weights, ignored) {
  if (weights) {
    const bytes = chosen.reduce((sum, entry) => sum + entry.file.size, 0);
    return `${countFiles(chosen.length)}, ${formatSize(bytes)}, ${weights} of them safetensors.`;
  }
  const pickled = ignored.find(({ path }) => PICKLED.test(path));
  const remedy = pickled ? `${pickled.path} ${pickled.reason}` : "choose the folder that save_pretrained wrote";
  return `No safetensors file was found among ${countFiles(chosen.length + ignored.length)}: ${remedy}.`;
}

function countFiles(count) {
  return count === 1 ? "1 file" : `${count} files`;
}

function take(files) {
  const judged = files.map((entry) => ({ ...entry, reason: whyIgnored(entry) }));
  const ignored = judged.filter((entry) => entry.reason);
  chosen = judged.filter((entry) => !entry.reason).sort((a, b) => a.path.localeCompare(b.path));
  const weights = chosen.filter((entry) => entry.path.endsWith(".safetensors")).length;
  byId("picked").textContent = describeChoice(weights, ignored);
  byId("picked").classList.toggle("bad-text", !weights);
  byId("ignored").hidden = !ignored.length;
  byId("ignored-title").textContent = `${countFiles(ignored.length)} ${ignored.length === 1 ? "stays" : "stay"} here`;
  byId("ignored-rows").replaceChildren(
    ...ignored.map(({ path, reason }) => item([["path", path], ["note", reason]])),
  );
  byId("start").disabled = !weights;
  hideProblem();
}

byId("folder").addEventListener("change", (event) => {
  take(withoutFolder([...event.target.files].map((file) => ({ path: file.webkitRelativePath || file.name, file }))));
});

const dropzone = byId("dropzone");
for (const type of ["dragover", "dragleave", "drop"]) {
  dropzone.addEventListener(type, (event) => {
    event.preventDefault();
    dropzone.classList.toggle("is-over", type === "dragover");
  });
}
dropzone.addEventListener("drop", async (event) => {
  const entries = [...event.dataTransfer.items].map((thing) => thing.webkitGetAsEntry()).filter(Boolean);
  const found = (await Promise.all(entries.map((entry) => readEntries(entry, "")))).flat();
  // Files dropped on their own have no folder to take away.
  take(entries.some((entry) => entry.isDirectory) ? withoutFolder(found) : found);
});

// --- Telling what went wrong ---

function hideProblem() {
  byId("problem").hidden = true;
  byId("mismatch").hidden = true;
}

// "name: expected [a] found [b]" or "name: missing"
function splitMismatch(line) {
  const [, name, rest] = line.match(/^(.*?): (.*)$/) ?? [null, line, ""];
  const [, expected, found] = rest.match(/^expected (.*?),? found (.*)$/) ?? [null, rest, ""];
  return [name, expected, found];
}

function showProblem(error) {
  const { fields = {}, do: remedy = "", code = "" } = error.body ?? {};
  const lines = Array.isArray(fields.tensors) ? fields.tensors : [];
  byId("progress").hidden = false;
  byId("problem-title").textContent = lines.length ? "The fine-tune does not fit" : "The upload stopped";
  writeWords(byId("problem-what"), error.message);
  const reasons = Object.entries(fields).filter(([name, said]) => Array.isArray(said) && name !== "tensors");
  writeWords(byId("problem-do"), [remedy, ...reasons.map(([name, said]) => `${name}: ${said.join(" ")}`)].join(" "));
  byId("problem-ref").hidden = !code;
  byId("problem-code").textContent = code;
  byId("mismatch").hidden = !lines.length;
  byId("mismatch-rows").replaceChildren(...lines.map((line) => {
    const row = document.createElement("tr");
    splitMismatch(line).forEach((text, column) => {
      const cell = document.createElement(column ? "td" : "th");
      cell.textContent = text;
      cell.className = column ? "" : "path";
      if (!column) cell.scope = "row";
      row.append(cell);
    });
    return row;
  }));
  byId("problem").hidden = false;
  byId("problem").focus();
}

// --- Progress ---

const STATES = { waiting: "waiting", sending: "sending", retrying: "sending again", held: "held", failed: "failed" };
const samples = [];

function makeRows(entries) {
  byId("file-rows").replaceChildren(...entries.map((entry) => {
    const row = item([["path", entry.path], ["note", ""]]);
    const bar = document.createElement("progress");
    bar.max = entry.file.size;
    bar.setAttribute("aria-label", entry.path);
    row.append(bar);
    rows.set(entry.index, { row, bar, note: row.children[1] });
    return row;
  }));
}

function sentOf(entry) {
  return entry.heldBytes + [...entry.inFlight.values()].reduce((sum, bytes) => sum + bytes, 0);
}

function rateOf(sent) {
  const now = performance.now() / 1000;
  samples.push([now, sent]);
  while (samples.length > 2 && now - samples[0][0] > RATE_WINDOW_S) samples.shift();
  const [[then, before]] = samples;
  return now > then ? (sent - before) / (now - then) : 0;
}

function draw() {
  let sent = 0;
  let total = 0;
  for (const entry of transfer.files) {
    const { row, bar, note } = rows.get(entry.index);
    const bytes = sentOf(entry);
    sent += bytes;
    total += entry.file.size;
    bar.value = bytes;
    row.className = entry.state === "failed" ? "is-failed" : "";
    note.textContent = `${STATES[entry.state]}${entry.reason ? `: ${entry.reason}` : ""} · ${formatSize(entry.file.size)}`;
  }
  const share = total ? sent / total : 0;
  const rate = rateOf(sent);
  byId("total").hidden = false;
  byId("total").max = total;
  byId("total").value = sent;
  byId("total-text").textContent = `${(100 * share).toFixed(0)} % · ${formatSize(sent)} of ${formatSize(total)}`;
  byId("rate-text").textContent = rate > 0 && sent < total && !transfer.isPaused
    ? `${formatSize(rate)}/s, ${formatDuration((total - sent) / rate)} left`
    : "";
  document.title = `${(100 * share).toFixed(0)} % · Upload · DeltaCoMe Hub`;
}

function say(phase) {
  byId("phase").textContent = phase;
}

// --- The upload ---

// What the browser remembers of an upload, to notice files that changed since.
const memory = {
  key: (id) => `deltacome-upload:${id}`,
  read: (id) => JSON.parse(localStorage.getItem(memory.key(id)) ?? "{}"),
  write: (id, entries) => {
    const times = Object.fromEntries(entries.map(({ path, file }) => [path, file.lastModified]));
    localStorage.setItem(memory.key(id), JSON.stringify(times));
  },
  forget: (id) => localStorage.removeItem(memory.key(id)),
};

function requestBody() {
  const fields = Object.fromEntries(new FormData(form));
  return {
    repo: `${fields.namespace}/${fields.name}`,
    kind: fields.kind,
    backbone: fields.kind === "delta" && fields.backbone ? fields.backbone : null,
    recipe: fields.recipe,
    bits_per_param: fields.bits_per_param ? Number(fields.bits_per_param) : null,
    visibility: fields.visibility,
    description: fields.description,
    files: chosen.map(({ path, file }) => ({ path, size_bytes: file.size })),
  };
}

async function openUpload() {
  if (uploadUrl) return sendJson("GET", uploadUrl);
  const upload = await sendJson("POST", form.dataset.api, requestBody());
  uploadUrl = `${form.dataset.api}/${upload.id}`;
  memory.write(upload.id, chosen);
  history.replaceState(null, "", `/new/${upload.id}`);
  return upload;
}

function matchFiles(upload) {
  const known = memory.read(upload.id);
  const byPath = new Map(chosen.map((entry) => [entry.path, entry.file]));
  return upload.files.map(({ index, path, size_bytes: size, header_ok: headerOk, needs_header: needsHeader, parts }) => {
    const file = byPath.get(path);
    if (file?.size !== size) {
      const found = file ? `has ${formatSize(file.size)} here and ${formatSize(size)} in the upload` : "is not in this folder";
      throw new Refusal(422, { message: `${path} ${found}.`, do: "Choose the folder this upload was started with, or cancel it." });
    }
    // A file that was written again since the upload began is sent again from its first byte.
    const isSame = (known[path] ?? file.lastModified) === file.lastModified;
    return { index, path, file, needsHeader, headerOk, partSize: upload.part_size_bytes, held: new Set(isSame ? parts : []) };
  });
}

async function checkHeaders(entries) {
  const waiting = entries.filter((entry) => entry.needsHeader && !entry.headerOk);
  for (const [done, entry] of waiting.entries()) {
    say(`Checking header ${done + 1} of ${waiting.length}: ${entry.path}`);
    const answer = await send("PUT", `${uploadUrl}/files/${entry.index}/header`, await readHeader(entry.file), {
      headers: { "Content-Type": "application/octet-stream" },
    });
    if (answer.backbone) say(`Every tensor fits ${answer.backbone}.`);
  }
}

async function begin() {
  say("Opening the upload");
  const upload = await openUpload();
  const entries = matchFiles(upload);
  makeRows(entries);
  byId("cancel").hidden = false;
  await checkHeaders(entries);
  transfer = new Transfer(uploadUrl, entries, new Hasher(form.dataset.worker, form.dataset.sha256), draw);
  byId("pause").hidden = false;
  byId("slow-hash").hidden = Boolean(globalThis.crypto?.subtle);
  say("Sending");
  draw();
  await transfer.run();
  say("Everything is held; starting the job");
  const { job } = await sendJson("POST", `${uploadUrl}/seal`);
  memory.forget(upload.id);
  isSending = false;
  location.assign(`/jobs/${job.id}`);
}

// What the hub refused before any part was sent is of no use: it goes, so that the next press of
// the button asks again with what the person has corrected. One that was resumed stays.
async function discardRefused(error) {
  if (form.dataset.upload || !uploadUrl || !(error.status >= 400 && error.status < 500)) return;
  const url = uploadUrl;
  uploadUrl = null;
  byId("cancel").hidden = true;
  byId("file-rows").replaceChildren();
  history.replaceState(null, "", "/new");
  memory.forget(url.split("/").pop());
  await sendJson("DELETE", url).catch(() => {});
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  hideProblem();
  byId("progress").hidden = false;
  byId("start").disabled = true;
  isSending = true;
  try {
    await begin();
  } catch (error) {
    isSending = false;
    if (!transfer) await discardRefused(error);
    byId("start").disabled = false;
    say("Stopped.");
    showProblem(error);
  }
});

byId("pause").addEventListener("click", ({ currentTarget }) => {
  const pause = !transfer.isPaused;
  if (pause) transfer.pause();
  else transfer.resume();
  samples.length = 0;
  currentTarget.querySelector("span").textContent = pause ? "Resume" : "Pause";
  say(pause ? "Paused; what was sent is kept." : "Sending");
  draw();
});

byId("cancel").addEventListener("click", async () => {
  isSending = false;
  transfer?.stop();
  try {
    await sendJson("DELETE", uploadUrl);
    memory.forget(uploadUrl.split("/").pop());
    location.assign("/new");
  } catch (error) {
    showProblem(error);
  }
});

addEventListener("beforeunload", (event) => {
  if (isSending) event.preventDefault();
});
addEventListener("offline", () => { if (isSending) say("Offline; it continues when the network is back."); });
addEventListener("online", () => { if (isSending) say("Sending"); });

// A backbone is kept whole: there is nothing to choose about its compression.
for (const radio of form.querySelectorAll("[name=kind]")) {
  radio.addEventListener("change", () => {
    byId("recipe-section").hidden = form.elements.kind.value === "backbone";
  });
}
