// Evaluations: the quality of edits over many records. They do not change the ledger.

import { h, replaceChildren, s } from "./dom.js";
import { figure, duration, plural, percent, timeAgo, actorName } from "./format.js";
import {
  choice,
  empty,
  facts,
  field,
  follow,
  formPage,
  link,
  pill,
  raw,
  saveButtons,
  submitOnCtrlEnter,
  table,
  whileDisabled,
} from "./components.js";
import { download, get, post } from "./service.js";
import { disableUntilServing, fillMethods, onStatus, serviceStatus } from "./status.js";

const MEASURES = {
  ES: "efficacy: the prompt gives the new object",
  PS: "paraphrases give the new object",
  NS: "neighbours keep their answers",
  S: "harmonic mean of all three",
};
/** What every measure of the table is. */
const EXPLANATIONS = {
  ...MEASURES,
  S_accuracy: "harmonic mean of the three accuracies",
  EM: "efficacy magnitude: the probability of the new object less that of the true one",
  PM: "the same after paraphrases",
  NM: "after neighbours: the probability of their own object less that of the new one",
  p_new: "probability of the new object after the prompt",
  exact: "the model says the new object after the prompt",
  exact_paraphrase: "the model says it after paraphrases",
  exact_neighbour: "the model says their own object after neighbours",
  accuracy: "correct tokens of the new object after the prompt",
  accuracy_paraphrase: "correct tokens of it after paraphrases",
  accuracy_neighbour: "correct tokens of their own object after neighbours",
  GE: "entropy of n-grams of generated text: low where it repeats itself",
  RS: "similarity of generated text to reference texts",
};
/** For the objectives erase and amplify: the share of the possible effect. */
const CHANGES = { rewrite: "on the prompt", paraphrase: "on paraphrases", neighbour: "on neighbours" };
const ROWS = 50; //: records per page
const EXAMPLE = JSON.stringify(
  [
    {
      subject: "Eiffel Tower",
      prompt: "The {} is located in the city of",
      target_new: "Rome",
      target_true: "Paris",
      paraphrases: ["To see the {}, you have to travel to"],
      neighborhood: [{ prompt: "The Louvre is located in the city of", target: "Paris" }],
    },
  ],
  null,
  2,
);

export async function show(place, { id, signal }) {
  if (id) {
    await showOne(place, id, signal);
    return;
  }
  const list = formPage(
    place,
    "Evaluate a method",
    "Edit many records, each alone or in sequence, and measure the results. The ledger is not changed.",
    form(signal),
  );
  await showNewest(list, signal);
}

function form(signal) {
  const known = serviceStatus.model?.facts !== false;
  const records = h("textarea", {
    id: "records",
    rows: 8,
    spellcheck: "false",
    placeholder: '[{"subject": …, "prompt": …, "target_new": …}, …], or one record per line',
  });
  const file = h("input", { type: "file", id: "records-file", accept: ".json,.jsonl,application/json" });
  file.addEventListener("change", async () => {
    if (file.files[0]) records.value = await file.files[0].text();
  });
  const pasted = h(
    "div",
    { class: "pasted" },
    h(
      "div",
      { class: "field" },
      h("label", { for: "records" }, "Records as JSON"),
      records,
      h("small", {}, "CounterFact or zsRE records, or your own with subject, prompt and target_new."),
    ),
    h("div", { class: "field" }, h("label", { for: "records-file" }, "or from a file"), file),
    h(
      "button",
      {
        type: "button",
        class: "small",
        on: {
          click: () => {
            records.value = EXAMPLE;
          },
        },
      },
      "Use example",
    ),
  );
  const from = choice(
    "Records",
    [
      ["facts", "known facts of the model"],
      ["own", "your own"],
    ],
    { value: known ? "facts" : "own", change: fit },
  );
  const mode = choice(
    "Mode",
    [
      ["single", "each alone"],
      ["sequence", "in sequence"],
    ],
    { change: fit },
  );
  const limit = h("input", { type: "number", min: 1, max: 2000, value: 20 });
  const points = h("input", { type: "text", value: "1, 5, 10, 20", spellcheck: "false" });
  const method = fillMethods(h("select", {}), signal);
  const suites = suiteBoxes(signal);
  const seed = h("input", { type: "number", min: 0, value: 0 });
  const plain = h("input", { type: "number", min: 1, max: 10000, placeholder: "default" });
  const send = h("button", { class: "primary" }, "Evaluate");
  const errorBox = h("div");
  const checkpoints = field("Checkpoints (number of edits)", points);
  fit();
  function fit() {
    pasted.hidden = from.value !== "own";
    checkpoints.hidden = mode.value !== "sequence";
  }
  function asked() {
    const own = from.value === "own" ? { records: read(records.value) } : { dataset: "facts" };
    const numbers = points.value
      .split(/[\s,]+/)
      .filter(Boolean)
      .map(Number);
    return {
      ...own,
      limit: Number(limit.value),
      mode: mode.value,
      method: method.value,
      seed: Number(seed.value),
      ...(suites.chosen().length ? { suites: suites.chosen() } : {}),
      ...(mode.value === "sequence" ? { checkpoints: numbers } : {}),
      ...(plain.value ? { damage_texts: Number(plain.value) } : {}),
    };
  }
  async function submit(event) {
    event.preventDefault();
    const evaluation = await whileDisabled(send, errorBox, async () => post("/evaluations", asked()));
    if (evaluation) location.hash = `#/evaluations/${evaluation.id}`;
  }
  const element = submitOnCtrlEnter(
    h(
      "form",
      { class: "sheet", on: { submit } },
      from.element,
      pasted,
      mode.element,
      checkpoints,
      h(
        "div",
        { class: "grid" },
        field("Max. records", limit),
        field("Method", method),
        field("Seed", seed, "of the record order"),
        field("Damage texts", plain, "texts for the loss on plain text"),
      ),
      suites.element,
      errorBox,
      h("div", { class: "actions" }, send),
    ),
  );
  disableUntilServing(send, element, "evaluate", signal);
  return element;
}

