// SHA-256 (FIPS 180-4) for pages without crypto.subtle: browsers offer that on https and
// localhost only, and a hub on an intranet often speaks plain http. The server checks every
// digest, so a mistake here can refuse a part but never let a wrong one in.

const ROUNDS = 64;
const BLOCK_BYTES = 64;

// The first 32 bits of the fractional part of the roots of the first primes (sections 4.2.2, 5.3.3).
function fraction(value) {
  return Math.floor((value - Math.floor(value)) * 2 ** 32) | 0;
}

function firstPrimes(count) {
  const primes = [];
  for (let n = 2; primes.length < count; n += 1) {
    if (primes.every((prime) => n % prime)) primes.push(n);
  }
  return primes;
}

const PRIMES = firstPrimes(ROUNDS);
const K = Int32Array.from(PRIMES, (prime) => fraction(Math.cbrt(prime)));
const START = Int32Array.from(PRIMES.slice(0, 8), (prime) => fraction(Math.sqrt(prime)));

const W = new Int32Array(ROUNDS);

function compress(state, bytes, offset) {
  for (let i = 0; i < 16; i += 1) {
    const at = offset + 4 * i;
    W[i] = (bytes[at] << 24) | (bytes[at + 1] << 16) | (bytes[at + 2] << 8) | bytes[at + 3];
  }
  for (let i = 16; i < ROUNDS; i += 1) {
    const x = W[i - 15];
    const y = W[i - 2];
    const s0 = ((x >>> 7) | (x << 25)) ^ ((x >>> 18) | (x << 14)) ^ (x >>> 3);
    const s1 = ((y >>> 17) | (y << 15)) ^ ((y >>> 19) | (y << 13)) ^ (y >>> 10);
    W[i] = (W[i - 16] + s0 + W[i - 7] + s1) | 0;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let i = 0; i < ROUNDS; i += 1) {
    const s1 = ((e >>> 6) | (e << 26)) ^ ((e >>> 11) | (e << 21)) ^ ((e >>> 25) | (e << 7));
    const t1 = (h + s1 + ((e & f) ^ (~e & g)) + K[i] + W[i]) | 0;
    const s0 = ((a >>> 2) | (a << 30)) ^ ((a >>> 13) | (a << 19)) ^ ((a >>> 22) | (a << 10));
    const t2 = (s0 + ((a & b) ^ (a & c) ^ (b & c))) | 0;
    h = g; g = f; f = e; e = (d + t1) | 0;
    d = c; c = b; b = a; a = (t1 + t2) | 0;
  }
  const rest = [a, b, c, d, e, f, g, h];
  for (let i = 0; i < 8; i += 1) state[i] = (state[i] + rest[i]) | 0;
}

function paddedTail(bytes) {
  const kept = bytes.length % BLOCK_BYTES;
  const tail = new Uint8Array(kept < BLOCK_BYTES - 8 ? BLOCK_BYTES : 2 * BLOCK_BYTES);
  tail.set(bytes.subarray(bytes.length - kept));
  tail[kept] = 0x80;
  new DataView(tail.buffer).setBigUint64(tail.length - 8, BigInt(bytes.length) * 8n);
  return tail;
}

export function sha256(bytes) {
  const state = Int32Array.from(START);
  for (let at = 0; at + BLOCK_BYTES <= bytes.length; at += BLOCK_BYTES) compress(state, bytes, at);
  const tail = paddedTail(bytes);
  for (let at = 0; at < tail.length; at += BLOCK_BYTES) compress(state, tail, at);
  const digest = new Uint8Array(32);
  state.forEach((word, i) => new DataView(digest.buffer).setInt32(4 * i, word));
  return digest;
}
