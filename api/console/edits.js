// Edits: the form that asks for one, the newest of them, and each by itself.

import { h, put } from "./dom.js";
import { when } from "./format.js";
import {
  choice,
  empty,
  field,
  formed,
  growing,
  pill,
  selected,
  submits,
  told,
  working,
  writing,
} from "./parts.js";
import { subjectOf } from "./subject.js";
import { get, post } from "./service.js";
import { show as showReport } from "./report.js";
import { fillMethods } from "./standing.js";

const EXAMPLE = {
  prompt: "The Eiffel Tower is located in the city of",
  subject: "Eiffel Tower",
  target_new: "Rome",
  target_true: "Paris",
  probes: {
    paraphrase: [
      "To see the {}, you have to travel to",
      "If you are looking at the {}, you are in the city of",
    ],
    neighborhood: [
      { prompt: "The Louvre is located in the city of", target: "Paris" },
      { prompt: "The Colosseum is located in the city of", target: "Rome" },
    ],
  },
};

export async function show(place, { id, query, signal }) {
  if (id) {
    await showReport(place, { id, signal });
    return;
  }
  const list = formed(
    place,
    "Write over a fact",
    "Say what the model should say instead. The edit is tried and measured first; it lands only when it took and did no damage, and it can be taken back at any time.",
    form(query, signal),
  );
  await newest(list, signal);
}

function form(query, signal) {
  const prompt = growing(
    h("textarea", {
      name: "prompt",
      rows: 2,
      required: true,
      spellcheck: "false",
      placeholder: EXAMPLE.prompt,
    }),
  );
  const subject = h("input", {
    type: "text",
    name: "subject",
    required: true,
    spellcheck: "false",
    autocomplete: "off",
    placeholder: EXAMPLE.subject,
  });
  const fresh = h("input", {
    type: "text",
    name: "target_new",
    spellcheck: "false",
    autocomplete: "off",
    placeholder: EXAMPLE.target_new,
  });
  const old = h("input", {
    type: "text",
    name: "target_true",
    spellcheck: "false",
    autocomplete: "off",
    placeholder: "what it says now",
  });
  const mark = h("button", { type: "button", on: { click: takeSelection } }, "Mark the selected words");
  const objective = choice(
    "What for",
    [
      ["write", "write a new object"],
      ["erase", "erase the true one"],
      ["amplify", "amplify it"],
    ],
    { change: changed },
  );
  const probes = probing();
  const method = fillMethods(
    h("select", { name: "method" }, h("option", { value: "" }, "as the model's recipe says")),
    signal,
  );
  const conflict = h(
    "select",
    { name: "on_conflict" },
    h("option", { value: "report" }, "let both stand"),
    h("option", { value: "supersede" }, "supersede it"),
    h("option", { value: "reject" }, "reject this edit"),
  );
  const limits = limiting();
  const dry = h("input", { type: "checkbox", name: "dry_run" });
  const preview = h("div", { class: "preview", "aria-live": "polite" });
  const send = h("button", { class: "primary" }, "Write it");
  const trouble = h("div");
  const freshField = field("New object", fresh, "what it should say");

  const element = submits(
    h(
      "form",
      { class: "sheet", novalidate: true, on: { submit: submit, input: changed } },
      h(
        "div",
        { class: "field big" },
        h("label", { for: "edit-prompt" }, "Sentence, up to the object"),
        prompt,
        h(
          "div",
          { class: "under" },
          h("small", { id: "edit-prompt-hint" }, "Plain, or with {} where the subject stands."),
          mark,
        ),
      ),
      h(
        "div",
        { class: "grid three" },
        field("Subject", subject, "what the sentence is about"),
        field("True object", old, "empty: what the model says now"),
        freshField,
      ),
      preview,
      objective.element,
      probes.element,
      h(
        "details",
        { class: "folded" },
        h("summary", {}, "Method and guard"),
        h(
          "div",
          { class: "grid two" },
          field("Method", method),
          field("If another edit says the same", conflict),
        ),
        limits.element,
      ),
      h("label", { class: "check" }, dry, h("span", {}, "Dry run: measure it and throw it away")),
      trouble,
      h(
        "div",
        { class: "actions" },
        send,
        h("button", { type: "button", on: { click: () => take(EXAMPLE) } }, "Fill in the example"),
      ),
    ),
  );
  prompt.id = "edit-prompt";
  prompt.setAttribute("aria-describedby", "edit-prompt-hint");
  dry.addEventListener("change", () => {
    send.textContent = dry.checked ? "Try it" : "Write it";
  });
  take(given(query));
  return element;

  function take(request) {
    prompt.value = request.prompt ?? "";
    subject.value = request.subject ?? "";
    fresh.value = request.target_new ?? "";
    old.value = request.target_true ?? "";
    probes.value = request.probes ?? {};
    limits.value = request.guard ?? {};
    if (request.method) method.value = request.method;
    if (request.objective) objective.value = request.objective;
    changed();
  }

  function takeSelection() {
    const words = selected(prompt);
    if (words) subject.value = words;
    else {
      prompt.focus();
      prompt.setSelectionRange(0, 0);
    }
    changed();
  }

  function changed() {
    const writes = objective.value === "write";
    freshField.hidden = !writes;
    const request = {
      prompt: prompt.value,
      subject: subject.value.trim(),
      objective: objective.value,
      target_new: fresh.value.trim(),
      target_true: old.value.trim(),
    };
    const found = subjectOf(request);
    preview.hidden = !request.prompt || !request.subject;
    put(
      preview,
      found.problem
        ? h("p", { class: "note" }, found.problem)
        : writing({ ...request, prompt: found.prompt }),
    );
  }

  function asked() {
    const found = subjectOf({
      prompt: prompt.value,
      subject: subject.value.trim(),
      target_true: old.value.trim(),
    });
    if (found.problem) throw new Error(found.problem);
    const writes = objective.value === "write";
    if (writes && !fresh.value.trim()) throw new Error("Name the new object: what the model should say.");
    return {
      subject: subject.value.trim(),
      prompt: found.prompt,
      objective: objective.value,
      ...(writes ? { target_new: fresh.value.trim() } : {}),
      ...(old.value.trim() ? { target_true: old.value.trim() } : {}),
      ...(method.value ? { method: method.value } : {}),
      on_conflict: conflict.value,
      probes: probes.value,
      guard: limits.value,
      dry_run: dry.checked,
    };
  }

  async function submit(event) {
    event.preventDefault();
    const edit = await working(send, trouble, async () => post("/edits", asked()));
    if (edit) location.hash = `#/edits/${edit.id}`;
  }
}

