// The ledger: its history, newest first, with a button to revert each active edit; and the views beside it.

import { announce, h, replaceChildren } from "./dom.js";
import { plural, percent, timeAgo, actorName } from "./format.js";
import { statedPrompt } from "./conversation.js";
import { confirmButton, empty, link, pill, viewLinks, withTrueObject, whileDisabled, factLine } from "./components.js";
import * as editList from "./edit_list.js";
import { batchLink } from "./edit_list.js";
import { formOf } from "./report.js";
import { all, ask, get } from "./service.js";
import { refresh } from "./status.js";
import * as versionDiff from "./version_diff.js";
import * as versionNames from "./version_names.js";

const PAGE = 30;

const VIEWS = {
  edits: { words: "Edits", lead: "Every edit, also those that were not applied. Select several to revert them together.", page: editList },
  diff: { words: "Differences", lead: "What is active for each fact at one version and at another.", page: versionDiff },
  names: { words: "Names", lead: "Names of versions.", page: versionNames },
};
const LINKS = [["ledger", "History"], ...Object.entries(VIEWS).map(([name, { words }]) => [`ledger/${name}`, words])];

export async function show(place, { id, query, signal }) {
  if (!Object.hasOwn(VIEWS, id ?? "")) {
    await showHistory(place, { signal });
    return;
  }
  const { lead, page } = VIEWS[id];
  const view = h("div", { class: "page" });
  replaceChildren(
    place,
    h("h1", {}, "Ledger"),
    viewLinks("Views of the ledger", LINKS, `ledger/${id}`),
    h("p", { class: "lead" }, lead),
    view,
  );
  await page.show(view, { query, signal });
}

async function showHistory(place, { signal }) {
  const verified = h("div", { class: "verified", "aria-live": "polite" });
  const check = h(
    "button",
    { type: "button", on: { click: () => whileDisabled(check, verified, () => verify(verified)) } },
    "Verify",
  );
  const done = h("div", { "aria-live": "polite" });
  const entries = h("ol", { class: "timeline" });
  const more = h("button", { type: "button", hidden: true }, "Load more");
  const failed = h("div");
  replaceChildren(
    place,
    h("div", { class: "headline" }, h("h1", {}, "Ledger"), check),
    viewLinks("Views of the ledger", LINKS, "ledger"),
    h(
      "p",
      { class: "lead" },
      "Every applied and reverted edit, linked by a hash chain. Any edit can be reverted, in any order, and leaves no trace in the weights.",
    ),
    verified,
    done,
    entries,
    more,
    failed,
  );
  let cursor = null;
  more.onclick = () => whileDisabled(more, failed, load);
  const { items: names } = await all("/versions", { signal });
  await load();

  async function load() {
    const page = await get(
      `/ledger?order=newest&limit=${PAGE}${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`,
      { signal },
    );
    const edits = await effects(page.items, signal);
    entries.append(...page.items.map((entry) => item(entry, edits.get(entry.edit_id))));
    cursor = page.next;
    more.hidden = !cursor;
    if (!cursor && entries.children.length) entries.append(base());
    if (!entries.children.length) {
      replaceChildren(
        place,
        h("h1", {}, "Ledger"),
        viewLinks("Views of the ledger", LINKS, "ledger"),
        empty(
          "The ledger is empty",
          h(
            "p",
            {},
            "Version 0 is the base model. ",
            link("edits", "Edit a fact"),
            ", for example the city of the Eiffel Tower, to add an entry.",
          ),
        ),
      );
    }
  }

  function item(entry, edit) {
    const active = edit?.status === "applied" && entry.kind === "apply";
    return h(
      "li",
      { class: `entry ${entry.kind} ${active ? "active" : "past"}` },
      h(
        "span",
        { class: "version", title: entry.hash },
        h("span", { class: "unseen" }, "version "),
        String(entry.version),
      ),
      h(
        "div",
        { class: "card" },
        entry.kind === "apply" ? applied(entry, edit) : reverted(entry, edit),
        names.filter(({ version }) => version === entry.version).map(({ name }) => h("span", { class: "batch" }, name)),
      ),
    );
  }

  function applied(entry, edit) {
    const rewrite = edit?.result?.rewrite;
    const wrote = withTrueObject(edit ?? { ...entry.body, target_true: entry.body.resolved_true });
    return [
      h("a", { class: "quiet", href: `#/edits/${entry.edit_id}` }, factLine({ ...wrote, prompt: statedPrompt(wrote) }, { tag: "span" })),
      rewrite && effect(edit, rewrite),
      h(
        "div",
        { class: "meta" },
        edit && pill(edit.status),
        edit?.batch && batchLink(edit.batch),
        h(
          "span",
          {},
          `${actorName(entry.actor)} · ${timeAgo(entry.at)}${edit?.reverted_version ? ` · reverted at version ${edit.reverted_version}` : ""}`,
        ),
        edit &&
          (edit.status === "applied" || edit.status === "superseded") &&
          confirmButton("Revert", "Revert this edit? The ledger keeps the entry.", "Revert edit", () =>
            revert(edit),
          ),
      ),
    ];
  }

  async function revert(edit) {
    const gone = await ask("DELETE", `/edits/${edit.id}`, { wait: 30 });
    announce(`Reverted at version ${gone.reverted_version}.`);
    replaceChildren(
      done,
      h(
        "p",
        { class: "notice" },
        `Reverted: the newest version is ${gone.reverted_version}. `,
        h("a", { href: `#/edits?${formOf(gone)}` }, "Apply again"),
      ),
    );
    replaceChildren(verified); // the verification was of the ledger before the revert
    cursor = null;
    replaceChildren(entries);
    await load();
    refresh();
  }
}

