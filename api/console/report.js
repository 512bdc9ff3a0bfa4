// One edit: progress while it runs, then its measurements.

import { h, replaceChildren } from "./dom.js";
import { figure, duration, percent, plural, timeAgo, actorName } from "./format.js";
import { guardVerdict } from "./guard.js";
import { queryOf, statedPrompt } from "./conversation.js";
import { confirmButton, facts, follow, link, pill, raw, probabilityShift, table, withTrueObject, whileDisabled, factLine } from "./components.js";
import { ask, download, get, post } from "./service.js";
import { refresh } from "./status.js";

export async function show(place, { id, signal }) {
  const path = `/edits/${encodeURIComponent(id)}`;
  draw(await get(path, { signal }));

  function draw(edit) {
    const open = edit.status === "queued" || edit.status === "running";
    const live = h("div");
    replaceChildren(
      place,
      h("p", { class: "crumbs" }, link("edits", "Edits")),
      h(
        "header",
        { class: "title" },
        h("h1", { class: "unseen" }, `${edit.subject}: ${edit.status}`),
        factLine({ ...withTrueObject(edit), prompt: statedPrompt(edit) }),
        h(
          "p",
          { class: "meta" },
          pill(edit.status),
          edit.dry_run && edit.status !== "dry_run_passed" && h("span", { class: "pill" }, "dry run"),
          h("span", {}, lines(edit)),
        ),
      ),
      open ? live : [jobEvents(edit, draw), edit.result && sections(edit), raw(edit)],
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

/** Return the measurements; the guard comes first if the edit was rejected. */
function sections(edit) {
  const found = [textSection(edit), sideEffectSection(edit), probabilitySection(edit)];
  const judged = guard(edit);
  return [
    edit.status === "rejected" ? [judged, ...found] : [...found, judged],
    otherEdits(edit),
    detailSection(edit),
  ];
}

function lines(edit) {
  const said = [actorName(edit.actor), timeAgo(edit.created)];
  if (edit.version !== null) said.push(`version ${edit.version}`);
  if (edit.reverted_version !== null) said.push(`reverted at version ${edit.reverted_version}`);
  if (edit.started && edit.ended) said.push(duration(edit.started, edit.ended));
  return said.join(" · ");
}

const AGAIN = {
  applied: "Similar edit",
  rejected: "Change and try again",
  dry_run_passed: "Apply this edit",
};

/** Return the outcome and the available actions. */
function jobEvents(edit, draw) {
  const errorBox = h("div");
  const again = h(
    "button",
    {
      type: "button",
      class: "primary",
      on: {
        click: () =>
          whileDisabled(again, errorBox, async () => {
            await post(`/jobs/${edit.id}/retry`);
            draw(await get(`/edits/${edit.id}`));
          }),
      },
    },
    "Retry",
  );
  const words = {
    rejected: () =>
      h(
        "div",
        { class: "problem" },
        h(
          "p",
          {},
          h("b", {}, "The edit was not applied. "),
          capital(edit.result?.reason ?? edit.error?.detail ?? ""),
          ".",
        ),
      ),
    failed: () =>
      h(
        "div",
        { class: "problem" },
        h("p", {}, h("b", {}, "The edit failed. "), edit.error?.detail ?? "No further details."),
      ),
    dry_run_passed: () =>
      h("p", { class: "note" }, "This dry run passed the guard. It was not applied."),
    superseded: () =>
      h(
        "p",
        { class: "note" },
        "A newer edit of the same fact supersedes this one",
        edit.superseded_by ? [": ", link(`edits/${edit.superseded_by}`, "newer edit")] : "",
        ". If the newer edit is reverted, this one becomes active again.",
      ),
    reverted: () =>
      h(
        "p",
        { class: "note" },
        `Reverted at version ${edit.reverted_version}: the weights no longer contain it. The ledger keeps the entry.`,
      ),
    cancelled: () => h("p", { class: "note" }, "The edit was cancelled before it was applied."),
  }[edit.status]?.();
  const revert =
    (edit.status === "applied" || edit.status === "superseded") &&
    confirmButton(
      "Revert",
      "Revert this edit? The ledger keeps it, and it can be applied again.",
      "Revert",
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
      h("a", { class: "button", href: `#/edits?${formOf(edit)}` }, AGAIN[edit.status] ?? "Apply again"),
      h(
        "a",
        { class: "button", href: edit.messages ? `#/chat?${new URLSearchParams({ q: questionOf(edit) })}` : `#/generate?${new URLSearchParams({ prompt: filled(edit), beside: "base" })}` },
        edit.messages ? "Chat" : "Generate",
      ),
      h(
        "a",
        {
          class: "button",
          href: `#/traces?${new URLSearchParams({ ...queryOf(edit), subject: edit.subject })}`,
        },
        "Trace",
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
          "Download factors",
        ),
    ),
    errorBox,
  );
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1).replace(/\.$/, "");
const filled = (edit) => statedPrompt(edit).replaceAll("{}", () => edit.subject);

const questionOf = (edit) => queryOf(edit).prompt.replaceAll("{}", () => edit.subject);

const json = (value) => (value ? JSON.stringify(value) : null);

/** What can stand between a sentence and its object, by the names of the edit form. */
export const SEPARATORS = { space: " ", none: "" };

/** Return the query of the edit form with the fields of this edit. */
export function formOf(edit) {
  const { subject, target_new, target_true, objective, method } = edit;
  const given = {
    ...queryOf(edit),
    subject,
    target_new,
    target_true,
    form: edit.form,
    separator: Object.keys(SEPARATORS).find((name) => SEPARATORS[name] === edit.separator),
    objective,
    method,
    layers: edit.hparams?.layers?.join(", "),
    probes: json(edit.probes),
    guard: json(edit.guard),
  };
  return new URLSearchParams(Object.entries(given).filter(([, value]) => value));
}

/** Return the generated text before and after the edit. */
function textSection(edit) {
  const { rewrite } = edit.result;
  if (!rewrite) return null;
  return h(
    "section",
    {},
    h("h2", {}, "Generated text"),
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

/** Return the other prompts whose answers the edit changes. Reports of earlier versions have none. */
function sideEffectSection(edit) {
  const { side_effects: found, also_changed: changes = [], description_kl: description } = edit.result;
  if (!found) return null;
  const kept = found.neighbors - found.changed;
  return h(
    "section",
    {},
    h("h2", {}, "Side effects"),
    h(
      "p",
      { class: "note" },
      found.measured
        ? `${kept} of ${plural(found.neighbors, "neighbour")} ${kept === 1 ? "keeps its answer" : "keep their answers"}.`
        : `Not measured: ${found.reason}.`,
    ),
    typeof description?.after === "number" &&
      h(
        "p",
        { class: "note" },
        `The description of the subject is ${description.after.toFixed(2)} nats per token from that of the base model; it was `,
        `${description.before.toFixed(2)} before.`,
      ),
    changes.length > 0 && [
      h("h3", {}, "Also changed"),
      table(
        "Also changed",
        [["prompt"], ["before"], ["after"]],
        changes.map(({ prompt, before, after }) => [
          h("span", { class: "prompt" }, prompt),
          before,
          h("b", {}, after || "no answer"),
        ]),
      ),
    ],
  );
}

/** Return the probabilities of both objects for the prompt and every probe. */
function probabilitySection(edit) {
  const { rewrite, paraphrase = [], neighborhood = [], also_changed: changes = [] } = edit.result;
  const changed = new Set(changes.map(({ prompt }) => prompt));
  if (!rewrite) return null;
  const two = edit.objective === "write";
  const probes = [
    ...paraphrase.map((probe) => ["paraphrase", probe]),
    ...neighborhood.map((probe) => ["neighbour", probe]),
  ];
  return h(
    "section",
    {},
    h("h2", {}, "Probabilities"),
    two && probabilityShift(rewrite.new, "new", rewrite.before.new, rewrite.after.new),
    probabilityShift(
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
      h("h3", {}, "Probes"),
      table(
        "Probes",
        [["prompt"], ["object"], ["before", true], ["after", true], ["", false]],
        probes.map(([kind, probe]) => row(kind, probe, two, changed.has(probe.prompt))),
      ),
    ],
  );
}

/**
 * Return a row of the table of probes. A paraphrase is judged by what the model says after it, and a neighbour that the
 * service found by whether its answer is `changed`. Reports of earlier versions have no texts: they compare probabilities.
 */
function row(kind, probe, two, changed) {
  const given = (probe.source ?? "request") === "request";
  const prefersNew = probe.after.new > probe.after.true;
  const follows = kind === "paraphrase" ? (probe.follows ?? prefersNew) : given ? prefersNew : changed;
  const [object, which] = kind === "paraphrase" && two ? [probe.new, "new"] : [probe.true, "true"];
  const fine = kind === "paraphrase" ? (two ? follows : true) : two ? !follows : true;
  const said = probe.text_after === undefined ? "" : `: the model says “${probe.text_after.trim() || "nothing"}”`;
  const word =
    kind === "paraphrase"
      ? fine
        ? "follows"
        : "does not follow"
      : fine
        ? "preserved"
        : "changed";
  return [
    h("span", { class: "prompt" }, probe.prompt, h("small", {}, kind, said)),
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

const guard = (edit) => edit.result.guard && h("section", {}, h("h2", {}, "Guard"), guardVerdict(edit));

/** Return the other edits that this one affects. */
function otherEdits(edit) {
  const { conflicts = [], regressed_edits = [], supersedes = [], batched_with = [] } = edit.result;
  const links = (ids) => ids.map((id, i) => [i ? ", " : "", link(`edits/${id}`, short(id))]);
  const rows = [
    [
      "Conflicts with",
      conflicts.map((one, i) => [
        i ? ", " : "",
        link(`edits/${one.edit}`, `${one.prompt} ${one.target_new ?? ""} (${percent(one.probability)})`),
      ]),
    ],
    ["Regressed edits", links(regressed_edits)],
    ["Supersedes", links(supersedes)],
    ["In the same batch", links(batched_with)],
    ["Other edits of this subject", links(edit.related ?? [])],
  ].filter(([, found]) => found.length);
  return rows.length ? h("section", {}, h("h2", {}, "Other edits"), facts(rows)) : null;
}

const short = (id) => `…${id.slice(-6)}`;

/** Say how well the gate of a gated edit distinguishes its subject. */
function gateText(gate) {
  const source = gate.nearest_source.trim();
  const other = source.length > 40 ? `${source.slice(0, 39)}…` : source;
  return (
    `the subject is ${gate.is_apart ? "" : "not "}distinguished from others: its keys agree to ${figure(gate.agreement)}, ` +
    `the nearest other one (“${other}”) comes to ${figure(gate.nearest)}; it acts above ${figure(gate.threshold)}` +
    (gate.is_apart ? "" : ". Compare the same edit in the weights, or raise gate_threshold")
  );
}

/** Say at which tokens of its prompt a gated edit acts, and in how many of the other probes it does. */
function openingsText(result) {
  const tokens = (result.rewrite.opened ?? []).map((token) => `“${token.trim()}”`).join(", ");
  const counts = [
    ["paraphrases", result.paraphrase],
    ["neighbors", result.neighborhood],
  ]
    .filter(([, probes]) => probes.length)
    .map(([name, probes]) => `${probes.filter((p) => p.opened?.length).length} of ${probes.length} ${name}`);
  return [`${tokens || "no token"} of its prompt`, ...counts].join(", ");
}

/** Say how far from its key the entry of a codebook acts. */
function ballText(ball) {
  const acts = ball.radius === null ? "in the ball of an earlier edit" : `within ${figure(ball.radius)} of its key`;
  const nearest =
    ball.nearest === null ? "" : `; the nearest other key is ${figure(ball.nearest)} away, that of ${ball.nearest_edit}`;
  return `it acts ${acts} (radius ${figure(ball.first_radius)})${nearest}`;
}

function detailSection(edit) {
  const { result } = edit;
  const layers = result.layers ?? [];
  return h(
    "section",
    {},
    h("h2", {}, "Details"),
    facts([
      ["Method", edit.method],
      ["Batch", edit.batch && link(`ledger/edits?batch=${edit.batch}`, edit.batch)],
      ["Layers", layers.join(", ")],
      ["Strength", figure(result.strength)],
      [
        "Steps",
        result.optimisation &&
          `${result.optimisation.steps}, loss ${figure(result.optimisation.first)} → ${figure(result.optimisation.last)}`,
      ],
      [
        "Norm of the weight change",
        result.norm_ratio && !Object.keys(result.norm_ratio).length
          ? "none: the edit is looked up"
          : result.norm_ratio &&
            Object.values(result.norm_ratio)
              .map((ratio) => `${percent(ratio)} of the weight`)
              .join(", "),
      ],
      ["Gate", result.gate && gateText(result.gate)],
      ["Acts at", result.gate && openingsText(result)],
      ["Codebook", result.ball && ballText(result.ball)],
      [
        "Perplexity of reference text",
        result.perplexity && `${figure(result.perplexity.before, 4)} → ${figure(result.perplexity.after, 4)}`,
      ],
      ["Seconds", figure(result.seconds)],
      ["Id", h("code", {}, edit.id)],
    ]),
  );
}
