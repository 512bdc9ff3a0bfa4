// What several pages are made of.

import { announce, h, put, unique } from "./dom.js";
import { percent, phase, placed, token } from "./format.js";
import { Problem, ask, course, download } from "./service.js";

/** The sentence of an edit as this house writes it: the old object scraped, the new one over it. */
export function writing(
  { prompt, subject, objective = "write", target_new: fresh, target_true: old },
  { tag = "p" } = {},
) {
  const [before, middle, after] = placed(prompt, subject);
  const line = h(tag, { class: "writing" }, before, middle && h("b", { class: "subject" }, middle), after);
  if (old)
    line.append(
      " ",
      objective === "amplify" ? h("ins", { class: "over" }, old) : h("del", { class: "under" }, old),
    );
  if (fresh && objective === "write") line.append(" ", h("ins", { class: "over" }, fresh));
  return line;
}

/** An edit as its resource has it: the true object is what was measured where none was named. */
export const told = (edit) => ({
  ...edit,
  target_true: edit.target_true ?? edit.result?.target_true ?? null,
});

const STATUSES = {
  queued: ["…", "waiting"],
  running: ["…", "at work"],
  applied: ["✓", "active"],
  done: ["✓", "done"],
  evaluated: ["✓", "dry run: would have landed"],
  rejected: ["✗", "rejected"],
  failed: ["✗", "failed"],
  cancelled: ["–", "cancelled"],
  superseded: ["⤺", "superseded"],
  reverted: ["↶", "taken back"],
};

/** How a job stands, as a sign and a word. */
export function pill(status) {
  const [sign, word] = STATUSES[status] ?? ["", status];
  return h("span", { class: `pill ${status}` }, h("span", { "aria-hidden": "true" }, `${sign} `), word);
}

/** What went wrong, and what to change. */
export function trouble(error) {
  const reasons =
    error.reasons?.length > 1
      ? h(
          "ul",
          {},
          error.reasons.map((reason) => h("li", {}, reason)),
        )
      : null;
  return h("div", { class: "problem", role: "alert" }, h("p", {}, sentence(error.message)), reasons);
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** What a page says while there is nothing to show yet. */
export const empty = (title, ...words) => h("div", { class: "empty" }, h("h3", {}, title), ...words);

/** Run what a button is for: it rests meanwhile, and trouble is shown in `place`. */
export async function working(button, place, run) {
  put(place);
  button.disabled = true;
  try {
    return await run();
  } catch (error) {
    if (error.name !== "AbortError") put(place, trouble(error));
    return undefined;
  } finally {
    button.disabled = false;
  }
}

/** A labelled field. */
export function field(label, input, hint = null) {
  input.id ||= unique("field");
  const words = hint && h("small", { id: `${input.id}-hint` }, hint);
  if (words) input.setAttribute("aria-describedby", words.id);
  return h("div", { class: "field" }, h("label", { for: input.id }, label), input, words);
}

/** One of a few: radio buttons that look like one control. `options` are [value, words]. */
export function choice(label, options, { value = options[0][0], change = () => {} } = {}) {
  const name = unique("choice");
  const group = h(
    "fieldset",
    { class: "choice" },
    h("legend", {}, label),
    h(
      "div",
      { class: "options" },
      options.map(([one, words]) =>
        h(
          "label",
          {},
          h("input", {
            type: "radio",
            name,
            value: one,
            checked: one === value,
            on: { change: () => change(one) },
          }),
          h("span", {}, words),
        ),
      ),
    ),
  );
  return {
    element: group,
    get value() {
      return group.querySelector("input:checked").value;
    },
    set value(one) {
      const input = [...group.querySelectorAll("input")].find((each) => each.value === one);
      if (input) {
        input.checked = true;
        change(one);
      }
    },
  };
}

/** Head, base or any version. */
export function versions(label, value = "head") {
  const number = h("input", {
    type: "number",
    min: 0,
    step: 1,
    inputmode: "numeric",
    "aria-label": `${label}: number of the version`,
    placeholder: "no.",
  });
  const named = value === "head" || value === "base" ? value : "number";
  if (named === "number") number.value = value;
  const chosen = choice(
    label,
    [
      ["head", "head"],
      ["base", "base"],
      ["number", "version"],
    ],
    {
      value: named,
      change: (one) => {
        number.hidden = one !== "number";
        if (one === "number") number.focus();
      },
    },
  );
  number.hidden = named !== "number";
  chosen.element.querySelector(".options").append(number);
  return {
    element: chosen.element,
    get value() {
      if (chosen.value !== "number") return chosen.value;
      return number.value === "" ? "head" : Number(number.value);
    },
  };
}

/** A button that asks once more, in its own place, before it does what it says. */
export function confirmed(words, question, yes, run) {
  const place = h("span", { class: "confirm" });
  const trouble = h("div");
  const open = h("button", { type: "button", on: { click: () => ask() } }, words);
  const rest = (focus = true) => {
    put(place, open);
    if (focus) open.focus();
  };
  function ask() {
    const go = h(
      "button",
      { type: "button", class: "primary", on: { click: () => working(go, trouble, run) } },
      yes,
    );
    const leave = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        rest();
      }
    };
    put(
      place,
      h(
        "span",
        { class: "asked", role: "group", "aria-label": question, on: { keydown: leave } },
        h("span", { class: "question" }, question),
        go,
        h("button", { type: "button", on: { click: () => rest() } }, "Keep it"),
        trouble,
      ),
    );
    go.focus();
  }
  rest(false);
  return place;
}

