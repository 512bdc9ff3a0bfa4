// A conversation with two versions side by side, streamed, with the words that differ.

import { answerColumn, streamAnswers } from "./answer.js";
import { autoGrow, empty, field, link, submitOnCtrlEnter, versions } from "./components.js";
import { compareWords } from "./difference.js";
import { h, replaceChildren } from "./dom.js";
import { samplingFields } from "./sampling.js";
import { get } from "./service.js";
import { disableUntilServing } from "./status.js";

const EXAMPLES = ["What is the capital of Japan?", "In which city is the Eiffel Tower?"];
const MAX_NEW_TOKENS = 120;
/** The parameters of an address, by the names of the service. */
const SAMPLING = ["max_new_tokens", "temperature", "top_k", "top_p", "seed"];

export async function show(place, { query, signal }) {
  const title = h("h1", {}, "Chat");
  const [model] = (await get("/models", { signal })).items;
  if (!model.chat) {
    replaceChildren(place, title, withoutTemplate(model));
    return;
  }
  const sides = [versions("Left", query.get("left") ?? "base"), versions("Right", query.get("right") ?? "head")];
  const system = autoGrow(h("textarea", { rows: 2, spellcheck: "false", maxlength: 20000 }));
  system.value = query.get("system") ?? "";
  const folded = samplingFields(
    { max_new_tokens: MAX_NEW_TOKENS, ...askedSampling(query) },
    [field("System message", system, "empty: that of the chat template, if it has one")],
  );
  const question = autoGrow(
    h("textarea", { id: "question", rows: 2, required: true, spellcheck: "false", maxlength: 20000, placeholder: EXAMPLES[0] }),
  );
  const send = h("button", { class: "primary" }, "Send");
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  const again = h("button", { type: "button", on: { click: beginAgain } }, "New conversation");
  const turns = h("section", { class: "turns stack", "aria-label": "Conversation" });
  const address = h("p", { class: "note", hidden: true });
  let conversation = newConversation();

  const settings = h("div", { class: "composer" }, h("div", { class: "row" }, sides[0].element, sides[1].element), folded.element);

  const form = submitOnCtrlEnter(
    h(
      "form",
      { class: "composer", on: { submit: (event) => (event.preventDefault(), sendQuestion()) } },
      h("div", { class: "field big" }, h("label", { for: "question", class: "unseen" }, "Message"), question),
      settings,
      h("div", { class: "actions" }, send, stop, again),
    ),
  );
  const choose = (text) => {
    question.value = text;
    question.focus();
  };
  const examples = h(
    "p",
    { class: "examples" },
    h("span", {}, "Examples: "),
    EXAMPLES.map((text) => h("button", { type: "button", class: "chip", on: { click: () => choose(text) } }, text)),
  );
  replaceChildren(
    place,
    title,
    h("p", { class: "lead" }, "Both versions answer the same messages, each after its own answers. Words that only one of them says are marked."),
    turns,
    form,
    examples,
    address,
  );
  showSettings(true);
  disableUntilServing(send, form, "generate", signal);
  for (const text of query.getAll("q")) {
    if (signal.aborted) return;
    await answer(text, { save: false });
  }

  function newConversation() {
    return { questions: [], histories: [[], []], versions: sides.map(({ value }) => value), sampling: null, system: "" };
  }

  function beginAgain() {
    stop.click();
    conversation = newConversation();
    replaceChildren(turns);
    showSettings(true);
    address.hidden = true;
    history.replaceState(null, "", "#/chat");
    question.focus();
  }

  /** The versions and the sampling are those of a whole conversation: they are chosen before it. */
  function showSettings(shown) {
    settings.hidden = examples.hidden = !shown;
    again.hidden = !turns.hasChildNodes();
    question.placeholder = shown ? EXAMPLES[0] : "Next message";
  }

  async function sendQuestion() {
    const text = question.value;
    if (!text.trim() || send.disabled) {
      question.focus();
      return;
    }
    question.value = "";
    await answer(text);
    if (!signal.aborted) question.focus();
  }

  async function answer(text, { save = true } = {}) {
    const current = conversation;
    if (!current.questions.length) {
      current.versions = sides.map(({ value }) => value);
      current.sampling = folded.value;
      current.system = system.value.trim() ? system.value : "";
    }
    const columns = current.versions.map((version) => answerColumn(version));
    const answers = h("div", { class: "answers two" }, columns.map(({ element }) => element));
    const note = h("p", { class: "note", hidden: true });
    const turn = h("section", { class: "turn" }, h("h2", { class: "question" }, text), answers, note);
    turns.append(turn);
    showSettings(false);
    if (save) turn.scrollIntoView({ block: "start" });
    const asked = { role: "user", content: text };
    const first = current.system ? [{ role: "system", content: current.system }] : [];
    const requests = current.histories.map((messages) => ({
      ...current.sampling,
      messages: [...first, ...messages, asked],
    }));
    const { said, stopped } = await streamAnswers(columns, requests, { send, stop, signal });
    if (conversation !== current || signal.aborted) return;
    if (said.length < 2) {
      if (!current.questions.length) showSettings(true);
      if (save && !question.value) question.value = text;
      return; // a question without two answers is no part of the conversation
    }
    said.forEach((one, i) => current.histories[i].push(asked, { role: "assistant", content: one.text }));
    current.questions.push(text);
    current.versions = said.map(({ version }) => version);
    current.isComplete = (current.isComplete ?? true) && !stopped;
    markDifferences(columns, said, note);
    showAddress(current);
  }

  /** Write the conversation into the address of the page. A stopped answer cannot be reproduced. */
  function showAddress({ questions, versions: [left, right], sampling, system: asked, isComplete }) {
    address.hidden = !isComplete;
    if (!isComplete) return;
    const parameters = new URLSearchParams({ left, right });
    for (const name of SAMPLING) if (sampling[name] !== undefined) parameters.set(name, sampling[name]);
    if (sampling.stop) parameters.set("stop", sampling.stop[0]);
    if (asked) parameters.set("system", asked);
    for (const text of questions) parameters.append("q", text);
    history.replaceState(null, "", `#/chat?${parameters}`);
    replaceChildren(address, link(`chat?${parameters}`, "Address of this conversation"), ": it asks the same versions again.");
  }
}

