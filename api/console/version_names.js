// Names of versions: give, list and delete them.

import { announce, h, replaceChildren } from "./dom.js";
import { actorName, timeAgo } from "./format.js";
import { confirmButton, empty, field, link, whileDisabled } from "./components.js";
import { all, ask } from "./service.js";

export async function show(place, { signal }) {
  const list = h("div");
  replaceChildren(
    place,
    h(
      "p",
      { class: "note" },
      "A name stays with its version, whatever is applied or reverted later. It can be used wherever a version is asked for.",
    ),
    nameForm(load),
    list,
  );
  await load();

  async function load() {
    const { items } = await all("/versions", { signal });
    replaceChildren(
      list,
      items.length
        ? h("ol", { class: "listing" }, items.map(item))
        : empty("No version has a name", h("p", {}, "Give the newest version one before a change, such as before-release.")),
    );
  }

  function item({ name, version, model, actor, created }) {
    return h(
      "li",
      {},
      h("span", { class: "named" }, h("b", {}, name), ` is version ${version} `, h("code", {}, model)),
      h(
        "span",
        { class: "meta" },
        h("span", {}, `${actorName(actor)} · ${timeAgo(created)}`),
        link(`generate?version=${name}`, "Generate"),
        link(`ledger/diff?before=${name}&after=head`, "What changed since"),
        confirmButton("Delete", `Delete the name ${name}? The version stays.`, "Delete name", () => remove(name)),
      ),
    );
  }

  async function remove(name) {
    await ask("DELETE", `/versions/${name}`);
    announce(`The name ${name} is deleted.`);
    await load();
  }
}

function nameForm(given) {
  const name = h("input", {
    type: "text",
    name: "name",
    required: true,
    pattern: "[A-Za-z][A-Za-z0-9._\\-]{0,63}",
    placeholder: "before-release",
    spellcheck: "false",
    autocomplete: "off",
  });
  const version = h("input", { type: "text", name: "version", value: "head", required: true, spellcheck: "false", autocomplete: "off" });
  const errorBox = h("div");
  const send = h("button", { class: "primary" }, "Give name");
  return h(
    "form",
    { class: "sheet", on: { submit } },
    h(
      "div",
      { class: "grid two" },
      field("Name", name, "a letter, then letters, digits, dots and dashes"),
      field("Version", version, "head, base, a number or a name"),
    ),
    errorBox,
    h("div", { class: "actions" }, send),
  );

  async function submit(event) {
    event.preventDefault();
    const path = `/versions/${encodeURIComponent(name.value)}`;
    const named = await whileDisabled(send, errorBox, () => ask("PUT", path, { body: { version: version.value.trim() } }));
    if (!named) return;
    announce(`${named.name} is version ${named.version}.`);
    name.value = "";
    await given();
  }
}
