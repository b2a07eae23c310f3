// The blind vote: two columns in a random order, without names until a choice was made.

import { explainRefusal, post } from "./asking.js";

const byId = (id) => document.getElementById(id);
const section = byId("vote");
const result = byId("vote-result");
const buttons = [...section.querySelectorAll("[data-vote]")];
let ballot = null;

export function shuffled(models) {
  const swap = crypto.getRandomValues(new Uint8Array(1))[0] & 1;
  return swap ? [models[1], models[0]] : [...models];
}

export function withdraw() {
  ballot = null;
  section.hidden = true;
}

// `reveal` is called once the vote was counted.
export function open({ left, right, question, csrf, reveal }) {
  ballot = { left, right, question, csrf, reveal };
  result.textContent = "";
  for (const button of buttons) button.disabled = false;
  section.hidden = false;
  byId("vote-title").focus();
}

function say(outcome, { left, right }, tally) {
  const chosen = { left, right, tie: "neither" }[outcome];
  const totals = `${tally.wins} wins, ${tally.losses} losses, ${tally.ties} ties`;
  result.textContent =
    `A was ${left}, B was ${right}. You chose ${chosen}. ${left} so far, against ${right}: ${totals}.`;
}

async function vote(outcome) {
  const { left, right, question, csrf, reveal } = ballot;
  for (const button of buttons) button.disabled = true;
  const response = await post("/api/v1/votes", { left, right, outcome, question }, { csrf });
  if (!response.ok) {
    result.textContent = await explainRefusal(response);
    for (const button of buttons) button.disabled = false;
    return;
  }
  say(outcome, { left, right }, await response.json());
  reveal();
}

for (const button of buttons) {
  button.addEventListener("click", () => {
    vote(button.dataset.vote).catch(() => {
      result.textContent = "The vote did not arrive. Check that the server is reachable.";
      for (const each of buttons) each.disabled = false;
    });
  });
}
