// Many edits: a CSV table, checked line by line with what the model says now, and applied as one batch.

import { announce, h, replaceChildren } from "./dom.js";
import { plural, splitPrompt } from "./format.js";
import { statedPrompt } from "./conversation.js";
import { batchLink, outcome } from "./edit_list.js";
import { confirmButton, factLine, field, link, pill, table, whileDisabled } from "./components.js";
import { all, ask, post } from "./service.js";
import { disableUntilServing } from "./status.js";

const PROMPTS_AT_ONCE = 16; //: whose present answers one request asks for
const PORTION = 250; //: edits of one request: less than may wait at once
const POLL_MS = 1000;
const EXAMPLE = `subject,prompt,target_new,target_true
Eiffel Tower,The {} is located in the city of,Rome,Paris
Louvre,The {} is located in the city of,Madrid,Paris
`;

export async function show(place, { signal }) {
  const text = h("textarea", {
    name: "csv",
    rows: 8,
    required: true,
    spellcheck: "false",
    placeholder: "subject,prompt,target_new\nEiffel Tower,The {} is located in the city of,Rome",
  });
  const file = h("input", { type: "file", accept: ".csv,.tsv,text/csv,text/tab-separated-values" });
  const batch = h("input", {
    type: "text",
    name: "batch",
    pattern: "[A-Za-z0-9][A-Za-z0-9._\\-]{0,63}",
    placeholder: "corrections-2026-11",
    spellcheck: "false",
    autocomplete: "off",
  });
  const errorBox = h("div");
  const check = h("button", { class: "primary" }, "Check");
  const checked = h("section", { class: "checked", "aria-live": "polite" });
  const sheet = h(
    "form",
    { class: "sheet drop", on: { submit, dragover: over, dragleave: left, drop: dropped } },
    field("Table as CSV", text, "a header with subject, prompt and target_new; target_true, paraphrases and neighbours if wanted"),
    h("div", { class: "grid two" }, field("or a file, which can be dropped here", file), field("Batch", batch, "the name that all edits get")),
    errorBox,
    h(
      "div",
      { class: "actions" },
      check,
      h("button", { type: "button", on: { click: () => take(EXAMPLE, "example") } }, "Use example"),
    ),
  );
  file.addEventListener("change", () => read(file.files[0]));
  text.addEventListener("input", () => replaceChildren(checked)); // what was checked is another table
  disableUntilServing(check, sheet, "edit", signal);
  replaceChildren(
    place,
    h("p", { class: "crumbs" }, link("edits", "Edit a fact")),
    h("h1", {}, "Edit a table of facts"),
    h("p", { class: "lead" }, "Every line is checked before anything is edited. All edits get the name of one batch, and can be reverted together."),
    sheet,
    checked,
  );

  async function read(one) {
    if (one) take(await one.text(), one.name.replace(/\.[^.]*$/, ""));
  }
  function take(csv, name) {
    text.value = csv;
    batch.value ||= name.replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[-._]+/, "").slice(0, 64);
    replaceChildren(checked);
  }
  function over(event) {
    event.preventDefault();
    sheet.classList.add("over");
  }
  function left() {
    sheet.classList.remove("over");
  }
  function dropped(event) {
    event.preventDefault();
    left();
    const dropped = event.dataTransfer.files[0];
    if (dropped) read(dropped);
    else take(event.dataTransfer.getData("text/plain"), "");
  }
  async function submit(event) {
    event.preventDefault();
    const found = await whileDisabled(check, errorBox, () => ask("POST", "/edits/preview", { body: { csv: text.value }, signal }));
    if (found) await preview(checked, found, batch, signal);
  }
}

/** Show the lines of a table with what the model says now, and the button that applies them. */
async function preview(place, found, batch, signal) {
  const valid = found.items.filter(({ error }) => !error);
  const answers = new Map(valid.map(({ line }) => [line, h("span", { class: "soft" }, "…")]));
  const errorBox = h("div");
  const progress = h("div");
  const apply = h("button", { type: "button", class: "primary", on: { click: start } }, `Apply ${plural(valid.length, "edit")}`);
  const faulty = found.items.length - valid.length;
  apply.disabled = faulty > 0 || !valid.length;
  const seconds = found.seconds_per_edit;
  replaceChildren(
    place,
    h("h2", {}, `${valid.length} of ${plural(found.items.length, "line")} can be edits`),
    faulty > 0 && h("p", { class: "problem" }, `Correct ${plural(faulty, "line")} and check again: all are applied, or none.`),
    table(
      "Lines of the table",
      [["line", true], ["fact"], ["says now"], ["check"]],
      found.items.map((line) => [String(line.line), factOf(line), answers.get(line.line) ?? "", stateOf(line)]),
    ),
    h(
      "p",
      { class: "note" },
      seconds ? `About ${time(seconds * valid.length)} in all, as long as the last edits took.` : "No edit was made yet, so there is no estimate of the time.",
    ),
    errorBox,
    h("div", { class: "actions" }, apply),
    progress,
  );
  announce(`${valid.length} of ${found.items.length} lines can be edits.`);
  await askForAnswers(valid, answers, signal).catch((error) => {
    if (!signal.aborted) for (const box of answers.values()) if (box.textContent === "…") box.textContent = "–";
    if (!signal.aborted) replaceChildren(errorBox, h("p", { class: "note" }, `The present answers are missing: ${error.message}`));
  });

  async function start() {
    if (!batch.value || !batch.checkValidity()) {
      batch.required = true;
      batch.reportValidity();
      return;
    }
    const name = batch.value;
    const made = await whileDisabled(apply, errorBox, () => applyAll(progress, valid.map(({ edit }) => edit), name, signal));
    if (made) {
      apply.hidden = true;
      showOutcome(progress, made, name);
    }
  }
}