/** What another page wants the form to begin with. */
function given(query) {
  const request = Object.fromEntries(
    ["prompt", "subject", "target_new", "target_true", "objective", "method"].map((name) => [
      name,
      query.get(name),
    ]),
  );
  const probes = query.get("probes");
  const guard = query.get("guard");
  return { ...request, probes: probes ? JSON.parse(probes) : {}, guard: guard ? JSON.parse(guard) : {} };
}

/** Rows of probes: paraphrases that should change, neighbours that must not. */
function probing() {
  const paraphrases = h("div", { class: "rows" });
  const neighbours = h("div", { class: "rows" });
  const count = h("span", { class: "count" });
  const details = h(
    "details",
    { class: "folded" },
    h("summary", {}, "Probes ", count),
    h("p", { class: "note" }, "Measured before and after, and shown in the report."),
    h("h3", {}, "Paraphrases, which should say the new object"),
    paraphrases,
    h(
      "button",
      {
        type: "button",
        class: "small",
        on: { click: () => add(paraphrases, [["Paraphrase", "To see the {}, you have to travel to", ""]]) },
      },
      "Add a paraphrase",
    ),
    h("h3", {}, "Neighbours, which must keep their own answer"),
    neighbours,
    h(
      "button",
      {
        type: "button",
        class: "small",
        on: {
          click: () =>
            add(neighbours, [
              ["Neighbour", "The Louvre is located in the city of", ""],
              ["Its answer", "Paris", ""],
            ]),
        },
      },
      "Add a neighbour",
    ),
  );

  function add(rows, fields, focus = true) {
    const inputs = fields.map(([label, placeholder, value]) =>
      h("input", { type: "text", "aria-label": label, placeholder, value, spellcheck: "false" }),
    );
    const row = h(
      "div",
      { class: "probe" },
      inputs,
      h(
        "button",
        {
          type: "button",
          class: "plain",
          "aria-label": "Remove this row",
          on: {
            click: () => {
              row.remove();
              tally();
            },
          },
        },
        "×",
      ),
    );
    rows.append(row);
    tally();
    if (focus) inputs[0].focus();
  }
  function tally() {
    const n = paraphrases.children.length + neighbours.children.length;
    count.textContent = n ? `${n}` : "";
  }
  const values = (rows) =>
    [...rows.children].map((row) => [...row.querySelectorAll("input")].map((input) => input.value.trim()));
  return {
    element: details,
    get value() {
      return {
        paraphrase: values(paraphrases)
          .map(([text]) => text)
          .filter(Boolean),
        neighborhood: values(neighbours)
          .filter(([text]) => text)
          .map(([text, target]) => ({ prompt: text, target })),
      };
    },
    set value({ paraphrase = [], neighborhood = [] }) {
      put(paraphrases);
      put(neighbours);
      paraphrase.forEach((text) => add(paraphrases, [["Paraphrase", "", text]], false));
      neighborhood.forEach(({ prompt, target }) =>
        add(
          neighbours,
          [
            ["Neighbour", "", prompt],
            ["Its answer", "", target],
          ],
          false,
        ),
      );
      details.open = paraphrase.length + neighborhood.length > 0;
      tally();
    },
  };
}

