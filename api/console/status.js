// @ts-check
// The status of the service: the model, its newest version and its workers, polled while the page is visible.

import { h, replaceChildren } from "./dom.js";
import { phase, plural, timeLeft } from "./format.js";
import { get } from "./service.js";

const REFRESH_INTERVAL = 5000;
const STARTING_INTERVAL = 1000; // while something starts
export const serviceStatus = { model: null, error: null };
const listeners = new Set();
let timer = null;

/** Call `listener` with every response until `signal` is aborted. */
export function onStatus(listener, signal) {
  listeners.add(listener);
  signal?.addEventListener("abort", () => listeners.delete(listener));
  if (serviceStatus.model || serviceStatus.error) listener(serviceStatus);
}

/** Poll now, and from then on at the refresh interval. */
export async function refresh() {
  clearTimeout(timer);
  try {
    const { items } = await get("/models", { quiet: true });
    Object.assign(serviceStatus, { model: items[0], error: null });
  } catch (error) {
    serviceStatus.error = error;
  }
  listeners.forEach((listener) => listener(serviceStatus));
  const interval = startingState("generate") ? STARTING_INTERVAL : REFRESH_INTERVAL;
  timer = setTimeout(() => (document.hidden ? null : refresh()), interval);
}

/**
 * Return what work of a role waits for: {words, progress, blocks}, or null when it can be done. `blocks`: the service
 * would refuse it; otherwise it is queued.
 */
export function startingState(role) {
  const { model, error } = serviceStatus;
  if (error?.status === 503) return { words: "The model is being loaded.", progress: null, blocks: true };
  if (error || !model) return null;
  const serving = model.workers.filter((one) => one.state === "serving" && (!one.roles?.length || one.roles.includes(role)));
  if (!serving.length)
    return { words: "No worker serves the model: it is being loaded, or no worker runs.", progress: null, blocks: role === "generate" };
  const progress = serving.map((one) => one.preparing).find((one) => one && !one.error);
  if (!progress || !["edit", "evaluate"].includes(role)) return null;
  return { words: `Edits wait for this: ${phase(progress)}.`, progress, blocks: false };
}

/** Disable a button while the work of its role cannot be done, and say in its form what that waits for, with progress. */
export function disableUntilServing(button, form, role, signal) {
  const bar = h("progress", { "aria-label": "Progress" });
  const words = h("p", {});
  const notice = h("div", { class: "notice starting", role: "status", hidden: true }, words, bar);
  form.prepend(notice);
  let blocked = false;
  onStatus(() => {
    const state = startingState(role);
    notice.hidden = !state;
    if (state && words.textContent !== state.words) words.textContent = state.words;
    if (state?.progress?.total > 1) [bar.max, bar.value] = [state.progress.total, state.progress.done];
    else bar.removeAttribute("value");
    if (state?.blocks) button.disabled = blocked = true;
    else if (blocked) button.disabled = blocked = false;
  }, signal);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});

/** Fill a select with the editing methods that GET /models lists, as soon as the model is known. */
export function fillMethods(select, signal) {
  let filled = false;
  onStatus(({ model }) => {
    if (filled || !model) return;
    filled = true;
    select.append(...model.methods.map(({ name, title }) => h("option", { value: name, title }, name)));
  }, signal);
  return select;
}

/** Return what the workers prepare for edits, with the time left where it is known. */
function preparation(workers) {
  const preparing = workers.map((worker) => worker.preparing).filter((state) => state && !state.error);
  if (!preparing.length) return "";
  const left = Math.max(...preparing.map((state) => state.seconds_left ?? 0));
  return ` · preparing edits${left ? `, ${timeLeft(left)}` : ""}`;
}

/** Show the status in the header of the page. */
export function showStatus(place) {
  onStatus(({ model, error }) => {
    if (error) {
      place.className = `service-status ${error.status === 503 ? "waiting" : "off"}`;
      const words = error.status === 401 ? "needs a key" : error.status === 503 ? "starting" : "unreachable";
      replaceChildren(place, h("span", { class: "dot" }), h("span", { class: "words" }, words));
      return;
    }
    const serving = model.workers.filter((worker) => worker.state === "serving").length;
    const open = model.jobs.queued + model.jobs.running;
    place.className = `service-status ${serving ? (open ? "busy" : "on") : "off"}`;
    replaceChildren(
      place,
      h("span", { class: "dot" }),
      h(
        "span",
        { class: "words" },
        h("span", { class: "wide" }, `${model.name} · `),
        `version ${model.head}`,
        h("span", { class: "wide" }, ` · ${plural(serving, "worker")}`),
        open ? ` · ${plural(open, "job")}` : "",
        preparation(model.workers),
      ),
    );
  });
}