/** Return the entry of version 0. */
const base = () =>
  h(
    "li",
    { class: "entry revert past" },
    h("span", { class: "version" }, h("span", { class: "unseen" }, "version "), "0"),
    h(
      "div",
      { class: "card" },
      h(
        "p",
        {},
        "The base model: ",
        link("generate?version=base", "base"),
        ", which can always be served.",
      ),
    ),
  );

function effect(edit, { new: fresh, true: old, before, after }) {
  const one = (name, kind, from, to) =>
    h("span", { class: `effect ${kind}` }, h("b", {}, name.trim()), ` ${percent(from)} → ${percent(to)}`);
  return h(
    "p",
    { class: "effects" },
    edit.objective === "write" && one(fresh, "new", before.new, after.new),
    one(old, "old", before.true, after.true),
  );
}

function reverted(entry, edit) {
  const wrote = edit ? withTrueObject(edit) : { ...entry.body, target_new: null };
  return [
    h(
      "p",
      { class: "quiet" },
      "Reverted: ",
      h(
        "a",
        { href: `#/edits/${entry.edit_id}` },
        `${wrote.subject}${wrote.target_new ? ` → ${wrote.target_new}` : ""}`,
      ),
      h("span", { class: "soft" }, `, applied at version ${entry.body?.applied_version ?? "?"}`),
    ),
    h("div", { class: "meta" }, h("span", {}, `${actorName(entry.actor)} · ${timeAgo(entry.at)}`)),
  ];
}

/** Return the edits of ledger entries, by id. */
async function effects(entries, signal) {
  const wanted = [...new Set(entries.map((entry) => entry.edit_id))];
  const found = await Promise.all(wanted.map((id) => get(`/edits/${id}`, { signal }).catch(() => null)));
  if (signal.aborted) throw signal.reason;
  return new Map(found.filter(Boolean).map((edit) => [edit.id, edit]));
}

async function verify(place) {
  const found = await get("/ledger/verify");
  const workers = new Set(
    found.replicas.filter((replica) => !replica.withdrawn).map((replica) => replica.worker),
  ).size;
  replaceChildren(
    place,
    h(
      "div",
      { class: `notice ${found.ok ? "good" : "bad"}`, role: "status" },
      found.ok
        ? h(
            "p",
            {},
            h("b", {}, "✓ The ledger is valid. "),
            `${plural(found.entries, "entry", "entries")} up to version ${found.head}: the hash chains, the signatures, the factors of every edit, and the weight digests of ${plural(workers, "worker")} match.`,
          )
        : [
            h(
              "p",
              {},
              h("b", {}, "✗ The ledger is not valid. "),
              "Do not rely on the model until these findings are resolved:",
            ),
            h(
              "ul",
              {},
              found.findings.map((finding) =>
                h("li", {}, finding.detail ?? finding.text ?? Object.values(finding).join(" · ")),
              ),
            ),
          ],
    ),
  );
}
