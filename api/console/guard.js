// The guard's verdict in plain words: what each check asked, its figure and limit, and what to do when it failed.

import { h } from "./dom.js";
import { figure, many, percent } from "./format.js";

/** name → [what it asks, its figure beside its limit, what to change when it failed]. */
const CHECKS = {
  efficacy: ({ figure: x, limit }, objective) =>
    objective === "write"
      ? [
          "The new object is more probable than the old one",
          `${percent(x)} against ${percent(limit)}`,
          "Try another method or more steps, or name the object as the model would write it.",
        ]
      : [
          objective === "erase" ? "The true object is no longer the answer" : "The true object is the answer",
          `${percent(x)} of what was possible, at least ${bound(limit)}`,
          "Ask for less effect (min_effect), or try another method.",
        ],
  probability: ({ figure: x, limit }) => [
    "The new object is probable enough",
    `${percent(x)}, at least ${bound(limit)}`,
    "Lower the least probability if less is enough, or try another method.",
  ],
  paraphrase: ({ figure: x, limit }) => [
    "Other wordings follow",
    `${percent(x)} of the paraphrases, at least ${bound(limit)}`,
    "Lower the least share of paraphrases, or try a method that reaches further.",
  ],
  neighborhood: ({ figure: x, limit }) => [
    "Neighbours keep their answers",
    `${percent(x)} of the probes, at least ${bound(limit)}`,
    "The edit reaches too far: try another method or layer, or accept it by lowering the least share of neighbours.",
  ],
  perplexity: ({ figure: x, limit }) => [
    "Plain text reads as before",
    `perplexity ${more(x)}, at most ${more(limit)}`,
    "The edit damages the model at large: use a smaller clamp or another layer.",
  ],
  norm: ({ figure: x, limit }) => [
    "The change of the weight is moderate",
    `${percent(x)} of the weight's norm, at most ${bound(limit)}`,
    "Spread the edit over several layers, use a smaller clamp, or raise the limit.",
  ],
  broken: ({ figure: x, limit }) => [
    "Other active edits still hold",
    `${x || "none"} would cease to hold, ${limit ? `at most ${limit}` : "none"} may`,
    "Take back the edits named below first, or say how many may break.",
  ],
  conflict: ({ figure: x, limit }) => [
    "No active edit says the same in other words",
    `${percent(x)}, below ${bound(limit)}`,
    "Let this edit supersede the other, or let both stand.",
  ],
  room: ({ figure: x, limit }) => [
    "The layer has room for it",
    `${percent(x)} of its key is free, at least ${bound(limit)}`,
    "Take back edits that are no longer wanted, or name other layers.",
  ],
};

/** A limit as it was set. */
const bound = (share) => `${figure(100 * share, 4)} %`;

/** A factor as what it adds. */
const more = (factor) => {
  const change = (100 * Math.abs(factor - 1)).toFixed(1).replace(/\.0$/, "");
  return `${change === "0" ? "±" : factor < 1 ? "−" : "+"}${change} %`;
};

/** The verdict as a whole, then each check. */
export function verdict(edit) {
  const guard = edit.result.guard;
  if (!guard?.checks?.length) return h("p", { class: "note" }, "The guard was off for this edit.");
  const failed = guard.checks.filter((check) => !check.passed);
  const enforced = edit.guard?.enabled !== false;
  const head =
    failed.length === 0
      ? `All ${guard.checks.length} checks passed.`
      : `${failed.length} of ${many(guard.checks.length, "check")} failed${enforced ? ": the model is as it was" : ", and the guard was off"}.`;
  return h(
    "div",
    { class: "verdict" },
    h(
      "p",
      { class: `head ${failed.length ? "bad" : "good"}` },
      h("span", { "aria-hidden": "true" }, failed.length ? "✗ " : "✓ "),
      head,
    ),
    h(
      "ul",
      { class: "checks" },
      guard.checks.map((check) => one(check, edit.objective)),
    ),
  );
}

function one(check, objective) {
  const [asks, measured, change] = (
    CHECKS[check.name] ?? (() => [check.name, `${figure(check.figure)}, limit ${figure(check.limit)}`, ""])
  )(check, objective);
  return h(
    "li",
    { class: check.passed ? "good" : "bad" },
    h("span", { class: "mark", "aria-hidden": "true" }, check.passed ? "✓" : "✗"),
    h(
      "span",
      { class: "asks" },
      asks,
      h("span", { class: "unseen" }, check.passed ? ": passed." : ": failed."),
    ),
    h("span", { class: "measured" }, measured),
    !check.passed && change && h("span", { class: "change" }, change),
  );
}
