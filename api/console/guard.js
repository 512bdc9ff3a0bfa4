// The result of the guard: each check with its measurement and limit, and what to change if it failed.

import { h } from "./dom.js";
import { figure, plural, percent } from "./format.js";

/** name → [condition, measurement and limit, what to change if it failed]. */
const CHECKS = {
  efficacy: ({ figure: x, limit }, objective) =>
    objective === "write"
      ? [
          "New object more probable than the old one",
          `${percent(x)} against ${percent(limit)}`,
          "Try another method or more steps, or spell the object as the model writes it.",
        ]
      : [
          objective === "erase" ? "Effect on the true object" : "Effect on the true object",
          `${percent(x)} of the possible effect, min. ${bound(limit)}`,
          "Lower min_effect, or try another method.",
        ],
  probability: ({ figure: x, limit }) => [
    "Probability of the new object",
    `${percent(x)}, min. ${bound(limit)}`,
    "Lower min_probability, or try another method.",
  ],
  paraphrase: ({ figure: x, limit }) => [
    "Paraphrases prefer the new object",
    `${percent(x)} of the paraphrases, min. ${bound(limit)}`,
    "Lower min_paraphrase, or try a method that generalizes further.",
  ],
  neighborhood: ({ figure: x, limit }) => [
    "Neighbours preserved",
    `${percent(x)} of the probes, min. ${bound(limit)}`,
    "The edit affects other subjects: try another method or layer, or lower min_neighborhood.",
  ],
  subject: ({ figure: x, limit }) => [
    "Subject still named",
    `${percent(x)} of the probability before, min. ${bound(limit)}`,
    "The edit changes which subject the model reads: set restatement_weight, or lower min_subject.",
  ],
  description: ({ figure: x, limit }) => [
    "Description of the subject",
    `${figure(x)} nats per token further from that of the base model, max. ${figure(limit)}`,
    "The edit changes more of the subject than its fact: use a smaller clamp, or raise max_description_kl.",
  ],
  perplexity: ({ figure: x, limit }) => [
    "Perplexity of reference text",
    `${more(x)}, max. ${more(limit)}`,
    "The edit damages the model in general: use a smaller clamp or another layer.",
  ],
  norm: ({ figure: x, limit }) => [
    "Norm of the weight change",
    `${percent(x)} of the weight's norm, max. ${bound(limit)}`,
    "Spread the edit over several layers, use a smaller clamp, or raise the limit (max_norm).",
  ],
  regressions: ({ figure: x, limit }) => [
    "Active edits still hold",
    `${x} regressed, max. ${limit}`,
    "Revert the edits listed below first, or raise max_regressions.",
  ],
  conflict: ({ figure: x, limit }) => [
    "No conflict with an active edit",
    `${percent(x)}, below ${bound(limit)}`,
    "Set on_conflict to supersede the other edit, or to keep both.",
  ],
  capacity: ({ figure: x, limit }) => [
    "Remaining capacity of the layer",
    `${percent(x)} of the key is unoccupied, min. ${bound(limit)}`,
    "Revert edits that are no longer needed, or use other layers.",
  ],
};

/** Format a limit. */
const bound = (share) => `${figure(100 * share, 4)} %`;

/** Format a ratio as a relative change. */
const more = (factor) => {
  const change = (100 * Math.abs(factor - 1)).toFixed(1).replace(/\.0$/, "");
  return `${change === "0" ? "±" : factor < 1 ? "−" : "+"}${change} %`;
};

/** Return the overall result, then each check. */
export function guardVerdict(edit) {
  const guard = edit.result.guard;
  if (!guard?.checks?.length) return h("p", { class: "note" }, "The guard was disabled for this edit.");
  const failed = guard.checks.filter((check) => !check.passed);
  const enforced = edit.guard?.enabled !== false;
  const head =
    failed.length === 0
      ? `All ${guard.checks.length} checks passed.`
      : `${failed.length} of ${plural(guard.checks.length, "check")} failed${enforced ? ": the edit was not applied" : "; the guard was disabled"}.`;
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
