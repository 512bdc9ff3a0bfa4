// How the service stands: the model, its head and its workers, asked again every few seconds while somebody looks.

import { h, put } from "./dom.js";
import { many } from "./format.js";
import { get } from "./service.js";

const EVERY = 5000;
export const standing = { model: null, error: null };
const listeners = new Set();
let timer = null;

/** Call back with every answer, until `signal` says that nobody looks any more. */
export function onStanding(listener, signal) {
  listeners.add(listener);
  signal?.addEventListener("abort", () => listeners.delete(listener));
  if (standing.model || standing.error) listener(standing);
}

/** Ask now, and from then on every few seconds. */
export async function refresh() {
  clearTimeout(timer);
  try {
    const { items } = await get("/models", { quiet: true });
    Object.assign(standing, { model: items[0], error: null });
  } catch (error) {
    standing.error = error;
  }
  listeners.forEach((listener) => listener(standing));
  timer = setTimeout(() => (document.hidden ? null : refresh()), EVERY);
}

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});

/** Fill a select with the editing methods that GET /models lists, as soon as the model is known. */
export function fillMethods(select, signal) {
  let filled = false;
  onStanding(({ model }) => {
    if (filled || !model) return;
    filled = true;
    select.append(...model.methods.map(({ name, title }) => h("option", { value: name, title }, name)));
  }, signal);
  return select;
}

/** The few words at the top of every page. */
export function showStanding(place) {
  onStanding(({ model, error }) => {
    if (error) {
      place.className = "standing off";
      const words = error.status === 401 ? "needs a key" : error.status === 503 ? "starting" : "not reached";
      put(place, h("span", { class: "dot" }), h("span", { class: "words" }, words));
      return;
    }
    const serving = model.workers.filter((worker) => worker.state === "serving").length;
    const open = model.jobs.queued + model.jobs.running;
    place.className = `standing ${serving ? (open ? "busy" : "on") : "off"}`;
    put(
      place,
      h("span", { class: "dot" }),
      h(
        "span",
        { class: "words" },
        h("span", { class: "wide" }, `${model.name} · `),
        `version ${model.head}`,
        h("span", { class: "wide" }, ` · ${many(serving, "worker")}`),
        open ? ` · ${many(open, "job")}` : "",
      ),
    );
  });
}
