// The heat map of a trace, drawn here from its figures: tokens down, layers across. Every cell can be pointed at and walked to.

import { h, put, s } from "./dom.js";
import { percent, token } from "./format.js";

export const KINDS = {
  hidden: { words: "hidden state", restored: "the hidden state", axis: "layer whose state is restored" },
  mlp: { words: "MLP", restored: "MLP outputs", axis: "layer at the centre of the restored MLPs" },
  attn: { words: "attention", restored: "attention outputs", axis: "layer at the centre of the restored attentions" },
};
const PATHS = { none: "nothing severed", attn: "attention severed", mlp: "MLP severed" };
const ROW = 28;
const GAP = 1.5;
const FOOT = 44;

/** {element, readout}: the map of one kind. `width` is what it may take. */
export function heatmap(trace, kind, width) {
  const { scores, best } = trace.kinds[kind];
  const [first, last] = trace.subject.tokens;
  const labels = trace.tokens.map((text, i) => token(text) + (first <= i && i < last ? "*" : ""));
  const left = Math.min(14 + 7.4 * Math.max(...labels.map((label) => label.length)), width * 0.38);
  const layers = scores[0].length;
  const cell = Math.min((width - left - 8) / layers, 110);
  const height = scores.length * ROW;
  const read = reader(trace, kind);
  const share = (score) => Math.max(0, Math.min(1, (score - trace.low) / Math.max(trace.high - trace.low, 1e-9)));
  const cells = [];
  const rows = scores.map((row, t) => s("g", { role: "row" },
    s("text", { role: "rowheader", x: left - 8, y: t * ROW + ROW / 2, class: first <= t && t < last ? "token subject" : "token" }, clipped(labels[t], left)),
    row.map((score, layer) => {
      const one = s("rect", {
        role: "gridcell", x: left + layer * cell + GAP / 2, y: t * ROW + GAP / 2, width: cell - GAP, height: ROW - GAP, rx: 2,
        tabindex: t === best.token && layer === best.layer ? 0 : -1, "aria-label": `${labels[t]}, layer ${layer}: ${percent(score)}`,
        class: t === best.token && layer === best.layer ? "cell best" : "cell", style: { "--heat": `${(100 * share(score)).toFixed(1)}%` },
        on: { pointerenter: () => read(t, layer), focus: () => read(t, layer), keydown: (event) => walk(event, t, layer) },
      });
      (cells[t] ??= []).push(one);
      return one;
    })));
  const every = Math.ceil(layers / Math.max(1, Math.floor((width - left) / 30)));
  const marks = s("g", { "aria-hidden": "true", class: "axis" },
    [...Array(layers).keys()].filter((layer) => layer % every === 0).map((layer) => s("text", { x: left + (layer + 0.5) * cell, y: height + 16 }, String(layer))),
    s("text", { x: left + (layers * cell) / 2, y: height + 36, class: "name" }, KINDS[kind].axis));
  const band = s("rect", { class: "subject-band", x: 0, y: first * ROW + 1, width: 3, height: (last - first) * ROW - 2, rx: 1.5 });
  const total = left + layers * cell + 4;
  const element = s("svg", { class: `heat ${kind}`, viewBox: `0 0 ${total} ${height + FOOT}`, width: total, height: height + FOOT, role: "grid", "aria-label": `Restoring ${KINDS[kind].restored}: tokens down, layers across` }, band, rows, marks);

  function walk(event, t, layer) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -layer], End: [0, layers - 1 - layer] }[event.key];
    const next = step && cells[t + step[0]]?.[layer + step[1]];
    if (!next) return;
    event.preventDefault();
    cells[t][layer].setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  }
  read(best.token, best.layer);
  return { element, readout: read.element };
}

const clipped = (label, left) => (label.length * 7.2 > left ? `${label.slice(0, Math.max(3, Math.floor(left / 7.4) - 2))}…` : label);