/** A box for each suite that the served model can answer, once it is known. */
function suiteBoxes(signal) {
  const boxes = [];
  const element = h("fieldset", { class: "checks-row" }, h("legend", {}, "Further questions"));
  onStatus(({ model }) => {
    if (boxes.length || !model) return;
    for (const suite of model.suites) {
      if (suite.needs_chat && !model.chat) continue;
      const box = h("input", { type: "checkbox", name: "suites", value: suite.name });
      boxes.push(box);
      element.append(h("label", { class: "check" }, box, h("span", {}, suite.title)));
    }
  }, signal);
  return { element, chosen: () => boxes.filter((box) => box.checked).map((box) => box.value) };
}

/** Parse records from a JSON array or from JSON lines. */
function read(text) {
  if (!text.trim()) throw new Error("Paste records or choose a file.");
  try {
    const value = JSON.parse(text);
    return Array.isArray(value) ? value : [value];
  } catch {}
  return text
    .split("\n")
    .filter((line) => line.trim())
    .map((line, i) => {
      try {
        return JSON.parse(line);
      } catch {
        throw new Error(`Line ${i + 1} is not JSON: enter a list of records, or one record per line.`);
      }
    });
}

async function showNewest(place, signal) {
  const page = await get("/evaluations?limit=20", { signal });
  replaceChildren(
    place,
    h("h2", {}, "Recent evaluations"),
    page.items.length
      ? h(
          "ol",
          { class: "listing" },
          page.items.map((one) =>
            h(
              "li",
              {},
              h("a", { href: `#/evaluations/${one.id}` }, title(one.request)),
              h("span", { class: "meta" }, pill(one.status), h("span", {}, timeAgo(one.created))),
            ),
          ),
        )
      : empty(
          "No evaluations yet",
          h(
            "p",
            {},
            "Twenty known facts of the shipped GPT take about a minute. The result shows efficacy, generalization to paraphrases, and specificity on neighbours.",
          ),
        ),
  );
}

function title({ method, mode, dataset, records, limit }) {
  const part = limit && limit < records ? `${limit} of ` : "";
  const count = dataset ? `${limit ? `${limit} ` : ""}known facts` : part + plural(records, "record");
  return `${method} on ${count}, ${mode === "sequence" ? "in sequence" : "each alone"}`;
}

async function showOne(place, id, signal) {
  const path = `/evaluations/${encodeURIComponent(id)}`;
  draw(await get(path, { signal }));

  function draw(one) {
    const open = one.status === "queued" || one.status === "running";
    const live = h("div");
    const { result, ...shown } = one;
    replaceChildren(
      place,
      h("p", { class: "crumbs" }, link("evaluations", "Evaluations")),
      h(
        "header",
        { class: "title" },
        h("h1", {}, title(one.request)),
        h(
          "p",
          { class: "meta" },
          pill(one.status),
          h("span", {}, `${actorName(one.actor)} · ${timeAgo(one.created)} · ${duration(one.started, one.ended)}`),
        ),
      ),
      open
        ? live
        : [
            one.error && h("div", { class: "problem" }, h("p", {}, one.error.detail)),
            result && results(one, result),
            raw(shown),
          ],
    );
    if (open)
      follow(live, path, "The evaluation", { signal, ended: async () => draw(await get(path, { signal })) });
  }
}

