// The layers of an edit: the field of the form, and a trial of the edit at several layers.

import { FieldError, field, follow, whileDisabled } from "./components.js";
import { h, replaceChildren } from "./dom.js";
import { percent } from "./format.js";
import { post } from "./service.js";
import { onStatus, serviceStatus } from "./status.js";

/**
 * The field of the layers, filled with those of the recipe, and the button that tries some. `methodName` returns the
 * chosen method, and `request` the edit of the form.
 */
export function layerFields(signal, { methodName, request }) {
  const input = h("input", { type: "text", name: "layers", inputmode: "numeric", spellcheck: "false", autocomplete: "off" });
  const go = h("button", { type: "button", class: "small" }, "Try layers");
  const errorBox = h("div");
  const found = h("div", { class: "trials" });
  let filled = null; // the layers of the recipe that the field shows
  go.addEventListener("click", () => whileDisabled(go, errorBox, tryLayers));
  onStatus(() => refill(), signal);

  function refill() {
    const { model } = serviceStatus;
    if (!model) return;
    const layers = recipeLayers(model, methodName() || "rome");
    const open = !layers.length && model.recipe?.candidate_layers?.length;
    input.placeholder = open ? "chosen by the first edit" : "default of the method";
    if (filled === null ? input.value === "" : input.value === filled) input.value = layers.join(", ");
    filled = layers.join(", ");
  }

  async function tryLayers() {
    const edit = await post("/edits", { ...request(), dry_run: true, try_layers: true });
    await follow(found, `/edits/${edit.id}`, "The trial", { signal, ended: draw });
  }

  function draw(edit) {
    const search = edit.result?.layer_search;
    if (!search) throw new Error(edit.error?.detail ?? "The trial has no result.");
    const most = Math.max(...search.tried.map(({ score }) => score));
    replaceChildren(
      found,
      h("p", { class: "note" }, "The bar is the harmonic mean of three shares: the edit itself, other wordings, and what stays as it was."),
      h("ul", {}, search.tried.map((trial) => row(trial, trial.score === most && most > 0))),
    );
  }

  function row(trial, isBest) {
    const use = () => {
      input.value = String(trial.layer);
      input.focus();
    };
    return h(
      "li",
      { class: isBest ? "trial best" : "trial" },
      h("b", {}, `Layer ${trial.layer}`),
      h("span", { class: "track", "aria-hidden": "true" }, h("span", { class: "bar", style: { "inline-size": `${100 * trial.score}%` } })),
      h("span", { class: "figures" }, percent(trial.score)),
      h(
        "small",
        {},
        trial.reason ??
          `edit ${percent(trial.efficacy)}, wordings ${percent(trial.generality)}, others ${percent(trial.specificity)}`,
      ),
      h("button", { type: "button", class: "small", on: { click: use } }, "Use this layer", h("span", { class: "unseen" }, `: ${trial.layer}`)),
    );
  }

  return {
    element: h(
      "div",
      { class: "layers" },
      h("div", { class: "with-button" }, field("Layers", input, "numbers, as in 5 or 3, 4, 5"), go),
      errorBox,
      found,
    ),
    refill,
    /** The layers that differ from those of the recipe; null for the layers of the recipe. */
    get value() {
      const text = input.value.trim();
      if (text === "" || text === filled) return null;
      return text.split(/[\s,]+/).map((part) => {
        const count = serviceStatus.model?.layers;
        if (!/^\d+$/.test(part) || (count && Number(part) >= count))
          throw new FieldError(input, `“${part}” is no layer: enter numbers from 0 to ${count ? count - 1 : "the last one"}.`);
        return Number(part);
      });
    },
    set value(text) {
      input.value = text;
      filled = null;
      if (!text) refill();
    },
  };
}

/** The layers of the recipe for a method; none where the method or the first edit chooses them. */
function recipeLayers({ recipe, methods }, name) {
  const own = recipe?.methods?.[name]?.layers;
  if (own) return own;
  const closed = methods.find((method) => method.name === name)?.closed_form;
  return recipe && closed && !recipe.candidate_layers?.length ? recipe.rome.layers : [];
}
