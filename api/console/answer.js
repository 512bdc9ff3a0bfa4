// Answers of versions, streamed token by token.

import { announce, h, replaceChildren } from "./dom.js";
import { plural } from "./format.js";
import { errorBox } from "./components.js";
import { Problem, events } from "./service.js";

const ENDS = {
  length: "stopped at the token limit",
  stop: "stopped at the end of text or a stop string",
};

/**
 * Stream every column with its request; the button `stop` and the key Escape end them.
 * Resolves to the answers {version, text} that came, and whether they were stopped.
 */
export async function streamAnswers(columns, requests, { send, stop, signal }) {
  const stopping = new AbortController();
  const end = () => stopping.abort();
  signal.addEventListener("abort", end);
  stop.onclick = end;
  const escape = (event) => {
    if (event.key === "Escape") end();
  };
  addEventListener("keydown", escape);
  [send.disabled, stop.hidden] = [true, false];
  const found = await Promise.all(columns.map((each, i) => each.stream(requests[i], stopping.signal)));
  [send.disabled, stop.hidden] = [false, true];
  removeEventListener("keydown", escape);
  signal.removeEventListener("abort", end);
  const said = found.filter((one) => one !== null);
  announce(said.map(({ version, text }) => `Version ${version} generated: ${text}`).join(" "));
  return { said, stopped: stopping.signal.aborted };
}

const versionName = (asked) => (asked === 0 ? "base" : typeof asked === "number" ? `version ${asked}` : asked);

/**
 * The answer of a version as it is streamed, after the text `before`.
 * `stream` resolves to {version, text}, or to null after an error.
 */
export function answerColumn(asked, before = null) {
  const badge = h("span", { class: "badge" }, "…");
  const text = h("span", { class: "said" });
  const foot = h("footer", {}, "waiting");
  const element = h(
    "article",
    { class: "answer" },
    h("header", {}, h("h2", {}, versionName(asked)), badge),
    h("p", { class: "text" }, before, text),
    foot,
  );

  async function stream(body, signal) {
    let version = null;
    const name = (number) => {
      version = number;
      badge.textContent = `version ${number}`;
      badge.classList.add("known");
    };
    element.classList.add("generating");
    try {
      for await (const { name: kind, data } of events("POST", "/generate", {
        body: { ...body, version: asked, stream: true },
        signal,
      })) {
        if (kind === "reset") text.textContent = "";
        if (kind === "error") throw new Problem(503, data);
        if (kind === "token") {
          text.textContent += data.text;
          foot.textContent = "generating";
          name(data.version);
        }
        if (kind === "end") {
          const one = data.choices?.[0] ?? data;
          text.textContent = one.text;
          name(data.version);
          foot.textContent = `${plural(data.usage.completion_tokens, "token")} in ${data.seconds.toFixed(2)} s, ${ENDS[one.finish_reason] ?? one.finish_reason}`;
        }
      }
      return version === null ? null : { version, text: text.textContent };
    } catch (error) {
      if (signal.aborted) foot.textContent = "stopped";
      else replaceChildren(foot, errorBox(error));
      return signal.aborted && version !== null ? { version, text: text.textContent } : null;
    } finally {
      element.classList.remove("generating");
    }
  }
  return { element, text, stream };
}
