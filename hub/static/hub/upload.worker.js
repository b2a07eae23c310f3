// Reads one part and hashes it off the main thread.

async function hash(buffer, fallbackUrl) {
  if (globalThis.crypto?.subtle) {
    return new Uint8Array(await crypto.subtle.digest("SHA-256", buffer));
  }
  const { sha256 } = await import(fallbackUrl);
  return sha256(new Uint8Array(buffer));
}

// One part at a time, so that the disk is read in order.
let queue = Promise.resolve();

onmessage = ({ data }) => {
  queue = queue.then(async () => {
    try {
      const buffer = await data.blob.arrayBuffer();
      const digest = btoa(String.fromCharCode(...(await hash(buffer, data.fallbackUrl))));
      postMessage({ id: data.id, digest, buffer }, [buffer]);
    } catch (error) {
      postMessage({ id: data.id, error: String(error) });
    }
  });
};
