// @ts-check
// Reading values from a chart by pointer, focus and arrow keys.

import { h, replaceChildren } from "./dom.js";

/** An element for values, and `read`, which fills it with [name, value]; the third is emphasized. */
export function readout() {
  const element = h("div", { class: "readout" });
  const read = (pairs) =>
    replaceChildren(
      element,
      h(
        "dl",
        { class: "facts" },
        pairs.map(([name, words], i) =>
          h("div", {}, h("dt", {}, name), h("dd", { class: i === 2 ? "strong" : null }, words)),
        ),
      ),
    );
  return { element, read };
}

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** Make rows of elements navigable with arrow keys, starting at `start`. `say(y, x)` is called for the current one. */
export function keyboardGrid(rows, say, start) {
  rows.forEach((row, y) => row.forEach((one, x) => arrive(one, y, x)));
  say(...start);

  function arrive(one, y, x) {
    one.setAttribute("tabindex", y === start[0] && x === start[1] ? 0 : -1);
    one.addEventListener("pointerenter", () => say(y, x));
    one.addEventListener("focus", () => say(y, x));
    one.addEventListener("keydown", (event) => {
      const [down, right] = STEPS[event.key] ??
        { Home: [0, -x], End: [0, rows[y].length - 1 - x] }[event.key] ?? [0, 0];
      const next = rows[y + down]?.[x + right];
      if (!next || next === one) return;
      event.preventDefault();
      one.setAttribute("tabindex", -1);
      next.setAttribute("tabindex", 0);
      next.focus();
    });
  }
}
