// Components that several pages use.

import { announce, h, replaceChildren, unique } from "./dom.js";
import { percent, phase, splitPrompt, token } from "./format.js";
import { Problem, ask, jobEvents, download } from "./service.js";

/** The sentence of an edit: the old object struck through, then the new one. */
export function factLine(
  { prompt, subject, objective = "write", target_new: fresh, target_true: old },
  { tag = "p" } = {},
) {
  const [before, middle, after] = splitPrompt(prompt, subject);
  const line = h(tag, { class: "writing" }, before, middle && h("b", { class: "subject" }, middle), after);
  if (old)
    line.append(
      " ",
      objective === "amplify" ? h("ins", { class: "over" }, old) : h("del", { class: "under" }, old),
    );
  if (fresh && objective === "write") line.append(" ", h("ins", { class: "over" }, fresh));
  return line;
}

/** Return an edit with its true object: that of the result if the request names none. */
export const withTrueObject = (edit) => ({
  ...edit,
  target_true: edit.target_true ?? edit.result?.target_true ?? null,
});

/** The sign and the word of each status. */
export const STATUSES = {
  queued: ["…", "queued"],
  running: ["…", "running"],
  applied: ["✓", "active"],
  done: ["✓", "done"],
  dry_run_passed: ["✓", "dry run passed"],
  rejected: ["✗", "rejected"],
  failed: ["✗", "failed"],
  cancelled: ["–", "cancelled"],
  superseded: ["⤺", "superseded"],
  reverted: ["↶", "reverted"],
};

/** The status of a job as a sign and a word. */
export function pill(status) {
  const [sign, word] = STATUSES[status] ?? ["", status];
  return h("span", { class: `pill ${status}` }, h("span", { "aria-hidden": "true" }, `${sign} `), word);
}