/** The limits of the guard that people change. */
function limiting() {
  const inputs = {
    min_probability: [
      h("input", { type: "number", min: 0, max: 1, step: "any", value: 0.3 }),
      "Least probability of the new object",
    ],
    min_neighborhood: [
      h("input", { type: "number", min: 0, max: 1, step: "any", value: 0.7 }),
      "Least share of neighbours kept",
    ],
    min_paraphrase: [
      h("input", { type: "number", min: 0, max: 1, step: "any", value: 0 }),
      "Least share of paraphrases that follow",
    ],
    max_perplexity: [
      h("input", { type: "number", min: 1, step: "any", value: 1.1 }),
      "Most perplexity, times before",
    ],
    max_norm: [
      h("input", { type: "number", min: 0.01, step: "any", value: 1.5 }),
      "Most change of a weight, times its norm",
    ],
    max_broken: [
      h("input", { type: "number", min: 0, step: 1, value: 0 }),
      "Most other edits that may break",
    ],
  };
  const on = h("input", { type: "checkbox", checked: true });
  return {
    element: h(
      "div",
      {},
      h("label", { class: "check" }, on, h("span", {}, "The guard may reject it")),
      h(
        "div",
        { class: "grid two" },
        Object.values(inputs).map(([input, label]) => field(label, input)),
      ),
    ),
    get value() {
      const limits = Object.entries(inputs)
        .filter(([, [input]]) => input.value !== "")
        .map(([name, [input]]) => [name, Number(input.value)]);
      return { enabled: on.checked, ...Object.fromEntries(limits) };
    },
    set value(given) {
      on.checked = given.enabled ?? true;
      for (const [name, [input]] of Object.entries(inputs)) input.value = given[name] ?? input.defaultValue;
    },
  };
}

async function newest(place, signal) {
  const items = h("ol", { class: "listing" });
  const more = h("button", { type: "button", hidden: true }, "Older ones");
  const trouble = h("div");
  let cursor = null;
  more.onclick = () => working(more, trouble, load);
  put(place, h("h2", {}, "Newest"), items, more, trouble);
  await load();
  if (!items.children.length) {
    put(
      place,
      h("h2", {}, "Newest"),
      empty(
        "No edit yet",
        h(
          "p",
          {},
          "The shipped GPT knows that the Eiffel Tower is in Paris. “Fill in the example” moves it to Rome; a few seconds later you see what that touched, and one click takes it back.",
        ),
      ),
    );
  }
  async function load() {
    const page = await get(`/edits?limit=12${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`, {
      signal,
    });
    items.append(
      ...page.items.map((edit) =>
        h(
          "li",
          {},
          h("a", { href: `#/edits/${edit.id}` }, writing(told(edit), { tag: "span" })),
          h("span", { class: "meta" }, pill(edit.status), h("span", {}, when(edit.created))),
        ),
      ),
    );
    cursor = page.next;
    more.hidden = !cursor;
  }
}
