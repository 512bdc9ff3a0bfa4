// Edits: the form, the list, and the report of one edit.

import { h, replaceChildren } from "./dom.js";
import { timeAgo } from "./format.js";
import {
  choice,
  empty,
  field,
  formPage,
  autoGrow,
  link,
  pill,
  selectedText,
  submitOnCtrlEnter,
  withTrueObject,
  whileDisabled,
  factLine,
  FieldError,
} from "./components.js";
import { chatFields, statedPrompt } from "./conversation.js";
import * as editTable from "./edit_table.js";
import { subjectOf } from "./subject.js";
import { get, post } from "./service.js";
import { SEPARATORS, show as showReport } from "./report.js";
import { layerFields } from "./layers.js";
import { disableUntilServing, fillMethods } from "./status.js";

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
  if (id === "table") {
    await editTable.show(place, { signal });
    return;
  }
  if (id) {
    await showReport(place, { id, signal });
    return;
  }
  const list = formPage(
    place,
    "Edit a fact",
    "State the new object. The edit is evaluated first and applied only if it passes the guard. It can be reverted at any time.",
    form(query, signal),
  );
  await showNewest(list, signal);
}

function form(query, signal) {
  const prompt = autoGrow(
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
    placeholder: "current object",
  });
  const mark = h("button", { type: "button", on: { click: takeSelection } }, "Use selection as subject");
  const objective = choice(
    "Objective",
    [
      ["write", "write a new object"],
      ["erase", "erase the true object"],
      ["amplify", "amplify the true object"],
    ],
    { change: changed },
  );
  const probes = probeFields();
  const chat = chatFields(signal, changed);
  const method = fillMethods(
    h("select", { name: "method" }, h("option", { value: "" }, "default of the recipe")),
    signal,
  );
  const conflict = h(
    "select",
    { name: "on_conflict" },
    h("option", { value: "report" }, "keep both"),
    h("option", { value: "supersede" }, "supersede it"),
    h("option", { value: "reject" }, "reject this edit"),
  );
  const separator = h(
    "select",
    { name: "separator" },
    h("option", { value: "" }, "what the base model prefers"),
    h("option", { value: "space" }, "a space"),
    h("option", { value: "none" }, "nothing"),
  );
  const form = h(
    "select",
    { name: "form" },
    h("option", { value: "" }, "default of the service or the recipe"),
    h("option", { value: "weights" }, "in the weights"),
    h("option", { value: "gated" }, "gated: looked up where the subject stands"),
  );
  const batch = h("input", { type: "text", name: "batch", spellcheck: "false", autocomplete: "off" });
  const limits = guardFields();
  const layers = layerFields(signal, { methodName: () => method.value, request: () => asked({ forTrial: true }) });
  method.addEventListener("change", () => layers.refill());
  const dry = h("input", { type: "checkbox", name: "dry_run" });
  const preview = h("div", { class: "preview", "aria-live": "polite" });
  const send = h("button", { class: "primary" }, "Apply edit");
  const errorBox = h("div");
  const freshField = field("New object", fresh, "the object to write");

  const element = submitOnCtrlEnter(
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
          h("small", { id: "edit-prompt-hint" }, "A sentence that contains the subject, or {} in its place."),
          mark,
        ),
      ),
      chat.element,
      h(
        "div",
        { class: "grid three" },
        field("Subject", subject, "entity that the fact is about"),
        field("True object", old, "default: the model's answer"),
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
          field("Form", form),
          field("If it conflicts with an active edit", conflict),
          field("Between sentence and object", separator),
          field("Batch", batch, "a name that several edits share"),
        ),
        layers.element,
        limits.element,
      ),
      h("label", { class: "check" }, dry, h("span", {}, "Dry run: evaluate without applying")),
      errorBox,
      h(
        "div",
        { class: "actions" },
        send,
        h("button", { type: "button", on: { click: () => (chat.clear(), take(EXAMPLE)) } }, "Use example"),
        link("edits/table", "Edit a table of facts"),
      ),
    ),
  );
  prompt.id = "edit-prompt";
  prompt.setAttribute("aria-describedby", "edit-prompt-hint");
  dry.addEventListener("change", () => {
    send.textContent = dry.checked ? "Run dry run" : "Apply edit";
  });
  take(given(query));
  chat.take(query);
  changed();
  disableUntilServing(send, element, "edit", signal);
  return element;

  function take(request) {
    prompt.value = request.prompt ?? "";
    subject.value = request.subject ?? "";
    fresh.value = request.target_new ?? "";
    old.value = request.target_true ?? "";
    probes.value = request.probes ?? "auto";
    limits.value = request.guard ?? {};
    separator.value = request.separator ?? "";
    form.value = request.form ?? "";
    layers.value = request.layers ?? "";
    if (request.method) method.value = request.method;
    if (request.objective) objective.value = request.objective;
    changed();
  }

  function takeSelection() {
    const words = selectedText(prompt);
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
    const found = chat.checked ? request : subjectOf(request);
    preview.hidden = !request.prompt || !request.subject;
    replaceChildren(
      preview,
      found.problem
        ? h("p", { class: "note" }, found.problem)
        : factLine({ ...request, prompt: found.prompt }),
    );
  }

  function asked({ forTrial = false } = {}) {
    const stated = { prompt: prompt.value, subject: subject.value.trim(), target_true: old.value.trim() };
    const found = chat.checked ? { prompt: prompt.value.trim() } : subjectOf(stated);
    if (found.problem) throw new FieldError(stated.subject ? prompt : subject, found.problem);
    const writes = objective.value === "write";
    if (writes && !fresh.value.trim()) throw new FieldError(fresh, "Enter the new object.");
    const named = forTrial ? null : layers.value;
    return {
      subject: subject.value.trim(),
      ...chat.form(found.prompt),
      objective: objective.value,
      ...(writes ? { target_new: fresh.value.trim() } : {}),
      ...(old.value.trim() ? { target_true: old.value.trim() } : {}),
      ...(separator.value ? { separator: SEPARATORS[separator.value] } : {}),
      ...(form.value ? { form: form.value } : {}),
      ...(batch.value.trim() ? { batch: batch.value.trim() } : {}),
      ...(method.value ? { method: method.value } : {}),
      ...(named ? { hparams: { layers: named } } : {}),
      on_conflict: conflict.value,
      probes: probes.value,
      guard: limits.value,
      dry_run: dry.checked,
    };
  }

  async function submit(event) {
    event.preventDefault();
    const edit = await whileDisabled(send, errorBox, async () => post("/edits", asked()));
    if (edit) location.hash = `#/edits/${edit.id}`;
  }
}

