// The heat map of a trace: tokens down, layers across. Cells can be read by pointer and keyboard.

import { h, s } from "./dom.js";
import { percent, token } from "./format.js";
import { readout, keyboardGrid } from "./readout.js";

export const KINDS = {
  hidden: { words: "hidden state", restored: "the hidden state", axis: "layer whose state is restored" },
  mlp: { words: "MLP", restored: "MLP outputs", axis: "centre of the restored MLPs" },
  attn: { words: "attention", restored: "attention outputs", axis: "centre of restored attention" },
};
const [ROW, GAP, FOOT] = [28, 1.5, 44]; // pixels: of a row, between cells, below the map
const [LETTER, WIDEST] = [7.4, 110]; // of a letter of a label, and of a cell at most

/**
 * Return the map of one kind, at most `width` pixels wide, and the readout of its current cell. Several maps can `share`
 * a readout.
 */
export function heatmap(trace, kind, width, share = readout()) {
  const sheet = layout(trace, kind, width);
  const { element, read } = share;
  const { best } = trace.kinds[kind];
  const say = (t, layer) => read(words(trace, kind, t, layer));
  const cells = sheet.scores.map((scores, t) => scores.map((score, layer) => cell(sheet, score, t, layer)));
  keyboardGrid(cells, say, [best.token, best.layer]);
  const rows = cells.map((row, t) => s("g", { role: "row" }, label(sheet, t), row));
  const size = { width: sheet.left + sheet.layers * sheet.cell + 4, height: sheet.height + FOOT };
  const map = s(
    "svg",
    {
      ...size,
      class: `heat ${kind}`,
      viewBox: `0 0 ${size.width} ${size.height}`,
      role: "grid",
      "aria-label": `Restoring ${KINDS[kind].restored}: tokens down, layers across`,
    },
    band(sheet),
    rows,
    axis(sheet, KINDS[kind].axis),
  );
  return { element: map, readout: element };
}

function layout(trace, kind, width) {
  const corrupted = mentions(trace);
  const { scores } = trace.kinds[kind];
  const labels = trace.tokens.map((text, t) => token(text) + (within(corrupted, t) ? "*" : ""));
  const left = Math.min(14 + LETTER * Math.max(...labels.map((text) => text.length)), 0.38 * width);
  const layers = scores[0].length;
  const whole = Math.max(highest(trace) - trace.low, 1e-9);
  return {
    scores,
    labels,
    left,
    layers,
    corrupted,
    cell: Math.min((width - left - 8) / layers, WIDEST),
    height: scores.length * ROW,
    share: (score) => Math.max(0, Math.min(1, (score - trace.low) / whole)),
  };
}

/** The upper end of the scale of all maps: restoring a state can give more than the model without noise. */
const highest = ({ high, kinds }) => Math.max(high, ...Object.values(kinds).flatMap(({ scores }) => scores.flat()));

function cell(sheet, score, t, layer) {
  return s("rect", {
    role: "gridcell",
    class: "cell",
    x: sheet.left + layer * sheet.cell + GAP / 2,
    y: t * ROW + GAP / 2,
    width: sheet.cell - GAP,
    height: ROW - GAP,
    rx: 2,
    "aria-label": `${sheet.labels[t]}, layer ${layer}: ${percent(score)}`,
    style: { "--heat": `${(100 * sheet.share(score)).toFixed(1)}%` },
  });
}

function label({ labels, left, corrupted }, t) {
  const subject = within(corrupted, t);
  const given = {
    role: "rowheader",
    x: left - 8,
    y: (t + 0.5) * ROW,
    class: subject ? "token subject" : "token",
  };
  const most = Math.floor(left / LETTER) - 1;
  const text = labels[t];
  return s("text", given, text.length > most ? `${text.slice(0, Math.max(3, most - 1))}…` : text);
}

/** The token ranges of the corrupted mentions of the subject. */
const mentions = ({ subject }) => subject.mentions ?? [subject.tokens];

const within = (ranges, t) => ranges.some(([first, last]) => first <= t && t < last);

/** A mark beside the tokens of each corrupted mention of the subject. */
function band({ corrupted }) {
  return s(
    "g",
    {},
    corrupted.map(([first, last]) =>
      s("rect", {
        class: "subject-band",
        x: 0,
        y: first * ROW + 1,
        width: 3,
        height: (last - first) * ROW - 2,
        rx: 1.5,
      }),
    ),
  );
}

/** The layer axis: as many labels as fit, and its title. */
function axis({ left, layers, cell, height }, name) {
  const every = Math.ceil(30 / cell);
  const numbers = Array.from({ length: layers }, (_, layer) => layer).filter((layer) => layer % every === 0);
  return s(
    "g",
    { class: "axis", "aria-hidden": "true" },
    numbers.map((layer) => s("text", { x: left + (layer + 0.5) * cell, y: height + 16 }, String(layer))),
    s("text", { x: left + (layers * cell) / 2, y: height + 36, class: "name" }, name),
  );
}

function words(trace, kind, t, layer) {
  const score = trace.kinds[kind].scores[t][layer];
  const effect = trace.total_effect > 0 ? (score - trace.low) / trace.total_effect : null;
  return [
    ["token", token(trace.tokens[t]) + (within(mentions(trace), t) ? " (of the subject)" : "")],
    ["layer", String(layer)],
    [`p(${token(trace.answer.text)})`, percent(score)],
    ["of the effect", `${percent(effect === null ? null : Math.max(0, effect))}${effect > 1 ? ", more than without noise" : ""}`],
  ];
}

/** The color scale of all maps, from the corrupted probability to the highest of any cell. */
export function scale(trace, kind) {
  const ends = [trace.low, highest(trace)].map((p) => h("span", {}, percent(p)));
  return h(
    "div",
    { class: `heat-scale ${kind}`, "aria-hidden": "true" },
    ends[0],
    h("span", { class: "ramp" }),
    ends[1],
  );
}