/** What the cell under the pointer, or the focused one, says. */
function reader(trace, kind) {
  const element = h("div", { class: "readout", "aria-live": "off" });
  const read = (t, layer) => {
    const score = trace.kinds[kind].scores[t][layer];
    const effect = trace.total_effect > 0 ? percent(Math.max(0, (score - trace.low) / trace.total_effect)) : "–";
    put(element, h("dl", { class: "facts" },
      h("div", {}, h("dt", {}, "token"), h("dd", {}, `${token(trace.tokens[t])}${trace.subject.tokens[0] <= t && t < trace.subject.tokens[1] ? " (of the subject)" : ""}`)),
      h("div", {}, h("dt", {}, "layer"), h("dd", {}, String(layer))),
      h("div", {}, h("dt", {}, `p(${token(trace.answer.text)})`), h("dd", { class: "strong" }, percent(score))),
      h("div", {}, h("dt", {}, "of the effect"), h("dd", {}, effect))));
  };
  return Object.assign(read, { element });
}

/** The severed variants: what restoring the subject's last token brings back, with a path cut. */
export function severed(trace, width) {
  const { token: at, scores } = trace.severed;
  const paths = Object.keys(PATHS);
  const layers = scores.none.length;
  const [left, top, tall] = [44, 10, 220];
  const most = Math.max(...paths.flatMap((path) => scores[path]), trace.low + 1e-9) - trace.low;
  const y = (value) => top + tall - (tall * Math.max(0, value - trace.low)) / most;
  const group = Math.min((width - left - 8) / layers, 110);
  const bar = (group - 8) / paths.length;
  const element = h("div", { class: "readout" });
  const read = (path, layer) => put(element, h("dl", { class: "facts" },
    h("div", {}, h("dt", {}, "token"), h("dd", {}, token(trace.tokens[at]))), h("div", {}, h("dt", {}, "layer"), h("dd", {}, String(layer))),
    h("div", {}, h("dt", {}, "path"), h("dd", {}, PATHS[path])), h("div", {}, h("dt", {}, `p(${token(trace.answer.text)})`), h("dd", { class: "strong" }, percent(scores[path][layer])))));
  const bars = [...Array(layers).keys()].flatMap((layer) => paths.map((path, i) => {
    const value = scores[path][layer];
    return s("rect", {
      class: `path ${path}`, x: left + layer * group + 4 + i * bar, y: Math.min(y(value), top + tall - 1.5), width: Math.max(bar - 1.5, 1), height: Math.max(top + tall - y(value), 1.5), rx: 1.5,
      tabindex: 0, role: "img", "aria-label": `layer ${layer}, ${PATHS[path]}: ${percent(value)}`, on: { pointerenter: () => read(path, layer), focus: () => read(path, layer) },
    });
  }));
  const lines = [0, 0.5, 1].map((part) => s("g", { class: "axis", "aria-hidden": "true" },
    s("line", { x1: left, x2: left + layers * group, y1: top + tall * (1 - part), y2: top + tall * (1 - part) }),
    s("text", { x: left - 6, y: top + tall * (1 - part), class: "scale" }, percent(trace.low + part * most))));
  const names = s("g", { class: "axis", "aria-hidden": "true" }, [...Array(layers).keys()].map((layer) => s("text", { x: left + (layer + 0.5) * group, y: top + tall + 18 }, String(layer))),
    s("text", { x: left + (layers * group) / 2, y: top + tall + 38, class: "name" }, `layer whose state at ${token(trace.tokens[at])} is restored`));
  const total = left + layers * group + 4;
  read("none", scores.none.indexOf(Math.max(...scores.none)));
  return {
    element: s("svg", { class: "severed", viewBox: `0 0 ${total} ${top + tall + 46}`, width: total, height: top + tall + 46, role: "group", "aria-label": "With paths severed, by layer" }, lines, bars, names),
    readout: element,
    legend: h("p", { class: "legend" }, paths.flatMap((path) => [h("span", { class: `swatch ${path}` }), PATHS[path]])),
  };
}

/** From nothing brought back to all of it. */
export function scale(trace, kind) {
  return h("div", { class: `heat-scale ${kind}`, "aria-hidden": "true" }, h("span", {}, percent(trace.low)), h("span", { class: "ramp" }), h("span", {}, percent(trace.high)));
}
