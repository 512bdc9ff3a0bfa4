// @ts-check
// The HTTP client of the console: requests with the API key, problem documents and server-sent events.

import { h, replaceChildren } from "./dom.js";

const KEY = "palimpsest.key"; // in session storage: deleted with the tab, and never part of an address

/** An error response of the service. `code` identifies it. */
export class Problem extends Error {
  constructor(status, said) {
    super(said.detail ?? said.title ?? `The service responded with status ${status}.`);
    this.status = status;
    this.code = said.code ?? "";
    this.title = said.title ?? "";
    this.errors = said.errors ?? [];
    this.reasons = said.reasons ?? [];
  }
}

export const storedKey = () => sessionStorage.getItem(KEY);
export const forgetKey = () => {
  sessionStorage.removeItem(KEY);
  changed();
};
const listeners = new Set();
/** Call `listener` when a key is stored or forgotten. */
export const onKey = (listener) => listeners.add(listener);
const changed = () => listeners.forEach((listener) => listener());

/**
 * Send a request. Resolves to the parsed JSON, or with `raw` to the response.
 * `quiet`: for background requests; a missing key is an error and opens no dialog.
 */
export async function ask(
  method,
  path,
  { body, accept, wait, signal, raw = false, quiet = false, headers = {} } = {},
) {
  const given = { ...headers, Accept: accept ?? "application/json" };
  if (body !== undefined) given["Content-Type"] = "application/json";
  if (wait) given.Prefer = `wait=${wait}`;
  const request = { method, headers: given, signal, cache: "no-store", credentials: "omit" };
  if (body !== undefined) request.body = JSON.stringify(body);
  const answer = await fetchWithKey(address(path), request, quiet);
  if (!answer.ok) throw await problem(answer);
  return raw ? answer : answer.json();
}

export const get = (path, options) => ask("GET", path, options);

/** Create a resource. The idempotency key makes a repeated request harmless. */
export function post(path, body, options = {}) {
  return ask("POST", path, { body, headers: { "Idempotency-Key": random() }, ...options });
}

/** Return every item of a list, or the first `most`. */
export async function all(path, { most = Infinity, ...options } = {}) {
  const items = [];
  let cursor = null;
  do {
    const page = await get(
      `${path}${path.includes("?") ? "&" : "?"}limit=200${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`,
      options,
    );
    items.push(...page.items);
    cursor = page.next;
  } while (cursor && items.length < most);
  return { items, next: cursor };
}

/** Yield the server-sent events of a request as {id, name, data}. */
export async function* events(method, path, options = {}) {
  const answer = await ask(method, path, { accept: "text/event-stream", raw: true, ...options });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const frames = (rest + value).split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        const event = parseEvent(frame);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Yield the events of a job until `end`, and reconnect after lost connections. */
export async function* jobEvents(path, { signal } = {}) {
  let last = null;
  for (;;) {
    try {
      const headers = last ? { "Last-Event-ID": last } : {};
      for await (const event of events("GET", `${path}/events`, { signal, headers })) {
        last = event.id ?? last;
        yield event;
        if (event.name === "end") return;
      }
    } catch (error) {
      if (signal?.aborted || error instanceof Problem) throw error;
    }
    await pause(1000, signal);
  }
}

/** Save a response as a file. */
export async function download(path, accept, name) {
  const answer = await get(path, { accept, raw: true });
  const url = URL.createObjectURL(await answer.blob());
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener(
      "abort",
      () => {
        clearTimeout(timer);
        reject(signal.reason);
      },
      { once: true },
    );
  });
}

// Relative to the page, so that a proxy can serve it below a path prefix.
const address = (path) => new URL(path.replace(/^\//, ""), document.baseURI);

async function fetchWithKey(url, request, quiet) {
  for (;;) {
    const key = storedKey();
    const headers = key ? { ...request.headers, Authorization: `Bearer ${key}` } : request.headers;
    const answer = await fetchOrProblem(url, { ...request, headers });
    if (answer.status !== 401 || quiet) return answer;
    if (storedKey() === key && !(await askForKey(key !== null))) return answer;
  }
}

async function fetchOrProblem(url, request) {
  try {
    return await fetch(url, request);
  } catch (error) {
    if (request.signal?.aborted) throw error;
    throw new Problem(0, { detail: "The service cannot be reached: check that it is running, then try again." });
  }
}

async function problem(answer) {
  let said = {};
  try {
    said = await answer.json();
  } catch {} // the response of a proxy, which has no problem document
  return new Problem(answer.status, said);
}

function parseEvent(frame) {
  const event = { id: null, name: "message", data: "" };
  for (const line of frame.split("\n")) {
    if (line.startsWith("id: ")) event.id = line.slice(4);
    else if (line.startsWith("event: ")) event.name = line.slice(7);
    else if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event.data ? { ...event, data: JSON.parse(event.data) } : null;
}

/** Return a random idempotency key. `randomUUID` is missing on pages without TLS. */
function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}

// The API key dialog. Concurrent requests share one dialog.

let asking = null;

/** Ask the user for an API key. Resolves to whether one was entered. */
export function askForKey(refused = false) {
  asking ??= new Promise((resolve) => openKeyBox(refused, resolve)).finally(() => {
    asking = null;
  });
  return asking;
}

function openKeyBox(refused, resolve) {
  const box = document.getElementById("key-box");
  const input = h("input", {
    id: "key-input",
    type: "password",
    autocomplete: "off",
    spellcheck: "false",
    required: true,
  });
  const give = (event) => {
    event.preventDefault();
    if (!input.value.trim()) return;
    sessionStorage.setItem(KEY, input.value.trim());
    box.close("given");
  };
  replaceChildren(
    box,
    h(
      "form",
      { method: "dialog", on: { submit: give } },
      h("h2", { id: "key-title" }, "API key required"),
      refused && h("p", { class: "problem", role: "alert" }, "The API key is unknown or revoked."),
      h(
        "p",
        {},
        "The operator of the service creates keys with ",
        h("code", {}, "palimpsest keys create"),
        ". The key is stored in this tab until it is closed, and is sent to this service only.",
      ),
      h("label", { for: "key-input" }, "API key"),
      input,
      h(
        "div",
        { class: "actions" },
        h("button", { class: "primary" }, "Use key"),
        h("button", { type: "button", on: { click: () => box.close("") } }, "Not now"),
      ),
    ),
  );
  box.addEventListener(
    "close",
    () => {
      const given = box.returnValue === "given";
      replaceChildren(box);
      if (given) changed();
      resolve(given);
    },
    { once: true },
  );
  box.returnValue = "";
  box.showModal();
  input.focus();
}