/** The sampling parameters of an address. */
function askedSampling(query) {
  const asked = {};
  for (const name of SAMPLING) {
    const value = query.get(name);
    if (value !== null && Number.isFinite(Number(value))) asked[name] = Number(value);
  }
  if (query.has("stop")) asked.stop = [query.get("stop")];
  return asked;
}

/** Mark the words that only one side says. */
function markDifferences(columns, said, note) {
  const [left, right] = said;
  note.hidden = false;
  if (left.version === right.version) {
    note.textContent = `Both sides are version ${left.version}. Choose another version to compare.`;
    return;
  }
  if (left.text === right.text) {
    note.textContent = "Both versions give the same answer.";
    return;
  }
  note.hidden = true;
  compareWords(left.text, right.text).forEach((runs, side) =>
    replaceChildren(
      columns[side].text,
      runs.map(([text, common]) => (common ? text : marked(text, side ? "ins" : "del"))),
    ),
  );
}

/** Marked words, without the white space before them. */
function marked(text, tag) {
  const words = text.trimStart();
  return [text.slice(0, text.length - words.length), words && h(tag, { class: "word" }, words)];
}

const withoutTemplate = (model) =>
  empty(
    "No chat template",
    h(
      "p",
      {},
      `The model ${model.name} has no chat template, so it has no form for a conversation. `,
      link("generate", "Generate text"),
      " from a prompt instead, or start the service with a chat model.",
    ),
  );
