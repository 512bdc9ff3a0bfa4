// The facts that differ between two versions.

import { h, replaceChildren } from "./dom.js";
import { actorName, timeAgo } from "./format.js";
import { statedPrompt } from "./conversation.js";
import { empty, factLine, field, whileDisabled } from "./components.js";
import { get } from "./service.js";

const SIGNS = { added: "+", removed: "–", replaced: "≠" };

export async function show(place, { query, signal }) {
  const before = query.get("before") ?? "base";
  const after = query.get("after") ?? "head";
  const found = h("div");
  replaceChildren(place, await versionsForm(before, after, signal), found);
  const items = h("ol", { class: "listing changes" });
  const more = h("button", { type: "button", hidden: true }, "Load more");
  const failed = h("div");
  let cursor = null;
  more.onclick = () => whileDisabled(more, failed, load);
  const first = await load();
  const [older, newer] = [first.before, first.after];
  replaceChildren(
    found,
    h("h2", {}, `From version ${older} to version ${newer}`),
    items.children.length ? items : empty("Nothing differs", h("p", {}, "The same edits are active at both versions.")),
    more,
    failed,
  );

  async function load() {
    const from = cursor ? `&cursor=${encodeURIComponent(cursor)}` : "";
    const asked = new URLSearchParams({ before, after });
    const page = await get(`/ledger/diff?${asked}${from}`, { signal });
    items.append(...page.items.map(change));
    cursor = page.next;
    more.hidden = !cursor;
    return page;
  }
}

/** A changed fact: the object that no longer holds is struck through. */
function change({ change: kind, before, after, ...fact }) {
  const side = after ?? before;
  const line = factLine(
    {
      ...fact,
      prompt: statedPrompt(fact),
      target_true: before ? objectOf(before) : after.resolved_true,
      target_new: after ? objectOf(after) : before.resolved_true,
    },
    { tag: "span" },
  );
  return h(
    "li",
    {},
    h("a", { href: `#/edits/${side.edit_id}` }, line),
    h(
      "span",
      { class: "meta" },
      h("span", { class: `pill ${kind}` }, h("span", { "aria-hidden": "true" }, `${SIGNS[kind]} `), kind),
      h("span", {}, `${actorName(side.actor)} · ${timeAgo(side.at)}`),
    ),
  );
}

const objectOf = ({ objective, target_new: fresh, resolved_true: old }) =>
  fresh ?? `${objective === "erase" ? "not " : ""}${old ?? "the object"}`;

/** The form that chooses both versions, with the names that versions have. */
async function versionsForm(before, after, signal) {
  const { items } = await get("/versions?limit=200", { signal });
  const names = h(
    "datalist",
    { id: "version-names" },
    ["head", "base", ...items.map(({ name }) => name)].map((name) => h("option", { value: name })),
  );
  const input = (name, value) =>
    h("input", { type: "text", name, value, list: "version-names", required: true, spellcheck: "false", autocomplete: "off" });
  const form = h(
    "form",
    { class: "sheet", on: { submit: compare } },
    h(
      "div",
      { class: "grid two" },
      field("From", input("before", before), "a number, base, head or a name"),
      field("To", input("after", after)),
    ),
    names,
    h("div", { class: "actions" }, h("button", { class: "primary" }, "Compare")),
  );
  function compare(event) {
    event.preventDefault();
    location.hash = `#/ledger/diff?${new URLSearchParams([...new FormData(form)])}`;
  }
  return form;
}
