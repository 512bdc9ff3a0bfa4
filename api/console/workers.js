// The model, its workers and the queue at a glance.

import { h, put } from "./dom.js";
import { figure, lasted, many, percent, when, who } from "./format.js";
import { choice, empty, facts, pill, table, trouble, working } from "./parts.js";
import { get, post } from "./service.js";
import { onStanding, refresh } from "./standing.js";

const PLACES = { edit: "edits", trace: "traces", evaluation: "evaluations" };

export async function show(place, { signal }) {
  const state = h("div", { class: "stack" });
  const list = h("div");
  const filter = choice(
    "Show",
    [
      ["", "all"],
      ["running", "at work"],
      ["queued", "waiting"],
      ["failed", "failed"],
    ],
    { change: load },
  );
  put(place, h("h1", {}, "At work"), state, h("section", {}, h("h2", {}, "Jobs"), filter.element, list));
  onStanding(() => draw(), signal);
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
    if (!signal.aborted && model) put(state, readiness(ready), resident(model), staff(model));
  }

  async function load() {
    const status = filter.value;
    try {
      const { items } = await get(`/jobs?limit=25${status ? `&status=${status}` : ""}`, { signal });
      put(
        list,
        items.length
          ? jobs(items, load)
          : empty(
              "Nothing here",
              h(
                "p",
                {},
                "Edits, traces and evaluations stand here while they wait, while they run, and after they ended.",
              ),
            ),
      );
    } catch (error) {
      if (!signal.aborted) put(list, trouble(error));
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
      waiting.length ? `Waiting: ${waiting.join(", ")}.` : "Nothing waits.",
    ),
  );
}

function resident(model) {
  const room = Object.entries(model.capacity?.layers ?? {});
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
      ["Edited at layer", layers?.join(", ")],
      ["Head", `version ${model.head}`],
      ["Active edits", figure(model.active_edits)],
      ["Room left", room.map(([layer, left]) => `${percent(left)} in layer ${layer}`).join(", ") || null],
      ["Given-up jobs", model.jobs.exhausted || null],
      ["Fingerprint", h("code", { title: model.fingerprint }, model.fingerprint.slice(0, 16))],
    ]),
  );
}

function staff(model) {
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
    ),
    h("code", {}, `${worker.host}:${worker.pid}`),
    `${worker.version}${worker.lag ? ` (${worker.lag} behind)` : ""}`,
    worker.roles.length ? worker.roles.join(", ") : "everything",
    `${figure(Math.round(worker.age))} s ago`,
    worker.digest ? h("code", { title: worker.digest }, worker.digest.slice(0, 12)) : "–",
  ]);
  return h(
    "section",
    {},
    h("h2", {}, many(model.workers.length, "worker")),
    rows.length
      ? table(
          "Workers",
          [["state"], ["process"], ["version", true], ["does"], ["heard", true], ["weights"]],
          rows,
        )
      : empty("No worker", h("p", {}, "Start one with ", h("code", {}, "palimpsest work"), ".")),
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
            working(retry, place, async () => {
              await post(`/jobs/${job.id}/retry`);
              await again();
            }),
        },
      },
      "Try again",
    );
    return [
      h("a", { href: `#/${PLACES[job.kind]}/${job.id}` }, job.subject),
      job.kind,
      h(
        "span",
        {},
        pill(job.status),
        job.error && h("small", {}, job.error.detail),
        job.status === "failed" && retry,
        place,
      ),
      who(job.actor),
      when(job.created),
      lasted(job.started, job.ended),
    ];
  });
  return table("Jobs", [["about"], ["kind"], ["state"], ["who"], ["when"], ["took", true]], rows);
}
