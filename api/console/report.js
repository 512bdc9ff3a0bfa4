// One edit: its course while it runs, then what it did.

import { h, put } from "./dom.js";
import { figure, lasted, percent, when, who } from "./format.js";
import { verdict } from "./guard.js";
import { confirmed, facts, follow, link, pill, raw, shift, table, told, working, writing } from "./parts.js";
import { ask, download, get, post } from "./service.js";
import { refresh } from "./standing.js";

export async function show(place, { id, signal }) {
  const path = `/edits/${encodeURIComponent(id)}`;
  draw(await get(path, { signal }));

  function draw(edit) {
    const open = edit.status === "queued" || edit.status === "running";
    const live = h("div");
    put(
      place,
      h("p", { class: "crumbs" }, link("edits", "Edits")),
      h(
        "header",
        { class: "title" },
        h("h1", { class: "unseen" }, `${edit.subject}: ${edit.status}`),
        writing(told(edit)),
        h(
          "p",
          { class: "meta" },
          pill(edit.status),
          edit.dry_run && edit.status !== "dry_run_passed" && h("span", { class: "pill" }, "dry run"),
          h("span", {}, lines(edit)),
        ),
      ),
      open ? live : [course(edit, draw), edit.result && sections(edit), raw(edit)],
    );
    if (open)
      follow(live, path, "The edit", {
        signal,
        ended: (ended) => {
          draw(ended);
          refresh();
        },
      });
  }
}

/** What was measured; of a rejected edit first why. */
function sections(edit) {
  const found = [says(edit), measured(edit)];
  const judged = guard(edit);
  return [
    edit.status === "rejected" ? [judged, ...found] : [...found, judged],
    beside(edit),
    particulars(edit),
  ];
}

function lines(edit) {
  const said = [who(edit.actor), when(edit.created)];
  if (edit.version !== null) said.push(`version ${edit.version}`);
  if (edit.reverted_version !== null) said.push(`taken back at version ${edit.reverted_version}`);
  if (edit.started && edit.ended) said.push(lasted(edit.started, edit.ended));
  return said.join(" · ");
}

const AGAIN = {
  applied: "Another like it",
  rejected: "Change it and try again",
  evaluated: "Write it for good",
};

/** What became of it, and what can be done now. */
function course(edit, draw) {
  const trouble = h("div");
  const again = h(
    "button",
    {
      type: "button",
      class: "primary",
      on: {
        click: () =>
          working(again, trouble, async () => {
            await post(`/jobs/${edit.id}/retry`);
            draw(await get(`/edits/${edit.id}`));
          }),
      },
    },
    "Try it again",
  );
  const words = {
    rejected: () =>
      h(
        "div",
        { class: "problem" },
        h(
          "p",
          {},
          h("b", {}, "It did not land; the model is as it was. "),
          capital(edit.result?.reason ?? edit.error?.detail ?? ""),
          ".",
        ),
      ),
    failed: () =>
      h(
        "div",
        { class: "problem" },
        h("p", {}, h("b", {}, "It failed. "), edit.error?.detail ?? "The service said no more."),
      ),
    evaluated: () =>
      h("p", { class: "note" }, "This was a dry run: it would have landed, and was thrown away."),
    superseded: () =>
      h(
        "p",
        { class: "note" },
        "A newer edit stands in its place",
        edit.superseded_by ? [": ", link(`edits/${edit.superseded_by}`, "see it")] : "",
        ". Should that one be taken back, this one is active again.",
      ),
    reverted: () =>
      h(
        "p",
        { class: "note" },
        `It was taken back at version ${edit.reverted_version}: the weights are as if it had never been made. The entry stays in the ledger.`,
      ),
    cancelled: () => h("p", { class: "note" }, "It was cancelled before it landed."),
  }[edit.status]?.();
  const revert =
    (edit.status === "applied" || edit.status === "superseded") &&
    confirmed(
      "Take it back",
      "Take this edit back? It stays in the ledger, and can be written again.",
      "Take it back",
      async () => {
        draw(await ask("DELETE", `/edits/${edit.id}`, { wait: 30 }));
        refresh();
      },
    );
  const landed = edit.version !== null;
  return h(
    "div",
    { class: "course" },
    words,
    h(
      "div",
      { class: "actions" },
      revert,
      edit.status === "failed" && again,
      h("a", { class: "button", href: `#/edits?${formOf(edit)}` }, AGAIN[edit.status] ?? "Write it again"),
      h(
        "a",
        { class: "button", href: `#/ask?${new URLSearchParams({ prompt: filled(edit), beside: "base" })}` },
        "Ask it",
      ),
      h(
        "a",
        {
          class: "button",
          href: `#/traces?${new URLSearchParams({ prompt: filled(edit), subject: edit.subject })}`,
        },
        "Trace it",
      ),
      landed &&
        h(
          "button",
          {
            type: "button",
            on: {
              click: () =>
                download(`/edits/${edit.id}/delta`, "application/octet-stream", `${edit.id}.safetensors`),
            },
          },
          "Its vectors",
        ),
    ),
    trouble,
  );
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.$/, "");
const filled = (edit) => edit.prompt.replace("{}", () => edit.subject);