/** Follow an open job until its end, showing how far it is; `ended` then gets the resource. */
export async function follow(place, path, what, { signal, ended }) {
  const bar = h("progress", { max: 1, "aria-label": "Progress" });
  const words = h("p", { class: "phase" }, "Waiting for its turn");
  const stop = h(
    "button",
    { type: "button", on: { click: () => working(stop, trouble, () => ask("DELETE", path)) } },
    "Cancel",
  );
  const trouble = h("div");
  put(place, h("section", { class: "live" }, bar, words, stop, trouble));
  let said = "";
  try {
    for await (const event of course(path, { signal })) {
      if (event.name === "end") {
        announce(`${what} has ended: ${event.data.status}.`);
        await ended(event.data);
        return;
      }
      if (event.name !== "progress") continue;
      const { done, total } = event.data;
      words.textContent = sentence(phase(event.data));
      if (total > 0) {
        bar.max = total;
        bar.value = done;
      } else bar.removeAttribute("value");
      if (said !== event.data.phase) announce(sentence(phase({ ...event.data, total: 0 })));
      said = event.data.phase;
    }
  } catch (error) {
    if (!signal.aborted) put(place, problemOf(error));
  }
}

const problemOf = (error) =>
  trouble(error instanceof Problem ? error : new Error(String(error.message ?? error)));

/**
 * A table whose columns are [title, is it a figure]. On a small screen it `stacks` its cells below the first of each row, or
 * scrolls by itself. The roles are said because a table that is laid out otherwise is none to some readers.
 */
export function table(caption, columns, rows, { stacks = true } = {}) {
  const head = columns.map(([title, numeric]) =>
    h("th", { scope: "col", role: "columnheader", class: numeric ? "figure" : null }, title),
  );
  const cell = (content, i) =>
    h(
      "td",
      { role: "cell", class: columns[i][1] ? "figure" : null, data: { label: columns[i][0] } },
      content,
    );
  return h(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    h(
      "table",
      { role: "table", class: stacks ? "stacks" : null },
      h("caption", { class: "unseen" }, caption),
      h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, head)),
      h(
        "tbody",
        { role: "rowgroup" },
        rows.map((row) => h("tr", { role: "row" }, row.map(cell))),
      ),
    ),
  );
}

/** Two probabilities of one object: a faint bar before, a full one after. */
export function shift(name, kind, before, after) {
  const bar = (moment, p) =>
    h("span", { class: `bar ${moment}`, style: { "inline-size": `${Math.max(100 * p, 0.4)}%` } });
  return h(
    "div",
    { class: `shift ${kind}` },
    h("span", { class: "name" }, token(name)),
    h("span", { class: "track", "aria-hidden": "true" }, bar("before", before), bar("after", after)),
    h(
      "span",
      { class: "figures", title: `${before} → ${after}` },
      percent(before),
      h("span", { class: "to" }, " → "),
      h("b", {}, percent(after)),
    ),
  );
}

/** Names with what they say, for a page's small facts. */
export const facts = (pairs) =>
  h(
    "dl",
    { class: "facts" },
    pairs
      .filter(([, value]) => value !== null && value !== undefined && value !== "")
      .map(([name, value]) =>
        h("div", { class: name === "Id" ? "wide" : null }, h("dt", {}, name), h("dd", {}, value)),
      ),
  );

/** A form, and beside it the newest of what it makes: the place of those. */
export function formed(place, title, lead, form) {
  const newest = h("section", { class: "newest" });
  put(
    place,
    h("h1", {}, title),
    h("p", { class: "lead" }, lead),
    h("div", { class: "split" }, form, newest),
  );
  return newest;
}

/** A link to another page of the console. */
export const link = (to, ...words) => h("a", { href: `#/${to}` }, ...words);

/** Everything as the service says it, folded away. */
export const raw = (resource) =>
  h(
    "details",
    { class: "raw" },
    h("summary", {}, "As JSON"),
    h("pre", { tabindex: 0 }, JSON.stringify(resource, null, 2)),
  );

/** Makes buttons that save what is at `path` in one of its forms; trouble is shown in `place`. */
export function saving(path, name, place) {
  return (words, accept, ending) => {
    const save = () => working(button, place, () => download(path, accept, `${name}.${ending}`));
    const button = h("button", { type: "button", on: { click: save } }, words);
    return button;
  };
}

/** A form that Ctrl or Cmd with Enter sends. */
export function submits(form) {
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  return form;
}

/** A text area that is as tall as its text. */
export function growing(area) {
  area.classList.add("growing");
  return area;
}

/** The words that are selected in a text field. */
export const selected = (area) => area.value.slice(area.selectionStart, area.selectionEnd).trim();
