// Severed traces: the effect of restoring the subject's last token, by layer, with the MLP or attention path severed.

import { h, s } from "./dom.js";
import { percent, token } from "./format.js";
import { readout, keyboardGrid } from "./readout.js";

const PATHS = { none: "nothing severed", attn: "attention severed", mlp: "MLP severed" };
const NAMES = Object.keys(PATHS);
const [LEFT, TOP, TALL, FOOT] = [44, 10, 220, 46]; // pixels
const [WIDEST, LEAST] = [110, 1.5]; // of a layer's group, and of a bar that is almost nothing

/** Return the bars by layer and path, the readout of the current bar, and the legend. */
export function severed(trace, width) {
  const { token: at, scores } = trace.severed;
  const sheet = layout(trace, width);
  const { element, read } = readout();
  const bars = NAMES.map((path, i) => scores[path].map((value, layer) => bar(sheet, path, i, layer, value)));
  const say = (i, layer) =>
    read([
      ["path", PATHS[NAMES[i]]],
      ["layer", String(layer)],
      [`p(${token(trace.answer.text)})`, percent(scores[NAMES[i]][layer])],
      ["token", token(trace.tokens[at])],
    ]);
  keyboardGrid(bars, say, [0, scores.none.indexOf(Math.max(...scores.none))]);
  const size = { width: LEFT + sheet.layers * sheet.group + 4, height: TOP + TALL + FOOT };
  const drawn = s(
    "svg",
    {
      ...size,
      class: "severed",
      viewBox: `0 0 ${size.width} ${size.height}`,
      role: "group",
      "aria-label": "With paths severed, by layer",
    },
    grid(sheet),
    bars,
    axis(sheet, `layer whose state at ${token(trace.tokens[at])} is restored`),
  );
  return { element: drawn, readout: element, legend: legend() };
}

function layout(trace, width) {
  const { scores } = trace.severed;
  const layers = scores.none.length;
  const most = Math.max(...NAMES.flatMap((path) => scores[path]), trace.low + 1e-9) - trace.low;
  const y = (value) => TOP + TALL * (1 - Math.max(0, value - trace.low) / most);
  return { layers, most, y, low: trace.low, group: Math.min((width - LEFT - 8) / layers, WIDEST) };
}

function bar({ group, y }, path, i, layer, value) {
  const wide = (group - 8) / NAMES.length;
  const top = Math.min(y(value), TOP + TALL - LEAST);
  return s("rect", {
    class: `path ${path}`,
    x: LEFT + layer * group + 4 + i * wide,
    y: top,
    width: Math.max(wide - LEAST, 1),
    height: TOP + TALL - top,
    rx: 1.5,
    role: "img",
    "aria-label": `layer ${layer}, ${PATHS[path]}: ${percent(value)}`,
  });
}

function grid({ layers, group, most, low, y }) {
  return [0, 0.5, 1].map((part) => {
    const value = low + part * most;
    return s(
      "g",
      { class: "axis", "aria-hidden": "true" },
      s("line", { x1: LEFT, x2: LEFT + layers * group, y1: y(value), y2: y(value) }),
      s("text", { x: LEFT - 6, y: y(value), class: "scale" }, percent(value)),
    );
  });
}

function axis({ layers, group }, name) {
  const numbers = Array.from({ length: layers }, (_, layer) => layer).filter(
    (layer) => layer % Math.ceil(26 / group) === 0,
  );
  return s(
    "g",
    { class: "axis", "aria-hidden": "true" },
    numbers.map((layer) => s("text", { x: LEFT + (layer + 0.5) * group, y: TOP + TALL + 18 }, String(layer))),
    s("text", { x: LEFT + (layers * group) / 2, y: TOP + TALL + 38, class: "name" }, name),
  );
}

const legend = () =>
  h(
    "p",
    { class: "legend" },
    NAMES.flatMap((path) => [h("span", { class: `swatch ${path}` }), PATHS[path]]),
  );
