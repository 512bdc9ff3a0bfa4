// Generation: one version, or two side by side, streamed token by token.

import { answerColumn, streamAnswers } from "./answer.js";
import { h, replaceChildren } from "./dom.js";
import { percent, token } from "./format.js";
import { autoGrow, link, submitOnCtrlEnter, errorBox, versions } from "./components.js";
import { samplingFields } from "./sampling.js";
import { ask as request } from "./service.js";
import { disableUntilServing } from "./status.js";

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
  const folded = samplingFields(samplingOf(query));
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
  disableUntilServing(send, form, "generate", signal);
  if (query.has("prompt")) generate();

  async function generate() {
    const text = prompt.value;
    if (!text.trim()) {
      prompt.focus();
      return;
    }
    const asked = { prompt: text, ...folded.value };
    const wanted = beside.checked ? [first.value, second.value].sort((a, b) => age(a) - age(b)) : [first.value];
    keepAddress({ prompt: text, version: first.value, beside: beside.checked ? second.value : null }, folded.value);
    const columns = wanted.map((version) => answerColumn(version, h("span", { class: "prompt" }, text)));
    replaceChildren(differs);
    replaceChildren(
      answers,
      columns.map(({ element }) => element),
    );
    answers.classList.toggle("two", wanted.length > 1);
    const { said, stopped } = await streamAnswers(columns, [asked, asked], { send, stop, signal });
    const pinned = said.map(({ version }) => version).sort((a, b) => a - b);
    if (said.length === 2 && !stopped) await showDifference(differs, asked, pinned, signal);
  }
}

/** The order of two versions beside each other: the older one left, so base first. That of a name is not known. */
const age = (version) => ({ base: 0, head: Infinity })[version] ?? (typeof version === "number" ? version : 1e9);

/** Return the sampling parameters of an address, by the names of the service. */
function samplingOf(query) {
  const numbers = ["max_new_tokens", "temperature", "top_k", "top_p", "seed"].filter((name) => query.has(name));
  const found = Object.fromEntries(numbers.map((name) => [name, Number(query.get(name))]));
  return query.has("stop") ? { ...found, stop: [query.get("stop")] } : found;
}

/** Make the address one that asks the same again. The one before it stays in the history. */
function keepAddress(asked, sampling) {
  const fields = Object.entries({ ...asked, ...sampling, stop: sampling.stop?.[0] ?? null });
  const address = `#/generate?${new URLSearchParams(fields.filter(([, value]) => value !== null))}`;
  if (address !== location.hash) history.pushState(null, "", address);
}

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
