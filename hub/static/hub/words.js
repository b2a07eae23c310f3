// What the hub says is plain text in which commands stand between backticks.

export function writeWords(place, text) {
  const parts = text.split("`");
  // An even number of parts: one backtick stands alone.
  if (parts.length % 2 === 0) {
    place.textContent = text;
    return;
  }
  place.replaceChildren(...parts.map((part, number) => {
    if (number % 2 === 0) return part;
    const code = document.createElement("code");
    code.textContent = part;
    return code;
  }));
}