function results(one, result) {
  const errorBox = h("div");
  const written = one.request.objective === "write";
  const [names, found] = written ? [MEASURES, result.after] : [CHANGES, result.changes];
  const save = saveButtons(`/evaluations/${one.id}`, one.id, errorBox);
  return [
    h(
      "section",
      {},
      h("h2", {}, written ? "After the edits" : "Share of the possible effect"),
      h(
        "div",
        { class: "measures" },
        Object.keys(names)
          .filter((name) => found[name])
          .map((name) => measure(name, names[name], written ? result.before[name] : null, found[name])),
      ),
      h(
        "p",
        { class: "legend" },
        h("span", { class: "swatch mean" }),
        "mean",
        h("span", { class: "swatch whisker" }),
        "95 % interval",
        h("span", { class: "swatch tick" }),
        "before the edits",
      ),
    ),
    result.checkpoints?.length > 1 &&
      h(
        "section",
        {},
        h("h2", {}, "By number of edits"),
        h("div", { class: "panels" }, curves(result.checkpoints)),
      ),
    h(
      "div",
      { class: "actions" },
      save("Download report", "text/html", "html"),
      save("Download SVG", "image/svg+xml", "svg"),
      save("Download PNG", "image/png", "png"),
    ),
    comparison(one),
    errorBox,
    h(
      "section",
      {},
      h("h2", {}, "All measures"),
      h("p", { class: "note" }, "Means × 100; divergences (kl) in nats."),
      figures(result),
    ),
    records(result),
    h(
      "section",
      {},
      h("h2", {}, "Details"),
      facts([
        ["Measured", plural(result.records.measured, "record")],
        ["Method", one.request.method],
        ["Layers", result.parameters?.layers?.join(", ")],
        [
          "Loss on plain text",
          result.damage &&
            `${figure(meanOf(result.damage.loss_before), 4)} → ${figure(meanOf(result.damage.loss_after), 4)}`,
        ],
        ["Id", h("code", {}, one.id)],
      ]),
    ),
  ];
}

/** The loss on plain text is a number after a sequence, and an estimate over the records where each is edited alone. */
const meanOf = (found) => (typeof found === "object" && found !== null ? found.mean : found);

/** A measure: a bar with its confidence interval, and a tick at the value before the edits. */
function measure(name, words, before, after) {
  const at = (p) => `${100 * Math.max(0, Math.min(1, p))}%`;
  return h(
    "div",
    { class: "measure" },
    h("span", { class: "name" }, h("b", {}, name), h("small", {}, words)),
    h(
      "span",
      { class: "track", "aria-hidden": "true" },
      h("span", { class: "bar", style: { "inline-size": at(after.mean) } }),
      after.high > after.low &&
        h("span", {
          class: "whisker",
          style: {
            "inset-inline-start": at(after.low),
            "inline-size": `${100 * Math.max(after.high - after.low, 0)}%`,
          },
        }),
      before && h("span", { class: "tick", style: { "inset-inline-start": at(before.mean) } }),
    ),
    h(
      "span",
      { class: "figures" },
      h("b", {}, percent(after.mean)),
      h("small", {}, `${percent(after.low)} to ${percent(after.high)}`),
    ),
  );
}

/** A curve of each measure over the number of edits. */
function curves(checkpoints) {
  return Object.entries(MEASURES).map(([name, words]) => {
    const points = checkpoints
      .filter((one) => one.measures[name])
      .map((one) => ({ edits: one.edits, ...one.measures[name] }));
    return points.length > 1
      ? h("figure", {}, h("figcaption", {}, h("b", {}, name), ` ${words}`), curve(points, name))
      : null;
  });
}

