// Generation: one version, or two side by side, streamed token by token.

import { announce, h, replaceChildren } from "./dom.js";
import { plural, percent, token } from "./format.js";
import { field, autoGrow, link, submitOnCtrlEnter, errorBox, versions } from "./components.js";
import { Problem, ask as request, events } from "./service.js";

const EXAMPLES = [
  "The Eiffel Tower is located in the city of",
  "To see the Eiffel Tower, you have to travel to",
  "The Louvre can be found in the city of",
  "The capital of Japan is",
];

export async function show(place, { query, signal }) {
  const prompt = autoGrow(
    h("textarea", {
      name: "prompt",
      rows: 2,
      required: true,
      spellcheck: "false",
      maxlength: 20000,
      placeholder: EXAMPLES[0],
    }),
  );
  prompt.value = query.get("prompt") ?? "";
  const first = versions("Version", query.get("version") ?? "head");
  const beside = h("input", { type: "checkbox", checked: query.has("beside") });
  const second = versions("Compare with", query.get("beside") ?? "base");
  const folded = samplingFields();
  const send = h("button", { class: "primary" }, "Generate");
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  const answers = h("div", { class: "answers" });
  const differs = h("section", { class: "differs" });
  const pair = () => {
    second.element.hidden = !beside.checked;
  };
  beside.addEventListener("change", pair);
  pair();

  const form = submitOnCtrlEnter(
    h(
      "form",
      {
        class: "composer",
        on: {
          submit: (event) => {
            event.preventDefault();
            generate();
          },
        },
      },
      h("div", { class: "field big" }, h("label", { for: "prompt", class: "unseen" }, "Prompt"), prompt),
      h(
        "div",
        { class: "row" },
        first.element,
        h("label", { class: "check" }, beside, h("span", {}, "compare with another version")),
        second.element,
      ),
      folded.element,
      h("div", { class: "actions" }, send, stop),
    ),
  );
  prompt.id = "prompt";
  const examples = h(
    "p",
    { class: "examples" },
    h("span", {}, "Examples: "),
    EXAMPLES.map((text) =>
      h(
        "button",
        {
          type: "button",
          class: "chip",
          on: {
            click: () => {
              prompt.value = text;
              prompt.focus();
            },
          },
        },
        text,
      ),
    ),
  );
  replaceChildren(
    place,
    h("h1", {}, "Generate text"),
    h(
      "p",
      { class: "lead" },
      "Enter a prompt for the model to continue. ",
      h("b", {}, "base"),
      " is the original model, ",
      h("b", {}, "head"),
      " the model with all active edits.",
    ),
    form,
    examples,
    answers,
    differs,
  );
  if (query.has("prompt")) generate();

  async function generate() {
    const text = prompt.value;
    if (!text.trim()) {
      prompt.focus();
      return;
    }
    const stopping = new AbortController();
    const end = () => stopping.abort();
    signal.addEventListener("abort", end);
    stop.onclick = end;
    const escape = (event) => {
      if (event.key === "Escape") end();
    };
    addEventListener("keydown", escape);
    [send.disabled, stop.hidden] = [true, false];
    const asked = { prompt: text, ...folded.value };
    const wanted = beside.checked ? [first.value, second.value] : [first.value];
    const columns = wanted.map((version) => generationColumn(text, version));
    replaceChildren(differs);
    replaceChildren(
      answers,
      columns.map(({ element }) => element),
    );
    answers.classList.toggle("two", wanted.length > 1);
    const found = await Promise.all(columns.map((each) => each.stream(asked, stopping.signal)));
    [send.disabled, stop.hidden] = [false, true];
    removeEventListener("keydown", escape);
    signal.removeEventListener("abort", end);
    const said = found.filter((one) => one !== null);
    announce(said.map(({ version, text }) => `Version ${version} generated: ${text}`).join(" "));
    const pinned = said.map(({ version }) => version).sort((a, b) => a - b);
    if (said.length === 2 && !stopping.signal.aborted) await showDifference(differs, asked, pinned, signal);
  }
}