/** Return the initial values of the form from the query of the address. */
function given(query) {
  const request = Object.fromEntries(
    ["prompt", "subject", "target_new", "target_true", "separator", "form", "objective", "method", "layers"].map((name) => [
      name,
      query.get(name),
    ]),
  );
  const probes = query.get("probes");
  const guard = query.get("guard");
  return { ...request, probes: probes ? JSON.parse(probes) : "auto", guard: guard ? JSON.parse(guard) : {} };
}

/** Fields for probes: paraphrases should follow the edit, neighbours must keep their answers. The service finds those of
 *  a kind of which none are given. */
function probeFields() {
  const auto = h("input", { type: "checkbox", name: "auto_probes", checked: true });
  const paraphrases = h("div", { class: "rows" });
  const neighbours = h("div", { class: "rows" });
  const count = h("span", { class: "count" });
  const details = h(
    "details",
    { class: "folded" },
    h("summary", {}, "Probes ", count),
    h("p", { class: "note" }, "Probes are measured before and after the edit."),
    h("label", { class: "check" }, auto, h("span", {}, "Find paraphrases or neighbours where none are given")),
    h("h3", {}, "Paraphrases: should give the new object"),
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
    h("h3", {}, "Neighbours: must keep their answers"),
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
              ["Answer", "Paris", ""],
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
      const orAuto = (given) => (given.length === 0 && auto.checked ? "auto" : given);
      return {
        paraphrase: orAuto(
          values(paraphrases)
            .map(([text]) => text)
            .filter(Boolean),
        ),
        neighborhood: orAuto(
          values(neighbours)
            .filter(([text]) => text)
            .map(([text, target]) => ({ prompt: text, target })),
        ),
      };
    },
    set value(probes) {
      const kinds = [probes.paraphrase ?? "auto", probes.neighborhood ?? "auto"];
      const [paraphrase, neighborhood] = kinds.map((given) => (given === "auto" ? [] : given));
      auto.checked = kinds.includes("auto");
      replaceChildren(paraphrases);
      replaceChildren(neighbours);
      paraphrase.forEach((text) => add(paraphrases, [["Paraphrase", "", text]], false));
      neighborhood.forEach(({ prompt, target }) =>
        add(
          neighbours,
          [
            ["Neighbour", "", prompt],
            ["Answer", "", target],
          ],
          false,
        ),
      );
      details.open = paraphrase.length + neighborhood.length > 0;
      tally();
    },
  };
}

/** Fields for the limits of the guard. */
function guardFields() {
  const inputs = {
    min_probability: [
      h("input", { type: "number", min: 0, max: 1, step: "any", value: 0.3 }),
      "Min. probability of the new object",
    ],
    min_neighborhood: [
      h("input", { type: "number", min: 0, max: 1, step: "any", value: 0.7 }),
      "Min. share of neighbours preserved",
    ],
    min_paraphrase: [
      h("input", { type: "number", min: 0, max: 1, step: "any", value: 0 }),
      "Min. share of paraphrases that follow",
    ],
    max_perplexity: [
      h("input", { type: "number", min: 1, step: "any", value: 1.1 }),
      "Max. perplexity ratio",
    ],
    max_norm: [
      h("input", { type: "number", min: 0.01, step: "any", value: 1.5 }),
      "Max. relative norm of the weight change",
    ],
    max_regressions: [
      h("input", { type: "number", min: 0, step: 1, value: 0 }),
      "Max. active edits that regress",
    ],
  };
  const on = h("input", { type: "checkbox", checked: true });
  return {
    element: h(
      "div",
      {},
      h("label", { class: "check" }, on, h("span", {}, "Reject the edit if it fails the guard")),
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

async function showNewest(place, signal) {
  const items = h("ol", { class: "listing" });
  const more = h("button", { type: "button", hidden: true }, "Load more");
  const errorBox = h("div");
  let cursor = null;
  more.onclick = () => whileDisabled(more, errorBox, load);
  replaceChildren(place, h("h2", {}, "Recent edits"), items, more, errorBox);
  await load();
  if (!items.children.length) {
    replaceChildren(
      place,
      h("h2", {}, "Recent edits"),
      empty(
        "No edits yet",
        h(
          "p",
          {},
          "The shipped GPT states that the Eiffel Tower is in Paris. “Use example” fills in an edit that changes it to Rome. The report shows its effects, and one click reverts it.",
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
          h("a", { href: `#/edits/${edit.id}` }, factLine({ ...withTrueObject(edit), prompt: statedPrompt(edit) }, { tag: "span" })),
          h("span", { class: "meta" }, pill(edit.status), h("span", {}, timeAgo(edit.created))),
        ),
      ),
    );
    cursor = page.next;
    more.hidden = !cursor;
  }
}
