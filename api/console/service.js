// The service behind this page: requests with the key, problems, and server-sent events.

import { h, put } from "./dom.js";

const KEY = "palimpsest.key"; // in the session's storage: gone with the tab, and never in an address

/** What the service answered instead, in its own words. */
export class Problem extends Error {
  constructor(status, said) {
    super(said.detail ?? said.title ?? `The service answered ${status}.`);
    this.status = status;
    this.title = said.title ?? "";
    this.errors = said.errors ?? [];
    this.reasons = said.reasons ?? [];
  }
}

export const held = () => sessionStorage.getItem(KEY);
export const forget = () => {
  sessionStorage.removeItem(KEY);
  changed();
};
const listeners = new Set();
/** Call back whenever a key is taken or forgotten. */
export const onKey = (listener) => listeners.add(listener);
const changed = () => listeners.forEach((listener) => listener());

/**
 * Ask the service. Gives the parsed JSON, or with `raw` the response itself.
 * `quiet`: for what nobody asked for by hand; a missing key is then an error like any other, and no box opens.
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
  const answer = await keyed(address(path), request, quiet);
  if (!answer.ok) throw await problem(answer);
  return raw ? answer : answer.json();
}

export const get = (path, options) => ask("GET", path, options);

/** Create something. Sent twice by a shaky network, it is still done once. */
export function post(path, body, options = {}) {
  return ask("POST", path, { body, headers: { "Idempotency-Key": random() }, ...options });
}

/** Every item of a list, or the first `most` of them. */
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

/** Server-sent events of one request, as {id, name, data}. */
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
        const event = parsed(frame);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The course of a job until its `end`, through any number of lost connections. */
export async function* course(path, { signal } = {}) {
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

/** Save what the service draws or holds as a file. */
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

// Relative to the page, so that a proxy may serve all of it below a folder.
const address = (path) => new URL(path.replace(/^\//, ""), document.baseURI);

async function keyed(url, request, quiet) {
  for (;;) {
    const key = held();
    const headers = key ? { ...request.headers, Authorization: `Bearer ${key}` } : request.headers;
    const answer = await reached(url, { ...request, headers });
    if (answer.status !== 401 || quiet) return answer;
    if (held() === key && !(await askForKey(key !== null))) return answer;
  }
}

async function reached(url, request) {
  try {
    return await fetch(url, request);
  } catch (error) {
    if (request.signal?.aborted) throw error;
    throw new Problem(0, { detail: "The service cannot be reached: see that it runs, then try again." });
  }
}

async function problem(answer) {
  let said = {};
  try {
    said = await answer.json();
  } catch {} // not from the service itself, but from something before it
  return new Problem(answer.status, said);
}

function parsed(frame) {
  const event = { id: null, name: "message", data: "" };
  for (const line of frame.split("\n")) {
    if (line.startsWith("id: ")) event.id = line.slice(4);
    else if (line.startsWith("event: ")) event.name = line.slice(7);
    else if (line.startsWith("data: ")) event.data += line.slice(6);
  }
  return event.data ? { ...event, data: JSON.parse(event.data) } : null;
}

/** A name of our own for a request. `randomUUID` is missing where a page comes without TLS from another machine. */
function random() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join("");
}

// The key box. However many requests want a key at once, one box opens.

let asking = null;

/** Let the user give a key: whether one was given. */
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
  put(
    box,
    h(
      "form",
      { method: "dialog", on: { submit: give } },
      h("h2", { id: "key-title" }, "This service asks for a key"),
      refused && h("p", { class: "problem", role: "alert" }, "That key is not good here, or no longer."),
      h(
        "p",
        {},
        "Whoever runs the service makes one with ",
        h("code", {}, "palimpsest keys create"),
        ". It is kept in this tab until you close it, and is sent to this service only.",
      ),
      h("label", { for: "key-input" }, "Key"),
      input,
      h(
        "div",
        { class: "actions" },
        h("button", { class: "primary" }, "Use this key"),
        h("button", { type: "button", on: { click: () => box.close("") } }, "Not now"),
      ),
    ),
  );
  box.addEventListener(
    "close",
    () => {
      const given = box.returnValue === "given";
      put(box);
      if (given) changed();
      resolve(given);
    },
    { once: true },
  );
  box.returnValue = "";
  box.showModal();
  input.focus();
}
