// Reading a drawing: what is pointed at or focused is said beside it, and arrow keys walk from one thing to the next.

import { h, put } from "./dom.js";

/** A place beside a drawing, and `read`, which fills it with [name, words]; the third is the figure that it is about. */
export function readout() {
  const element = h("div", { class: "readout" });
  const read = (pairs) =>
    put(
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

/** Let rows of things be walked. One of them, at first `start`, is where Tab comes in; `say` tells where one is. */
export function walking(rows, say, start) {
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
