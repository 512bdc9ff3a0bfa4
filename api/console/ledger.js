// The ledger as a timeline, newest first: every entry with its effect, and a way back from each active edit.

import { announce, h, put } from "./dom.js";
import { many, percent, when, who } from "./format.js";
import { confirmed, empty, link, pill, told, working, writing } from "./parts.js";
import { formOf } from "./report.js";
import { ask, get } from "./service.js";
import { refresh } from "./standing.js";

const PAGE = 30;

export async function show(place, { signal }) {
  const verified = h("div", { class: "verified", "aria-live": "polite" });
  const check = h(
    "button",
    { type: "button", on: { click: () => working(check, verified, () => verify(verified)) } },
    "Verify",
  );
  const done = h("div", { "aria-live": "polite" });
  const entries = h("ol", { class: "timeline" });
  const more = h("button", { type: "button", hidden: true }, "Older entries");
  const failed = h("div");
  put(
    place,
    h("div", { class: "headline" }, h("h1", {}, "The ledger"), check),
    h(
      "p",
      { class: "lead" },
      "Everything that was written and taken back, chained by hash. Any edit can be taken back, in any order; the weights are then as if it had never been made.",
    ),
    verified,
    done,
    entries,
    more,
    failed,
  );
  let cursor = null;
  more.onclick = () => working(more, failed, load);
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
      put(
        place,
        h("h1", {}, "The ledger"),
        empty(
          "Nothing is written yet",
          h(
            "p",
            {},
            "Version 0 is the model as it was made, and it is what everyone gets now. ",
            link("edits", "Write over a fact"),
            ", for example that the Eiffel Tower is in Paris, and it stands here with who, when and what it did.",
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
      h("div", { class: "card" }, entry.kind === "apply" ? applied(entry, edit) : reverted(entry, edit)),
    );
  }

  function applied(entry, edit) {
    const rewrite = edit?.result?.rewrite;
    const wrote = told(edit ?? { ...entry.body, target_true: entry.body.resolved_true });
    return [
      h("a", { class: "quiet", href: `#/edits/${entry.edit_id}` }, writing(wrote, { tag: "span" })),
      rewrite && effect(edit, rewrite),
      h(
        "div",
        { class: "meta" },
        edit && pill(edit.status),
        h(
          "span",
          {},
          `${who(entry.actor)} · ${when(entry.at)}${edit?.reverted_version ? ` · taken back at version ${edit.reverted_version}` : ""}`,
        ),
        edit &&
          (edit.status === "applied" || edit.status === "superseded") &&
          confirmed("Take back", "Take it back? Nothing is lost: the entry stays.", "Take it back", () =>
            revert(edit),
          ),
      ),
    ];
  }

  async function revert(edit) {
    const gone = await ask("DELETE", `/edits/${edit.id}`, { wait: 30 });
    announce(`Taken back at version ${gone.reverted_version}.`);
    put(
      done,
      h(
        "p",
        { class: "notice" },
        `Taken back: the model is now version ${gone.reverted_version}, without this edit. `,
        h("a", { href: `#/edits?${formOf(gone)}` }, "Write it again"),
        h("span", {}, " whenever you like."),
      ),
    );
    put(verified); // that was said of the ledger before this
    cursor = null;
    put(entries);
    await load();
    refresh();
  }
}

/** Where every ledger begins. */
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
        "The model as it was made: ",
        link("ask?version=base", "base"),
        ", and always there to be asked.",
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
  const wrote = edit ? told(edit) : { ...entry.body, target_new: null };
  return [
    h(
      "p",
      { class: "quiet" },
      "Taken back: ",
      h(
        "a",
        { href: `#/edits/${entry.edit_id}` },
        `${wrote.subject}${wrote.target_new ? ` → ${wrote.target_new}` : ""}`,
      ),
      h("span", { class: "soft" }, `, written at version ${entry.body?.applied_version ?? "?"}`),
    ),
    h("div", { class: "meta" }, h("span", {}, `${who(entry.actor)} · ${when(entry.at)}`)),
  ];
}

/** The edits behind some entries, by id. */
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
  put(
    place,
    h(
      "div",
      { class: `notice ${found.ok ? "good" : "bad"}`, role: "status" },
      found.ok
        ? h(
            "p",
            {},
            h("b", {}, "✓ The ledger is whole. "),
            `${many(found.entries, "entry", "entries")} up to version ${found.head}: the chain of hashes, every edit's vectors, and the weights that ${many(workers, "worker")} reported agree.`,
          )
        : [
            h(
              "p",
              {},
              h("b", {}, "✗ The ledger does not agree with itself. "),
              "Whoever runs the service should look at this before anyone relies on the model:",
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
