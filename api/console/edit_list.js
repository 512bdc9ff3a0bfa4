// The list of edits: search, filters, downloads, and reverts of several edits or of a batch.

import { announce, h, replaceChildren } from "./dom.js";
import { actorName, plural, timeAgo } from "./format.js";
import { statedPrompt } from "./conversation.js";
import { confirmButton, empty, factLine, field, link, pill, STATUSES, whileDisabled, withTrueObject } from "./components.js";
import { ask, download, get } from "./service.js";
import { refresh } from "./status.js";

const PAGE = 30;
const FILTERS = ["search", "status", "batch", "actor", "since", "until"];
const REVERTIBLE = ["applied", "superseded", "queued", "running"];

export async function show(place, { query, signal }) {
  const filters = new URLSearchParams(FILTERS.flatMap((name) => (query.get(name) ? [[name, query.get(name)]] : [])));
  const done = h("div", { "aria-live": "polite" });
  const count = h("span", { "aria-live": "polite" });
  const all = h("input", { type: "checkbox", "aria-label": "Select all edits that are shown", on: { change: selectAll } });
  const items = h("ol", { class: "listing picked" });
  const more = h("button", { type: "button", hidden: true }, "Load more");
  const failed = h("div");
  const revert = h("span", {});
  const tools = h("div", { class: "toolbar" }, h("label", { class: "check" }, all, count), revert);
  let cursor = null;
  more.onclick = () => whileDisabled(more, failed, load);
  replaceChildren(place, filterForm(filters), downloads(filters), done, tools, items, more, failed);
  await load();

  async function load() {
    const from = cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
    const page = await get(`/edits?limit=${PAGE}${from}&${filters}`, { signal });
    items.append(...page.items.map(item));
    cursor = page.next;
    more.hidden = !cursor;
    tools.hidden = !items.children.length;
    if (!items.children.length) items.replaceWith(nothing(filters));
    selected();
  }

  function item(edit) {
    const box = h("input", {
      type: "checkbox",
      value: edit.id,
      disabled: !REVERTIBLE.includes(edit.status),
      "aria-label": `Select ${edit.subject}`,
      on: { change: selected },
    });
    const fact = factLine({ ...withTrueObject(edit), prompt: statedPrompt(edit) }, { tag: "span" });
    return h(
      "li",
      {},
      box,
      h(
        "div",
        {},
        h("a", { href: `#/edits/${edit.id}` }, fact),
        h(
          "span",
          { class: "meta" },
          pill(edit.status),
          edit.batch && batchLink(edit.batch),
          h("span", {}, `${actorName(edit.actor)} · ${timeAgo(edit.created)}`),
        ),
      ),
    );
  }

  function boxes() {
    return [...items.querySelectorAll("input:not(:disabled)")];
  }

  function selectAll() {
    for (const box of boxes()) box.checked = all.checked;
    selected();
  }

  function selected() {
    const ids = boxes().filter((box) => box.checked).map((box) => box.value);
    count.textContent = ids.length ? `${plural(ids.length, "edit")} selected` : "Select all";
    all.checked = ids.length > 0 && ids.length === boxes().length;
    all.disabled = boxes().length === 0;
    const batch = filters.get("batch");
    replaceChildren(
      revert,
      ids.length > 0
        ? revertButton("Revert selected", `Revert ${plural(ids.length, "edit")} together?`, { edits: ids })
        : batch && boxes().length > 0 && revertButton("Revert the batch", `Revert all edits of ${batch}?`, { batch }),
    );
  }

  function revertButton(words, question, body) {
    return confirmButton(words, `${question} The ledger keeps the entries.`, "Revert", () => revertTogether(body));
  }

  async function revertTogether(body) {
    const result = await ask("POST", "/edits/revert", { body });
    const words = outcome(result);
    announce(words);
    replaceChildren(done, h("p", { class: "notice" }, words));
    cursor = null;
    replaceChildren(items);
    await load();
    refresh();
  }
}

/** Say what was done with several edits. */
export function outcome({ version, reverted, cancelled, unchanged }) {
  const parts = [
    reverted.length > 0 && `${plural(reverted.length, "edit")} reverted`,
    cancelled.length > 0 && `${cancelled.length} cancelled`,
    unchanged.length > 0 && `${unchanged.length} had nothing to revert`,
  ];
  return `${parts.filter(Boolean).join(", ")}: the newest version is ${version}.`;
}

/** A link to the edits of a batch. */
export const batchLink = (batch) => h("a", { class: "batch", href: `#/ledger/edits?batch=${encodeURIComponent(batch)}` }, batch);

function filterForm(filters) {
  const text = (name, placeholder = null, type = "search") =>
    h("input", { type, name, value: filters.get(name), placeholder, spellcheck: "false", autocomplete: "off" });
  const chosen = filters.get("status");
  const status = h(
    "select",
    { name: "status" },
    h("option", { value: "" }, "any"),
    Object.entries(STATUSES)
      .filter(([name]) => name !== "done")
      .map(([name, [, words]]) => h("option", { value: name, selected: name === chosen }, words)),
  );
  const form = h(
    "form",
    { class: "sheet filters", on: { submit: search } },
    field("Search", text("search", "words of subject, prompt or object")),
    h(
      "details",
      { class: "folded", open: FILTERS.slice(1).some((name) => filters.get(name)) },
      h("summary", {}, "Status, batch, caller and time"),
      h(
        "div",
        { class: "grid" },
        field("Status", status),
        field("Batch", text("batch", "any")),
        field("Caller", text("actor", "such as key:nightly-eval")),
        field("From", text("since", null, "date")),
        field("To", text("until", null, "date")),
      ),
    ),
    h("div", { class: "actions" }, h("button", { class: "primary" }, "Search"), link("ledger/edits", "All edits")),
  );
  function search(event) {
    event.preventDefault();
    const given = [...new FormData(form)].filter(([, value]) => value.trim());
    location.hash = `#/ledger/edits?${new URLSearchParams(given.map(([name, value]) => [name, value.trim()]))}`;
  }
  return form;
}

function downloads(filters) {
  const failed = h("div");
  const save = (words, form, accept) => {
    const path = `/edits/export?format=${form}&${filters}`;
    const button = h(
      "button",
      { type: "button", class: "small", on: { click: () => whileDisabled(button, failed, () => download(path, accept, `edits.${form}`)) } },
      words,
    );
    return button;
  };
  return h(
    "div",
    { class: "actions downloads" },
    save("Download CSV", "csv", "text/csv"),
    save("Download JSON", "json", "application/json"),
    failed,
  );
}

const nothing = (filters) =>
  filters.size
    ? empty("No edits match", h("p", {}, link("ledger/edits", "Show all edits"), "."))
    : empty("No edits yet", h("p", {}, link("edits", "Edit a fact"), " or ", link("edits/table", "the facts of a table"), "."));
