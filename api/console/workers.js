// The model, its workers and the job queue.

import { h, replaceChildren } from "./dom.js";
import { figure, duration, plural, percent, phase, timeAgo, actorName } from "./format.js";
import { choice, empty, facts, pill, table, errorBox, whileDisabled } from "./components.js";
import { get, post } from "./service.js";
import { onStatus, refresh } from "./status.js";

const PATHS_BY_KIND = { edit: "edits", trace: "traces", evaluation: "evaluations" };

export async function show(place, { signal }) {
  const state = h("div", { class: "stack" });
  const list = h("div");
  const filter = choice(
    "Show",
    [
      ["", "all"],
      ["running", "running"],
      ["queued", "queued"],
      ["failed", "failed"],
    ],
    { change: load },
  );
  replaceChildren(place, h("h1", {}, "Status"), state, h("section", {}, h("h2", {}, "Jobs"), filter.element, list));
  onStatus(() => draw(), signal);
  await Promise.all([refresh(), load()]);

  async function draw() {
    let ready;
    try {
      ready = await get("/readyz", { quiet: true });
    } catch (error) {
      ready = error;
    }
    const {
      items: [model],
    } = await get("/models").catch(() => ({ items: [] }));
    if (!signal.aborted && model) replaceChildren(state, readiness(ready), modelFacts(model), workerTable(model));
  }

  async function load() {
    const status = filter.value;
    try {
      const { items } = await get(`/jobs?limit=25${status ? `&status=${status}` : ""}`, { signal });
      replaceChildren(
        list,
        items.length
          ? jobs(items, load)
          : empty(
              "No jobs",
              h(
                "p",
                {},
                "Edits, traces, evaluations and exports are listed here.",
              ),
            ),
      );
    } catch (error) {
      if (!signal.aborted) replaceChildren(list, errorBox(error));
    }
  }
}

function readiness(ready) {
  if (!ready.ready)
    return h(
      "div",
      { class: "notice bad", role: "status" },
      h("p", {}, h("b", {}, "✗ Not ready. "), ready.message),
    );
  const waiting = Object.entries(ready.waiting)
    .filter(([, n]) => n > 0)
    .map(([kind, n]) => `${n} ${kind}`);
  return h(
    "div",
    { class: "notice good", role: "status" },
    h(
      "p",
      {},
      h("b", {}, "✓ Ready. "),
      waiting.length ? `Queued: ${waiting.join(", ")}.` : "The queue is empty.",
    ),
  );
}

function modelFacts(model) {
  const capacity = Object.entries(model.capacity?.layers ?? {});
  const layers = model.recipe?.rome?.layers;
  return h(
    "section",
    {},
    h("h2", {}, model.name),
    facts([
      ["Architecture", model.architecture],
      ["Parameters", model.parameters && `${(model.parameters / 1e6).toFixed(1)} million`],
      ["Layers", figure(model.layers)],
      ["Width", figure(model.width)],
      ["Positions", figure(model.positions)],
      ["Precision", `${model.dtype} on ${model.device}`],
      ["Edited layers", layers?.join(", ")],
      ["Newest version", `version ${model.head}`],
      ["Active edits", figure(model.active_edits)],
      ["Remaining capacity", capacity.map(([layer, left]) => `${percent(left)} in layer ${layer}`).join(", ") || null],
      ["Exhausted jobs", model.jobs.exhausted || null],
      ["Fingerprint", h("code", { title: model.fingerprint }, model.fingerprint.slice(0, 16))],
    ]),
  );
}

function workerTable(model) {
  const rows = model.workers.map((worker) => [
    h(
      "span",
      {},
      h(
        "span",
        { class: worker.state === "serving" ? "good" : "bad" },
        h("span", { "aria-hidden": "true" }, worker.state === "serving" ? "● " : "○ "),
        worker.state,
      ),
      worker.reason && h("small", {}, worker.reason),
      worker.preparing && h("small", {}, worker.preparing.error ?? `preparing: ${phase(worker.preparing)}`),
    ),
    h("code", {}, `${worker.host}:${worker.pid}`),
    `${worker.version}${worker.lag ? ` (${worker.lag} behind)` : ""}`,
    worker.roles.length ? worker.roles.join(", ") : "all",
    `${figure(Math.round(worker.age))} s ago`,
    worker.digest ? h("code", { title: worker.digest }, worker.digest.slice(0, 12)) : "–",
  ]);
  return h(
    "section",
    {},
    h("h2", {}, plural(model.workers.length, "worker")),
    rows.length
      ? table(
          "Workers",
          [["state"], ["process"], ["version", true], ["roles"], ["heartbeat", true], ["weights"]],
          rows,
        )
      : empty("No workers", h("p", {}, "Start one with ", h("code", {}, "palimpsest worker"), ".")),
  );
}

function jobs(items, again) {
  const rows = items.map((job) => {
    const place = h("div");
    const retry = h(
      "button",
      {
        type: "button",
        class: "small",
        on: {
          click: () =>
            whileDisabled(retry, place, async () => {
              await post(`/jobs/${job.id}/retry`);
              await again();
            }),
        },
      },
      "Retry",
    );
    return [
      PATHS_BY_KIND[job.kind]
        ? h("a", { href: `#/${PATHS_BY_KIND[job.kind]}/${job.id}` }, job.subject)
        : job.subject,
      job.kind,
      h(
        "span",
        {},
        pill(job.status),
        job.error && h("small", {}, job.error.detail),
        job.status === "failed" && retry,
        place,
      ),
      actorName(job.actor),
      timeAgo(job.created),
      duration(job.started, job.ended),
    ];
  });
  return table("Jobs", [["subject"], ["kind"], ["status"], ["actor"], ["created"], ["duration", true]], rows);
}
