// @ts-check
// The status of the service: the model, its newest version and its workers, polled while the page is visible.

import { h, replaceChildren } from "./dom.js";
import { plural, timeLeft } from "./format.js";
import { get } from "./service.js";

const REFRESH_INTERVAL = 5000;
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
  timer = setTimeout(() => (document.hidden ? null : refresh()), REFRESH_INTERVAL);
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
      place.className = "service-status off";
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
