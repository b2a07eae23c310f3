// Copies the text of the element named by data-copy, with a path for plain-http intranets
// where navigator.clipboard does not exist.

async function copyText(source) {
  const text = source.textContent.trim();
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const selection = getSelection();
  selection.selectAllChildren(source);
  document.execCommand("copy");
  selection.removeAllRanges();
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const label = button.querySelector("[data-copy-label]");
  const before = label.textContent;
  try {
    await copyText(document.getElementById(button.dataset.copy));
    label.textContent = "Copied";
  } catch {
    label.textContent = "Select and copy";
  }
  setTimeout(() => { label.textContent = before; }, 2000);
});

// A button that only makes sense with JavaScript is hidden in the page and shown here.
for (const element of document.querySelectorAll("[data-needs-js]")) element.hidden = false;
