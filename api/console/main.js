// The shell: pages by address, keyboard shortcuts, theme and API key.

import { announce, h, replaceChildren } from "./dom.js";
import { errorBox } from "./components.js";
import { askForKey, forgetKey, storedKey, onKey } from "./service.js";
import { refresh, showStatus } from "./status.js";
import * as chat from "./chat.js";
import * as generatePage from "./generate.js";
import * as edits from "./edits.js";
import * as evaluations from "./evaluations.js";
import * as ledger from "./ledger.js";
import * as traces from "./traces.js";
import * as workers from "./workers.js";

const PAGES = {
  generate: { words: "Generate", key: "a", page: generatePage },
  chat: { words: "Chat", key: "c", page: chat },
  edits: { words: "Edit", key: "e", page: edits },
  ledger: { words: "Ledger", key: "l", page: ledger },
  traces: { words: "Traces", key: "t", page: traces },
  evaluations: { words: "Evaluations", key: "v", page: evaluations },
  workers: { words: "Workers", key: "w", page: workers },
};
const main = document.getElementById("main");
let pageAbort = new AbortController();

// Pages

function read() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, id] = path.split("/").map(decodeURIComponent);
  return { name: name || "generate", id: id || null, query: new URLSearchParams(query) };
}

async function show(byUser = true) {
  pageAbort.abort();
  pageAbort = new AbortController();
  const { signal } = pageAbort;
  const { name, id, query } = read();
  const { words, page } = Object.hasOwn(PAGES, name) ? PAGES[name] : { words: "No such page", page: missing };
  document.title = `${words} · Palimpsest`;
  replaceChildren(
    document.getElementById("nav"),
    Object.entries(PAGES).map(([each, { words }]) =>
      h("li", {}, h("a", { href: `#/${each}`, "aria-current": each === name ? "page" : null }, words)),
    ),
  );
  const place = h("div", { class: "page" });
  replaceChildren(main, place);
  if (byUser) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  try {
    await page.show(place, { id, query, signal });
    if (byUser) announce(`${place.querySelector("h1")?.textContent ?? words}`);
  } catch (error) {
    if (!signal.aborted) place.append(errorBox(error));
  }
}

const missing = {
  async show(place) {
    replaceChildren(
      place,
      h("h1", {}, "No such page"),
      h("p", { class: "lead" }, "The console has no page at this address: ", h("code", {}, location.hash), ". It has these:"),
      h("ul", { class: "listing" }, Object.entries(PAGES).map(([each, { words }]) => h("li", {}, h("a", { href: `#/${each}` }, words)))),
    );
  },
};

// Keyboard shortcuts: `g` and a letter open a page; `?` lists the others

let goPressedAt = 0;
const typing = (at) =>
  at.closest?.("input:not([type=radio]):not([type=checkbox]), textarea, select, [contenteditable], dialog");

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  if (event.key === "Escape" && typing(event.target) && !event.target.closest("dialog")) event.target.blur();
  if (typing(event.target)) return;
  if (event.key === "?") {
    event.preventDefault();
    openHelp();
  } else if (event.key === "/") {
    event.preventDefault();
    main.querySelector("textarea, input")?.focus();
  } else if (event.key === "g") goPressedAt = Date.now();
  else if (Date.now() - goPressedAt < 1500) {
    const found = Object.keys(PAGES).find((name) => PAGES[name].key === event.key);
    goPressedAt = 0;
    if (found) location.hash = `#/${found}`;
  }
});

const SHORTCUTS = [
  ...Object.values(PAGES).map(({ words, key }) => [["g", key], words]),
  [["/"], "focus the first field"],
  [["Ctrl", "Enter"], "submit the form"],
  [["Esc"], "stop a generation, leave a field, close a dialog"],
  [["←", "↑", "↓", "→"], "move between the cells of a heat map"],
  [["?"], "show this help"],
];

function openHelp() {
  const box = document.getElementById("help-box");
  const close = h("button", { type: "button", class: "primary", on: { click: () => box.close() } }, "Close");
  replaceChildren(
    box,
    h("h2", { id: "help-title" }, "Help"),
    h(
      "p",
      {},
      "Palimpsest edits facts inside a language model and keeps every edit in a ledger. ",
      "Generate text from any version, edit a fact, read its measured effects, and revert it at any time.",
    ),
    h(
      "dl",
      { class: "keys" },
      SHORTCUTS.map(([keys, words]) =>
        h(
          "div",
          {},
          h(
            "dt",
            {},
            keys.map((key) => h("kbd", {}, key)),
          ),
          h("dd", {}, words),
        ),
      ),
    ),
    h("p", {}, "HTTP interface: ", h("a", { href: "docs" }, "reference"), "."),
    h("div", { class: "actions" }, close),
  );
  box.showModal();
  close.focus();
}

// The theme

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };

function setTheme(name) {
  if (name === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  try {
    localStorage.setItem("palimpsest.theme", name);
  } catch {} // without storage the theme lasts until the page is closed
  const button = document.getElementById("theme");
  button.textContent = THEMES[name];
  button.setAttribute("aria-label", `Theme: ${THEMES[name]}. Change it`);
}

function themes() {
  const now = document.documentElement.dataset.theme ?? "auto";
  setTheme(now);
  document.getElementById("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    setTheme(names[(names.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % names.length]);
  });
}

// The key

function keys() {
  const button = document.getElementById("key");
  const state = () => {
    button.hidden = storedKey() === null;
    button.textContent = "Forget key";
  };
  button.addEventListener("click", () => {
    forgetKey();
    announce("The API key is forgotten.");
  });
  onKey(() => {
    state();
    refresh();
    if (storedKey()) show(false);
  });
  state();
}

themes();
keys();
document.getElementById("help").addEventListener("click", openHelp);
document.getElementById("status").addEventListener("click", (event) => {
  const asked = event.currentTarget.textContent.includes("key");
  if (asked) {
    event.preventDefault();
    askForKey();
  }
});
showStatus(document.getElementById("status"));
addEventListener("hashchange", () => show());
refresh();
show(false);
