// The fields of the sampling parameters.

import { h } from "./dom.js";
import { field } from "./components.js";

/** Fields for the sampling parameters. `asked` has values that differ from the defaults, by the names of the service. */
export function samplingFields(asked = {}, more = []) {
  const number = (value, more) => h("input", { type: "number", value, ...more });
  const length = number(asked.max_new_tokens ?? 12, { min: 1, max: 4096, step: 1 });
  const temperature = number(asked.temperature ?? 0, { min: 0, max: 10, step: "any" });
  const topK = number(asked.top_k ?? "", { min: 1, step: 1, placeholder: "all" });
  const topP = number(asked.top_p ?? 1, { min: 0.01, max: 1, step: "any" });
  const seed = number(asked.seed ?? 0, { min: 0, step: 1 });
  const stop = h("input", { type: "text", value: asked.stop?.[0] ?? "", placeholder: "none", spellcheck: "false" });
  const element = h(
    "details",
    { class: "folded" },
    h("summary", {}, more.length ? "System message and sampling" : "Sampling"),
    more,
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
