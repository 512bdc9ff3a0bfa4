// Facts in a conversation: the fields of a form, and the sentence that a list shows.

import { h } from "./dom.js";
import { autoGrow, field } from "./components.js";
import { get } from "./service.js";

/** The fields that ask a sentence in a chat. They are hidden for a model without a chat template. */
export function chatFields(signal, changed = () => {}) {
  const asked = h("input", { type: "checkbox", name: "chat" });
  const answer = autoGrow(
    h("textarea", { name: "answer", rows: 1, spellcheck: "false", placeholder: "The Eiffel Tower is in" }),
  );
  const answerField = field("Beginning of the model's answer", answer, "optional: the model continues it with the object");
  const element = h(
    "div",
    { hidden: true },
    h("label", { class: "check" }, asked, h("span", {}, "In a chat: the sentence is a message of the user")),
    answerField,
  );
  let earlier = [];
  answerField.hidden = true;
  asked.addEventListener("change", () => {
    answerField.hidden = !asked.checked;
    changed();
  });
  get("/models", { signal }).then(
    ({ items: [model] }) => (element.hidden = !model?.chat),
    () => {}, // the status of the page says that the service does not answer
  );
  return {
    element,
    get checked() {
      return asked.checked;
    },
    /** The field of a request: the prompt, or the messages that it becomes. */
    form(prompt) {
      if (!asked.checked) return { prompt };
      const messages = [...earlier, { role: "user", content: prompt }];
      const begun = answer.value.trimEnd();
      return begun
        ? { messages: [...messages, { role: "assistant", content: begun }], continue_final_message: true }
        : { messages };
    },
    /** Fill the fields from a query that `queryOf` wrote. */
    take(query) {
      asked.checked = query.has("chat");
      answer.value = query.get("answer") ?? "";
      earlier = JSON.parse(query.get("earlier") ?? "[]");
      answerField.hidden = !asked.checked;
    },
    clear() {
      asked.checked = false;
      answer.value = "";
      earlier = [];
      answerField.hidden = true;
    },
  };
}

/** Return the fields of a form's query that state the fact of an edit or a trace. */
export function queryOf({ prompt, messages, continue_final_message: continued }) {
  if (!messages) return { prompt };
  const answer = continued ? messages.at(-1).content : "";
  const asked = continued ? messages.slice(0, -1) : messages;
  const earlier = asked.slice(0, -1);
  return {
    prompt: asked.at(-1)?.content ?? "",
    chat: "1",
    ...(answer ? { answer } : {}),
    ...(earlier.length ? { earlier: JSON.stringify(earlier) } : {}),
  };
}

/** Return the prompt of an edit or a trace; of a conversation the last message with the subject. */
export const statedPrompt = ({ prompt, messages }) =>
  messages?.findLast(({ content }) => content.includes("{}"))?.content ?? prompt;
