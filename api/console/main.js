// The shell: which page the address names, the keys that lead there, the theme.

import { announce, h, put } from "./dom.js";
import { trouble } from "./parts.js";
import { askForKey, forget, held, onKey } from "./service.js";
import { refresh, showStanding } from "./standing.js";
import * as asking from "./ask.js";
import * as edits from "./edits.js";
import * as evaluations from "./evaluations.js";
import * as ledger from "./ledger.js";
import * as traces from "./traces.js";
import * as workers from "./workers.js";

const PAGES = {
  ask: { words: "Ask", key: "a", page: asking },
  edits: { words: "Edit", key: "e", page: edits },
  ledger: { words: "Ledger", key: "l", page: ledger },
  traces: { words: "Traces", key: "t", page: traces },
  evaluations: { words: "Evaluations", key: "v", page: evaluations },
  workers: { words: "Workers", key: "w", page: workers },
};
const main = document.getElementById("main");
let leaving = new AbortController();

// Pages

function read() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, id] = path.split("/").map(decodeURIComponent);
  return { name: name in PAGES ? name : "ask", id: id || null, query: new URLSearchParams(query) };
}

async function show(byHand = true) {
  leaving.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  const { name, id, query } = read();
  const { words, page } = PAGES[name];
  document.title = `${words} · Palimpsest`;
  put(
    document.getElementById("nav"),
    Object.entries(PAGES).map(([each, { words }]) =>
      h("li", {}, h("a", { href: `#/${each}`, "aria-current": each === name ? "page" : null }, words)),
    ),
  );
  const place = h("div", { class: "page" });
  put(main, place);
  if (byHand) {
    main.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
  try {
    await page.show(place, { id, query, signal });
    if (byHand) announce(`${place.querySelector("h1")?.textContent ?? words}`);
  } catch (error) {
    if (!signal.aborted) place.append(trouble(error));
  }
}

// Keys: `g` and a letter go somewhere, and the few others are below `?`

let goes = 0;
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
  } else if (event.key === "g") goes = Date.now();
  else if (Date.now() - goes < 1500) {
    const found = Object.keys(PAGES).find((name) => PAGES[name].key === event.key);
    goes = 0;
    if (found) location.hash = `#/${found}`;
  }
});

const SHORTCUTS = [
  ...Object.values(PAGES).map(({ words, key }) => [["g", key], words]),
  [["/"], "to the first field of the page"],
  [["Ctrl", "Enter"], "send what the form holds"],
  [["Esc"], "stop an answer, leave a field, close a box"],
  [["←", "↑", "↓", "→"], "from cell to cell in a heat map"],
  [["?"], "this help"],
];

function openHelp() {
  const box = document.getElementById("help-box");
  const close = h("button", { type: "button", class: "primary", on: { click: () => box.close() } }, "Close");
  put(
    box,
    h("h2", { id: "help-title" }, "Help"),
    h(
      "p",
      {},
      "A palimpsest is a page whose text was scraped off and written over, with the older writing still there to be read. ",
      "Here the page is a language model: ask it, write over a fact, see what that touched, and take it back whenever you like.",
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
    h("p", {}, "The same by HTTP: ", h("a", { href: "docs" }, "the interface"), "."),
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
  } catch {} // then it holds until the page is left
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
    button.hidden = held() === null;
    button.textContent = "Forget key";
  };
  button.addEventListener("click", () => {
    forget();
    announce("The key is forgotten.");
  });
  onKey(() => {
    state();
    refresh();
    if (held()) show(false);
  });
  state();
}

themes();
keys();
document.getElementById("help").addEventListener("click", openHelp);
document.getElementById("standing").addEventListener("click", (event) => {
  const asked = event.currentTarget.textContent.includes("key");
  if (asked) {
    event.preventDefault();
    askForKey();
  }
});
showStanding(document.getElementById("standing"));
addEventListener("hashchange", () => show());
refresh();
show(false);