const json = (value) => (value ? JSON.stringify(value) : null);

/** The address of a form that holds this edit. */
export function formOf(edit) {
  const { prompt, subject, target_new, target_true, objective, method } = edit;
  const given = {
    prompt,
    subject,
    target_new,
    target_true,
    objective,
    method,
    probes: json(edit.probes),
    guard: json(edit.guard),
  };
  return new URLSearchParams(Object.entries(given).filter(([, value]) => value));
}

/** What the model says, before and after. */
function says(edit) {
  const { rewrite } = edit.result;
  if (!rewrite) return null;
  return h(
    "section",
    {},
    h("h2", {}, "What it says"),
    h(
      "div",
      { class: "said-pair" },
      h(
        "p",
        { class: "before" },
        h("span", { class: "tag" }, "before"),
        h("span", { class: "prompt" }, rewrite.prompt),
        h("span", { class: "old" }, rewrite.text_before),
      ),
      h(
        "p",
        { class: "after" },
        h("span", { class: "tag" }, "after"),
        h("span", { class: "prompt" }, rewrite.prompt),
        h("span", { class: "new" }, rewrite.text_after),
      ),
    ),
  );
}

/** Probabilities of both objects on the prompt and on every probe. */
function measured(edit) {
  const { rewrite, paraphrase = [], neighborhood = [] } = edit.result;
  if (!rewrite) return null;
  const two = edit.objective === "write";
  const probes = [
    ...paraphrase.map((probe) => ["paraphrase", probe]),
    ...neighborhood.map((probe) => ["neighbour", probe]),
  ];
  return h(
    "section",
    {},
    h("h2", {}, "How probable"),
    two && shift(rewrite.new, "new", rewrite.before.new, rewrite.after.new),
    shift(
      rewrite.true,
      edit.objective === "amplify" ? "new" : "old",
      rewrite.before.true,
      rewrite.after.true,
    ),
    h(
      "p",
      { class: "legend" },
      h("span", { class: "swatch faint" }),
      "before",
      h("span", { class: "swatch full" }),
      "after",
    ),
    probes.length > 0 && [
      h("h3", {}, "On the probes"),
      table(
        "Probes",
        [["prompt"], ["object"], ["before", true], ["after", true], ["", false]],
        probes.map(([kind, probe]) => row(kind, probe, two)),
      ),
    ],
  );
}

function row(kind, probe, two) {
  const follows = probe.after.new > probe.after.true;
  const [object, which] = kind === "paraphrase" && two ? [probe.new, "new"] : [probe.true, "true"];
  const fine = kind === "paraphrase" ? (two ? follows : true) : two ? !follows : true;
  const word =
    kind === "paraphrase"
      ? fine
        ? "follows"
        : "does not follow"
      : fine
        ? "keeps its answer"
        : "lost its answer";
  return [
    h("span", { class: "prompt" }, probe.prompt, h("small", {}, kind)),
    object,
    percent(probe.before[which]),
    h("b", {}, percent(probe.after[which])),
    two &&
      h(
        "span",
        { class: fine ? "good" : "bad" },
        h("span", { "aria-hidden": "true" }, fine ? "✓ " : "✗ "),
        word,
      ),
  ];
}

const guard = (edit) => edit.result.guard && h("section", {}, h("h2", {}, "The guard"), verdict(edit));

/** Other edits that this one touches. */
function beside(edit) {
  const { conflicts = [], broken = [], supersedes = [], together = [] } = edit.result;
  const links = (ids) => ids.map((id, i) => [i ? ", " : "", link(`edits/${id}`, short(id))]);
  const rows = [
    [
      "Says the same in other words",
      conflicts.map((one, i) => [
        i ? ", " : "",
        link(`edits/${one.edit}`, `${one.prompt} ${one.target_new ?? ""} (${percent(one.probability)})`),
      ]),
    ],
    ["Would cease to hold", links(broken)],
    ["Superseded", links(supersedes)],
    ["Landed together with", links(together)],
    ["Also about this subject", links(edit.related ?? [])],
  ].filter(([, found]) => found.length);
  return rows.length ? h("section", {}, h("h2", {}, "Other edits"), facts(rows)) : null;
}

const short = (id) => `…${id.slice(-6)}`;

function particulars(edit) {
  const { result } = edit;
  const layers = result.layers ?? [];
  return h(
    "section",
    {},
    h("h2", {}, "Particulars"),
    facts([
      ["Method", edit.method],
      ["Layers", layers.join(", ")],
      ["Strength", figure(result.strength)],
      [
        "Steps",
        result.optimisation &&
          `${result.optimisation.steps}, loss ${figure(result.optimisation.first)} → ${figure(result.optimisation.last)}`,
      ],
      [
        "Change of the weight",
        result.norm_ratio &&
          Object.values(result.norm_ratio)
            .map((ratio) => `${percent(ratio)} of its norm`)
            .join(", "),
      ],
      [
        "Perplexity of plain text",
        result.perplexity && `${figure(result.perplexity.before, 4)} → ${figure(result.perplexity.after, 4)}`,
      ],
      ["Seconds", figure(result.seconds)],
      ["Id", h("code", {}, edit.id)],
    ]),
  );
}