/** An error message. */
export function errorBox(error) {
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

/** The content of an empty list. */
export const empty = (title, ...words) => h("div", { class: "empty" }, h("h3", {}, title), ...words);

/** An error that the value of one field causes. */
export class FieldError extends Error {
  constructor(input, message) {
    super(message);
    this.input = input;
  }
}

/** The fields of a form whose names differ from the field of the service. */
const FIELD_NAMES = { hparams: "layers", try_layers: "layers", messages: "prompt" };

/** Return the field that an error is about: its own, or the one that the service names first. */
function fieldOf(error, form) {
  if (error instanceof FieldError) return error.input;
  const name = error.errors?.[0]?.field?.split(".")[0];
  const found = name && form?.elements.namedItem(FIELD_NAMES[name] ?? name);
  return found instanceof HTMLElement ? found : null;
}

/** Show an error below its field, which gets the focus; without a field, in `place`. */
function showError(error, place) {
  const input = fieldOf(error, place.closest("form"));
  const box = input?.closest(".field");
  if (!box) {
    replaceChildren(place, errorBox(error));
    return;
  }
  const words = h("p", { class: "field-error", role: "alert", id: unique("error") }, sentence(error.message));
  box.append(words);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", [input.getAttribute("aria-describedby"), words.id].filter(Boolean).join(" "));
  for (let outer = input.closest("details"); outer; outer = outer.parentElement.closest("details")) outer.open = true;
  input.focus();
}

/** Remove what `showError` showed in the form of `place`. */
function clearErrors(place) {
  replaceChildren(place);
  for (const words of place.closest("form")?.querySelectorAll(".field-error") ?? []) {
    const input = words.parentElement.querySelector("[aria-invalid]");
    input?.removeAttribute("aria-invalid");
    const rest = (input?.getAttribute("aria-describedby") ?? "").split(" ").filter((id) => id !== words.id);
    if (rest.length) input?.setAttribute("aria-describedby", rest.join(" "));
    else input?.removeAttribute("aria-describedby");
    words.remove();
  }
}

/** Run an action while its button is disabled. An error is shown at its field, or else in `place`. */
export async function whileDisabled(button, place, run) {
  clearErrors(place);
  button.disabled = true;
  try {
    return await run();
  } catch (error) {
    if (error.name !== "AbortError") showError(error, place);
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

/** A group of radio buttons. `options` are [value, label]. */
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

/** A choice of head, base, or a version by its number or name. */
export function versions(label, value = "head") {
  const other = h("input", {
    type: "text",
    "aria-label": `${label}: number or name of the version`,
    placeholder: "no. or name",
    spellcheck: "false",
    autocomplete: "off",
    class: "short",
  });
  const named = value === "head" || value === "base" ? value : "other";
  if (named === "other") other.value = value;
  const chosen = choice(
    label,
    [
      ["head", "head"],
      ["base", "base"],
      ["other", "version"],
    ],
    {
      value: named,
      change: (one) => {
        other.hidden = one !== "other";
        if (one === "other") other.focus();
      },
    },
  );
  other.hidden = named !== "other";
  chosen.element.querySelector(".options").append(other);
  return {
    element: chosen.element,
    get value() {
      if (chosen.value !== "other") return chosen.value;
      const text = other.value.trim();
      if (!text) return "head";
      return /^\d+$/.test(text) ? Number(text) : text;
    },
  };
}

/** Links to the views of a page, with the present one marked. `views` are [address, words]. */
export const viewLinks = (label, views, present) =>
  h(
    "nav",
    { class: "views", "aria-label": label },
    views.map(([address, words]) =>
      h("a", { href: `#/${address}`, "aria-current": address === present ? "page" : null }, words),
    ),
  );

/** A button that asks for confirmation in its place. */
export function confirmButton(words, question, yes, run) {
  const place = h("span", { class: "confirm" });
  const errorBox = h("div");
  const open = h("button", { type: "button", on: { click: () => ask() } }, words);
  const rest = (focus = true) => {
    replaceChildren(place, open);
    if (focus) open.focus();
  };
  function ask() {
    const go = h(
      "button",
      { type: "button", class: "primary", on: { click: () => whileDisabled(go, errorBox, run) } },
      yes,
    );
    const leave = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        rest();
      }
    };
    replaceChildren(
      place,
      h(
        "span",
        { class: "asked", role: "group", "aria-label": question, on: { keydown: leave } },
        h("span", { class: "question" }, question),
        go,
        h("button", { type: "button", on: { click: () => rest() } }, "Cancel"),
        errorBox,
      ),
    );
    go.focus();
  }
  rest(false);
  return place;
}

/** Show the progress of an open job until it ends, then call `ended` with the resource. */
export async function follow(place, path, what, { signal, ended }) {
  const bar = h("progress", { max: 1, "aria-label": "Progress" });
  const words = h("p", { class: "phase" }, "Queued");
  const stop = h(
    "button",
    { type: "button", on: { click: () => whileDisabled(stop, errorBox, () => ask("DELETE", path)) } },
    "Cancel",
  );
  const errorBox = h("div");
  replaceChildren(place, h("section", { class: "live" }, bar, words, stop, errorBox));
  let said = "";
  try {
    for await (const event of jobEvents(path, { signal })) {
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
    if (!signal.aborted) replaceChildren(place, problemBox(error));
  }
}

const problemBox = (error) =>
  errorBox(error instanceof Problem ? error : new Error(String(error.message ?? error)));

/**
 * A table whose columns are [title, whether it is numeric]. On a small screen it stacks the cells of a row, or scrolls. The
 * ARIA roles are explicit because some screen readers drop those of a table with another layout.
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

/** The probability of an object before (faint bar) and after (full bar). */
export function probabilityShift(name, kind, before, after) {
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

/** A list of names and values. Empty values are left out. */
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

/** Lay out a form with a list beside it; return the element of the list. */
export function formPage(place, title, lead, form) {
  const newest = h("section", { class: "newest" });
  replaceChildren(
    place,
    h("h1", {}, title),
    h("p", { class: "lead" }, lead),
    h("div", { class: "split" }, form, newest),
  );
  return newest;
}

/** A link to another page of the console. */
export const link = (to, ...words) => h("a", { href: `#/${to}` }, ...words);

/** The JSON of a resource, collapsed. */
export const raw = (resource) =>
  h(
    "details",
    { class: "raw" },
    h("summary", {}, "As JSON"),
    h("pre", { tabindex: 0 }, JSON.stringify(resource, null, 2)),
  );

/** Return a function that makes download buttons for `path`. Errors are shown in `place`. */
export function saveButtons(path, name, place) {
  return (words, accept, ending) => {
    const save = () => whileDisabled(button, place, () => download(path, accept, `${name}.${ending}`));
    const button = h("button", { type: "button", on: { click: save } }, words);
    return button;
  };
}

/** Submit a form on Ctrl+Enter or Cmd+Enter. */
export function submitOnCtrlEnter(form) {
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  return form;
}

/** A text area that grows with its text. */
export function autoGrow(area) {
  area.classList.add("growing");
  return area;
}

/** Return the selected text of a text field. */
export const selectedText = (area) => area.value.slice(area.selectionStart, area.selectionEnd).trim();