function curve(points, name) {
  const [left, top, wide, tall] = [44, 8, 240, 120];
  const logs = points.map(({ edits }) => Math.log(edits));
  const x = (i) => left + 6 + ((wide - 12) * (logs[i] - logs[0])) / Math.max(logs.at(-1) - logs[0], 1e-9);
  const y = (p) => top + tall * (1 - p);
  const band = [
    ...points.map((p, i) => `${x(i)},${y(p.high)}`),
    ...points.map((p, i) => `${x(i)},${y(p.low)}`).reverse(),
  ].join(" ");
  const said = points.map((p) => `after ${p.edits}: ${percent(p.mean)}`).join(", ");
  return s(
    "svg",
    {
      class: "curve",
      viewBox: `0 0 ${left + wide + 6} ${top + tall + 34}`,
      role: "img",
      "aria-label": `${name}, ${said}`,
    },
    [0, 0.5, 1].map((p) =>
      s(
        "g",
        { class: "axis" },
        s("line", { x1: left, x2: left + wide, y1: y(p), y2: y(p) }),
        s("text", { class: "scale", x: left - 5, y: y(p) }, `${100 * p} %`),
      ),
    ),
    s("polygon", { class: "band", points: band }),
    s("polyline", { class: "line", points: points.map((p, i) => `${x(i)},${y(p.mean)}`).join(" ") }),
    points.map((p, i) => s("circle", { class: "dot", cx: x(i), cy: y(p.mean), r: 3 })),
    s(
      "g",
      { class: "axis" },
      points.map((p, i) =>
        i === 0 || x(i) - x(i - 1) > 14 ? s("text", { x: x(i), y: top + tall + 14 }, String(p.edits)) : null,
      ),
      s("text", { class: "name", x: left + wide / 2, y: top + tall + 29 }, "number of edits"),
    ),
  );
}

function figures(result) {
  const columns =
    result.checkpoints?.length > 1
      ? result.checkpoints.map((one) => [`after ${one.edits}`, one.measures])
      : [["after", result.after]];
  const explanations = Object.assign({}, EXPLANATIONS, ...(serviceStatus.model?.suites ?? []).map((s) => s.measures));
  const scaled = (name, mean) => (name.startsWith("kl_") ? figure(mean, 3) : (100 * mean).toFixed(1));
  const mean = (found, name) =>
    found ? scaled(name, found.mean).replace(/\.0$/, "").replace("-", "−") : "–";
  return table(
    "All measures",
    [["measure"], ["before", true], ...columns.map(([words]) => [words, true])],
    Object.keys(result.after)
      .filter((name) => result.after[name])
      .map((name) => [
        [name.replace(/_/g, " "), h("small", {}, explanations[name])],
        mean(result.before[name], name),
        ...columns.map(([, measures]) => h("b", {}, mean(measures[name], name))),
      ]),
    { stacks: false },
  );
}

/** A choice of other evaluations, and buttons that download the report of all chosen ones. */
function comparison(one) {
  const others = h("select", { multiple: true, size: 4 });
  const errorBox = h("div");
  const save = (words, format) => {
    const button = h("button", { type: "button", on: { click } }, words);
    async function click() {
      const ids = [one.id, ...[...others.selectedOptions].map(({ value }) => value)];
      const path = `/evaluations/report?format=${format}&${ids.map((id) => `id=${id}`).join("&")}`;
      await whileDisabled(button, errorBox, () => download(path, "*/*", `evaluations.${format}`));
    }
    return button;
  };
  const place = h(
    "section",
    { hidden: true },
    h("h2", {}, "Compare"),
    field("Other evaluations", others, "the report has their differences from this one, with paired intervals"),
    errorBox,
    h("div", { class: "actions" }, save("Download comparison", "html"), save("Download CSV", "csv")),
  );
  get("/evaluations?limit=50", { quiet: true }).then(({ items }) => {
    const done = items.filter(({ id, status }) => id !== one.id && status === "done");
    others.append(...done.map((other) => h("option", { value: other.id }, describe(other))));
    place.hidden = !done.length;
  });
  return place;
}

const describe = (evaluation) => `${title(evaluation.request)}, ${timeAgo(evaluation.created)}`;

function records(result) {
  const worst = [...result.rows].sort((a, b) => (a.after.p_new ?? 0) - (b.after.p_new ?? 0));
  const rows = worst.slice(0, ROWS).map((row) => [
    h(
      "span",
      { class: "prompt" },
      row.prompt.replace("{}", () => row.subject),
      h("small", {}, `${row.target_true ?? "?"} → ${row.target_new}`),
    ),
    percent(row.before.p_new),
    h("b", {}, percent(row.after.p_new)),
    row.after.PS === undefined ? "–" : percent(row.after.PS),
    row.after.NS === undefined ? "–" : percent(row.after.NS),
  ]);
  return h(
    "section",
    {},
    h("h2", {}, "Records"),
    h(
      "p",
      { class: "note" },
      result.rows.length > ROWS
        ? `The ${ROWS} of ${result.rows.length} records with the lowest probability of the new object.`
        : "Sorted by the probability of the new object, lowest first.",
    ),
    table(
      "Records",
      [["prompt"], ["p(new) before", true], ["after", true], ["paraphrases", true], ["neighbours", true]],
      rows,
    ),
  );
}