const factOf = ({ edit }) => (edit ? factLine({ ...edit, prompt: statedPrompt(edit), target_true: edit.target_true }, { tag: "span" }) : "");

function stateOf({ error, note }) {
  if (error) return h("span", { class: "bad" }, `✗ ${error.column ? `${error.column} ` : ""}${error.detail}`);
  return note ? h("span", { class: "soft" }, note) : h("span", { class: "good" }, "✓");
}

/** The beginning of an answer, up to the end of its first sentence. */
const firstSentence = (text) => /^\s*(.*?[^.!?\n])(?=[.!?](\s|$)|\n|$)/s.exec(text)?.[1] ?? text.trim();

/** Fill in how the newest version continues the prompt of each line. */
async function askForAnswers(lines, places, signal) {
  for (let at = 0; at < lines.length; at += PROMPTS_AT_ONCE) {
    const some = lines.slice(at, at + PROMPTS_AT_ONCE);
    const prompts = some.map(({ edit }) => splitPrompt(edit.prompt, edit.subject).join(""));
    const { choices } = await ask("POST", "/generate", { body: { prompts, max_new_tokens: 8 }, signal, quiet: true });
    some.forEach(({ line }, i) => {
      places.get(line).textContent = firstSentence(choices[i].text);
      places.get(line).className = "says";
    });
  }
}

/** Submit all edits, portion after portion, and show how many have ended. Return them when all have. */
async function applyAll(place, edits, batch, signal) {
  const bar = h("progress", { max: edits.length, value: 0, "aria-label": "Progress" });
  const words = h("p", { class: "phase" }, "Queued");
  replaceChildren(place, h("section", { class: "live" }, bar, words));
  const began = Date.now();
  const ids = [];
  for (let at = 0; at < edits.length; at += PORTION) {
    const portion = edits.slice(at, at + PORTION);
    const { items } = await post("/edits", { edits: portion, batch }, { signal });
    ids.push(...items.map(({ id }) => id));
    for (;;) {
      const open = await openEdits(batch, new Set(ids), signal);
      const done = ids.length - open;
      bar.value = done;
      const left = done > 0 ? ((Date.now() - began) / 1000 / done) * (edits.length - done) : null;
      words.textContent = `${done} of ${plural(edits.length, "edit")} ended${left ? `, about ${time(left)} left` : ""}`;
      if (!open) break;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }
  const wanted = new Set(ids);
  const { items } = await all(`/edits?batch=${encodeURIComponent(batch)}`, { signal });
  return items.filter(({ id }) => wanted.has(id));
}

async function openEdits(batch, ids, signal) {
  const lists = await Promise.all(
    ["queued", "running"].map((status) => all(`/edits?batch=${encodeURIComponent(batch)}&status=${status}`, { signal })),
  );
  return lists.flatMap(({ items }) => items).filter(({ id }) => ids.has(id)).length;
}

function showOutcome(place, edits, batch) {
  const failed = edits.filter(({ status }) => status !== "applied" && status !== "superseded");
  const reason = ({ result, error }) => result?.reason ?? error?.detail ?? "";
  const words = `${edits.length - failed.length} of ${plural(edits.length, "edit")} applied.`;
  const box = h("div");
  announce(words);
  replaceChildren(
    place,
    h("p", { class: `notice ${failed.length ? "" : "good"}` }, `${words} Batch: `, batchLink(batch)),
    failed.length > 0 &&
      h(
        "ol",
        { class: "listing" },
        failed.map((edit) =>
          h("li", {}, h("a", { href: `#/edits/${edit.id}` }, edit.subject), h("span", { class: "meta" }, pill(edit.status), reason(edit))),
        ),
      ),
    box,
    h(
      "div",
      { class: "actions" },
      confirmButton("Revert the batch", `Revert all edits of ${batch}?`, "Revert", async () => {
        replaceChildren(place, h("p", { class: "notice" }, outcome(await ask("POST", "/edits/revert", { body: { batch } }))));
      }),
    ),
  );
}

const time = (seconds) => (seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`);
