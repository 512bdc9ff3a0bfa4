// @ts-check
// Formatting of numbers, times and names.

/** Format a probability or a share in per cent; values near 0 and 1 as bounds. */
export function percent(p) {
  if (p === null || p === undefined) return "–";
  if (p === 0) return "0 %";
  if (p < 0.001) return "< 0.1 %";
  if (p > 0.999 && p < 1) return "> 99.9 %";
  return `${(100 * p).toFixed(1).replace(/\.0$/, "")} %`;
}

/** Format a number with three significant digits. */
export function figure(x, digits = 3) {
  if (x === null || x === undefined) return "–";
  return Number.isInteger(x) ? x.toLocaleString("en") : Number(x.toPrecision(digits)).toString();
}

export const plural = (n, one, more = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : more}`;

const CLOCK = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit" });
const DAY = new Intl.DateTimeFormat(undefined, {
  day: "numeric",
  month: "short",
  hour: "2-digit",
  minute: "2-digit",
});

/** Format a time relative to now. */
export function timeAgo(iso) {
  if (!iso) return "–";
  const at = new Date(iso);
  const seconds = (Date.now() - at) / 1000;
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  return seconds < 43_200 ? CLOCK.format(at) : DAY.format(at);
}

/** Format the duration between two times. */
export function duration(from, to) {
  if (!from || !to) return "–";
  const seconds = (new Date(to) - new Date(from)) / 1000;
  return seconds < 100 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds / 60)} min`;
}

/** Format the actor of a ledger entry. */
export const actorName = (actor) =>
  actor === "local" ? "local user" : (actor ?? "–").replace(/^key:/, "key ");

/** Format a token on one line: without its leading space, with visible line breaks. */
export function token(text) {
  const bare = text.replace(/^ | $/g, "");
  return (bare || text.replace(/ /g, "␣")).replace(/\n/g, "↵").replace(/\t/g, "⇥");
}

/** Split a prompt into the text before the subject, the subject, and the text after it. */
export function splitPrompt(prompt, subject) {
  const at = prompt.indexOf("{}");
  if (at >= 0) return [prompt.slice(0, at), subject, prompt.slice(at + 2).replaceAll("{}", () => subject)];
  const found = subject ? prompt.indexOf(subject) : -1;
  return found < 0
    ? [prompt, "", ""]
    : [prompt.slice(0, found), subject, prompt.slice(found + subject.length)];
}

/** Labels of the phases of a job. */
const PHASES = {
  corpus: "collecting text",
  contexts: "sampling contexts",
  statistics: "collecting key statistics",
  factorize: "factorizing the statistics",
  answer: "generating",
  optimize: "optimizing the value",
  train: "training",
  solve: "solving for the weight change",
  compose: "composing the version",
  digest: "hashing the version",
  capacity: "measuring capacity",
  baseline: "measuring the current version",
  measure: "measuring",
  perplexity: "measuring perplexity",
  guard: "checking the guard",
  commit: "committing",
  retry: "evaluating again at the new head",
  find: "computing edits",
  strengthen: "choosing strengths",
  probe: "running probes",
  drift: "measuring the loss on plain text",
  generate: "generating texts",
  summarize: "summarizing",
  prepare: "preparing",
  run: "running the corrupted inputs",
  trace: "restoring states",
  compare: "comparing",
  verify: "verifying the exported files",
  store: "storing",
  wait: "waiting for the store",
};

/** Format the progress of a job. */
export function phase({ phase, done, total, seconds_left: left }) {
  const words = PHASES[phase] ?? phase;
  const counted = total > 1 ? `${words}, ${done} of ${total}` : words;
  return left === undefined || left === null ? counted : `${counted}, about ${timeLeft(left)} left`;
}

/** Format an estimate: seconds below two minutes, then minutes. */
export const timeLeft = (seconds) =>
  seconds < 120 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} min`;
