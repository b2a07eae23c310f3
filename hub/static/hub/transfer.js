// The protocol of an upload, without a page: parts are read and hashed in a worker, sent a few
// at a time, retried, paused and continued. The server is the record of what is held.

const LANES = 3;
const MAX_ATTEMPTS = 8;
const BACKOFF_S = 0.5;
const MAX_BACKOFF_S = 30;
const HEADER_LENGTH_BYTES = 8;

export const MAX_HEADER_BYTES = 8 * 2 ** 20;

// What the server (or the network, with status 0) refused.
export class Refusal extends Error {
  constructor(status, body) {
    super(body.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = body.code ?? "";
    this.body = body;
  }

  // A full disk (507) does not get better by asking again.
  get isTransient() {
    return this.status === 0 || this.status === 408 || this.status === 429 ||
      (this.status >= 500 && this.status !== 507) || this.code === "part_digest_mismatch";
  }
}

function csrfToken() {
  return document.querySelector("input[name=csrfmiddlewaretoken]").value;
}

// fetch() cannot tell how much of a body has left, XMLHttpRequest can.
export function send(method, url, body, { headers = {}, onSent = () => {}, signal } = {}) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const refuse = (detail) => reject(new Refusal(request.status, detail));
    request.open(method, url);
    request.setRequestHeader("X-CSRFToken", csrfToken());
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onSent(event.loaded);
    request.onload = () => {
      let answer = {};
      try { answer = JSON.parse(request.responseText || "{}"); } catch { /* a proxy's page */ }
      if (request.status < 400) resolve(answer);
      else refuse(answer);
    };
    request.onerror = () => refuse({ message: "The connection broke." });
    request.onabort = () => refuse({ message: "Stopped." });
    signal?.addEventListener("abort", () => request.abort());
    request.send(body);
  });
}

export function sendJson(method, url, value) {
  const headers = { "Content-Type": "application/json" };
  return send(method, url, value === undefined ? null : JSON.stringify(value), { headers });
}

// The first bytes of a safetensors file: eight bytes of length, then the JSON header.
export async function readHeader(file) {
  const start = await file.slice(0, HEADER_LENGTH_BYTES).arrayBuffer();
  if (start.byteLength < HEADER_LENGTH_BYTES) return file;
  const length = new DataView(start).getBigUint64(0, true);
  // An absurd length is sent as it is: the server names what is wrong with the file.
  const kept = length > BigInt(MAX_HEADER_BYTES) ? 0 : Number(length);
  return file.slice(0, HEADER_LENGTH_BYTES + kept);
}

// Trusted Types: the only scripts a page may start a worker from are our own static files.
const policy = globalThis.trustedTypes?.createPolicy("hub", {
  createScriptURL: (url) => {
    if (new URL(url, location.href).origin !== location.origin) throw new TypeError(url);
    return url;
  },
});

export class Hasher {
  #waiting = new Map();
  #next = 0;

  constructor(workerUrl, fallbackUrl) {
    this.fallbackUrl = new URL(fallbackUrl, location.href).href;
    this.worker = new Worker(policy ? policy.createScriptURL(workerUrl) : workerUrl, { type: "module" });
    this.worker.onmessage = ({ data }) => {
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.error) reject(new Error(data.error));
      else resolve(data);
    };
  }

  read(blob) {
    const id = this.#next++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, blob, fallbackUrl: this.fallbackUrl });
    });
  }
}

export class Transfer {
  #queue = [];
  #aborts = new Set();
  #wake = null;
  isPaused = false;

  // files: [{index, file, partSize, held: Set of part numbers, sent: bytes, state}]
  constructor(url, files, hasher, onChange) {
    this.url = url;
    this.files = files;
    this.hasher = hasher;
    this.onChange = onChange;
    for (const entry of files) this.#queueMissing(entry);
    addEventListener("online", () => this.#open());
  }

  #queueMissing(entry) {
    const count = Math.ceil(entry.file.size / entry.partSize);
    entry.inFlight = new Map();
    entry.heldBytes = 0;
    entry.missing = 0;
    for (let number = 0; number < count; number += 1) {
      const blob = entry.file.slice(number * entry.partSize, (number + 1) * entry.partSize);
      if (entry.held.has(number)) {
        entry.heldBytes += blob.size;
      } else {
        entry.missing += 1;
        this.#queue.push({ entry, number, blob });
      }
    }
    entry.state = entry.missing ? "waiting" : "held";
  }

  async run() {
    await Promise.all(Array.from({ length: LANES }, () => this.#lane()));
  }

  pause() {
    this.isPaused = true;
    for (const abort of this.#aborts) abort.abort();
  }

  resume() {
    this.isPaused = false;
    this.#open();
  }

  stop() {
    this.#queue.length = 0;
    this.pause();
  }

  async #lane() {
    for (let task = this.#queue.shift(); task; task = this.#queue.shift()) {
      try {
        await this.#deliver(task);
      } catch (error) {
        // One refused part ends the upload: the other lanes find nothing more to do.
        this.#queue.length = 0;
        task.entry.state = "failed";
        task.entry.reason = error.message;
        this.onChange();
        throw error;
      }
    }
  }

  async #deliver(task) {
    for (let attempt = 1; ; attempt += 1) {
      await this.#gate();
      try {
        await this.#attempt(task);
        return;
      } catch (error) {
        task.entry.inFlight.delete(task.number);
        if (this.isPaused) {
          attempt = 0;
        } else if (!(error instanceof Refusal) || !error.isTransient || attempt === MAX_ATTEMPTS) {
          throw error;
        } else {
          task.entry.state = "retrying";
          this.onChange();
          await this.#rest(attempt);
        }
      }
    }
  }

  async #attempt({ entry, number, blob }) {
    const { digest, buffer } = await this.hasher.read(blob);
    // The pause may have begun while the part was read.
    await this.#gate();
    const abort = new AbortController();
    this.#aborts.add(abort);
    entry.state = "sending";
    try {
      await send("PUT", `${this.url}/files/${entry.index}/parts/${number}`, buffer, {
        headers: {
          "Content-Type": "application/octet-stream",
          "Content-Digest": `sha-256=:${digest}:`,
        },
        onSent: (bytes) => {
          entry.inFlight.set(number, bytes);
          this.onChange();
        },
        signal: abort.signal,
      });
    } finally {
      this.#aborts.delete(abort);
    }
    entry.inFlight.delete(number);
    entry.heldBytes += blob.size;
    entry.missing -= 1;
    if (!entry.missing) entry.state = "held";
    this.onChange();
  }

  // Doubling pauses with jitter, so that many parts do not come back at once.
  #rest(attempt) {
    const limit = Math.min(MAX_BACKOFF_S, BACKOFF_S * 2 ** attempt);
    return new Promise((resolve) => { setTimeout(resolve, 1000 * limit * (0.5 + Math.random() / 2)); });
  }

  async #gate() {
    while (this.isPaused || !navigator.onLine) {
      this.#wake ??= Promise.withResolvers();
      await this.#wake.promise;
    }
  }

  #open() {
    this.#wake?.resolve();
    this.#wake = null;
  }
}