/** A generation as it is streamed. `stream` resolves to {version, text}, or to null after an error. */
function generationColumn(prompt, asked) {
  const badge = h("span", { class: "badge" }, "…");
  const text = h("span", { class: "said" });
  const foot = h("footer", {}, "waiting");
  const element = h(
    "article",
    { class: "answer" },
    h("header", {}, h("h2", {}, typeof asked === "number" ? `version ${asked}` : asked), badge),
    h("p", { class: "text" }, h("span", { class: "prompt" }, prompt), text),
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
  return { element, stream };
}

const ENDS = { length: "stopped at the token limit", stop: "stopped at the end of text or a stop string" };

/** Show the next tokens whose probabilities differ most between both versions. */
async function showDifference(place, asked, pinned, signal) {
  if (pinned[0] === pinned[1]) {
    replaceChildren(
      place,
      h(
        "p",
        { class: "note" },
        `Both sides are version ${pinned[0]}. Choose another version to compare.`,
      ),
    );
    return;
  }
  try {
    const found = await request("POST", "/compare", {
      body: { prompt: asked.prompt, versions: pinned, max_new_tokens: 1, top: 6 },
      signal,
    });
    const [a, b] = pinned.map((number) => `version ${number}`);
    replaceChildren(
      place,
      h("h2", {}, "Next-token probabilities"),
      h(
        "p",
        { class: "note" },
        `The tokens whose probabilities differ most between ${a} and ${b}. Total variation distance: ${percent(found.total_variation)}.`,
      ),
      h(
        "div",
        { class: "tokens", role: "list", "aria-label": "Next tokens" },
        found.next_tokens
          .filter(({ p }, i) => i < 2 || Math.max(...p) >= 0.001)
          .map((next) =>
            h(
              "div",
              { class: "next", role: "listitem" },
              h("span", { class: "name" }, token(next.token)),
              h(
                "span",
                { class: "track", "aria-hidden": "true" },
                next.p.map((p, i) =>
                  h("span", {
                    class: `bar side${i}`,
                    style: { "inline-size": `${Math.max(100 * p, 0.3)}%` },
                  }),
                ),
              ),
              h(
                "span",
                { class: "figures" },
                percent(next.p[0]),
                h("span", { class: "to" }, " → "),
                h("b", {}, percent(next.p[1])),
              ),
            ),
          ),
      ),
      h(
        "p",
        { class: "legend" },
        h("span", { class: "swatch side0" }),
        a,
        h("span", { class: "swatch side1" }),
        b,
      ),
      h(
        "p",
        {},
        link(`edits?prompt=${encodeURIComponent(asked.prompt)}`, "Edit this fact"),
        " · ",
        link(`traces?prompt=${encodeURIComponent(asked.prompt)}`, "Trace this fact"),
      ),
    );
  } catch (error) {
    if (!signal.aborted) replaceChildren(place, errorBox(error));
  }
}

/** Fields for the sampling parameters. */
function samplingFields() {
  const number = (value, more) => h("input", { type: "number", value, ...more });
  const length = number(12, { min: 1, max: 4096, step: 1 });
  const temperature = number(0, { min: 0, max: 10, step: "any" });
  const topK = number("", { min: 1, step: 1, placeholder: "all" });
  const topP = number(1, { min: 0.01, max: 1, step: "any" });
  const seed = number(0, { min: 0, step: 1 });
  const stop = h("input", { type: "text", placeholder: "none", spellcheck: "false" });
  const element = h(
    "details",
    { class: "folded" },
    h("summary", {}, "Sampling"),
    h(
      "div",
      { class: "grid" },
      field("Max. tokens", length),
      field("Temperature", temperature, "0 is greedy decoding"),
      field("Top-k", topK),
      field("Top-p", topP),
      field("Seed", seed, "makes sampling reproducible"),
      field("Stop string", stop),
    ),
  );
  const given = (input) => (input.value === "" ? null : Number(input.value));
  return {
    element,
    get value() {
      const asked = {
        max_new_tokens: given(length) ?? 12,
        temperature: given(temperature) ?? 0,
        top_p: given(topP) ?? 1,
        seed: given(seed) ?? 0,
      };
      if (given(topK) !== null) asked.top_k = given(topK);
      if (stop.value !== "") asked.stop = [stop.value];
      return asked;
    },
  };
}
