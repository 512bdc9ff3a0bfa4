// Causal traces: the hidden states that carry a fact.

import { announce, h, replaceChildren } from "./dom.js";
import { figure, plural, percent, token, timeAgo } from "./format.js";
import { KINDS, heatmap, scale } from "./heatmap.js";
import { readout } from "./readout.js";
import {
  choice,
  empty,
  facts,
  field,
  follow,
  formPage,
  autoGrow,
  link,
  pill,
  raw,
  saveButtons,
  selectedText,
  submitOnCtrlEnter,
  table,
  versions,
  whileDisabled,
} from "./components.js";
import { chatFields, queryOf, statedPrompt } from "./conversation.js";
import { get, post } from "./service.js";
import { severed } from "./severed.js";
import { disableUntilServing } from "./status.js";

const [LEAST_MAP, GAP] = [210, 18]; // pixels: of a map beside others, and between two of them
const EXAMPLE = { prompt: "The Eiffel Tower is located in the city of", subject: "Eiffel Tower" };

export async function show(place, { id, query, signal }) {
  if (id) {
    await showTrace(place, id, signal);
    return;
  }
  const list = formPage(
    place,
    "Trace a fact",
    "Causal tracing adds noise to the subject's embeddings and then restores one hidden state at a time. States whose restoration recovers the answer carry the fact (Meng et al. 2022).",
    form(query, signal),
  );
  await showNewest(list, signal);
}

function form(query, signal) {
  const prompt = autoGrow(
    h("textarea", {
      id: "trace-prompt",
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
  const target = h("input", {
    type: "text",
    name: "target",
    spellcheck: "false",
    autocomplete: "off",
    placeholder: "default: the model's answer",
  });
  const mark = h(
    "button",
    {
      type: "button",
      on: {
        click: () => {
          const words = selectedText(prompt);
          if (words) subject.value = words;
          else prompt.focus();
        },
      },
    },
    "Use selection as subject",
  );
  const chat = chatFields(signal);
  const version = versions("Version", query.get("version") ?? "head");
  const kinds = Object.entries(KINDS).map(([kind, { words }]) => [
    kind,
    h("input", { type: "checkbox", checked: true }),
    words,
  ]);
  const cut = h("input", { type: "checkbox", checked: true });
  const window_ = h("input", { type: "number", min: 1, max: 100, value: 3 });
  const samples = h("input", { type: "number", min: 1, max: 100, value: 10 });
  const noise = h("input", { type: "text", value: "3sigma", spellcheck: "false" });
  const send = h("button", { class: "primary" }, "Run trace");
  const errorBox = h("div");
  const take = (one) => {
    prompt.value = one.prompt ?? "";
    subject.value = one.subject ?? "";
  };
  take({ prompt: query.get("prompt"), subject: query.get("subject") });
  chat.take(query);

  async function submit(event) {
    event.preventDefault();
    const wanted = kinds.filter(([, box]) => box.checked).map(([kind]) => kind);
    const trace = await whileDisabled(send, errorBox, () => {
      if (!wanted.length) throw new Error("Choose at least one of hidden state, MLP and attention.");
      return post("/trace", {
        ...chat.form(prompt.value.trimEnd()),
        subject: subject.value.trim(),
        kinds: wanted,
        severed: cut.checked,
        version: version.value,
        window: Number(window_.value),
        samples: Number(samples.value),
        noise: noise.value.trim(),
        ...(target.value.trim() ? { target: target.value.trim() } : {}),
      });
    });
    if (trace) location.hash = `#/traces/${trace.id}`;
  }
  const element = submitOnCtrlEnter(
    h(
      "form",
      { class: "sheet", on: { submit } },
      h(
        "div",
        { class: "field big" },
        h("label", { for: "trace-prompt" }, "Sentence, up to the answer"),
        prompt,
        h("div", { class: "under" }, h("small", {}, "The sentence contains the subject, or {} in its place."), mark),
      ),
      chat.element,
      h("div", { class: "grid two" }, field("Subject", subject), field("Answer", target)),
      version.element,
      h(
        "details",
        { class: "folded" },
        h("summary", {}, "Options"),
        h(
          "fieldset",
          { class: "checks-row" },
          h("legend", {}, "Restore"),
          kinds.map(([, box, words]) => h("label", { class: "check" }, box, h("span", {}, words))),
          h("label", { class: "check" }, cut, h("span", {}, "with severed paths")),
        ),
        h(
          "div",
          { class: "grid" },
          field("Window", window_, "layers restored at once for MLP and attention"),
          field("Noise samples", samples),
          field("Noise", noise, "a number, or a multiple of the embeddings' standard deviation"),
        ),
      ),
      errorBox,
      h(
        "div",
        { class: "actions" },
        send,
        h("button", { type: "button", on: { click: () => (chat.clear(), take(EXAMPLE)) } }, "Use example"),
      ),
    ),
  );
  disableUntilServing(send, element, "trace", signal);
  return element;
}

async function showNewest(place, signal) {
  const items = h("ol", { class: "listing" });
  const more = h("button", { type: "button", hidden: true }, "Load more");
  const errorBox = h("div");
  let cursor = null;
  more.onclick = () => whileDisabled(more, errorBox, load);
  replaceChildren(place, h("h2", {}, "Recent traces"), items, more, errorBox);
  await load();
  if (!items.children.length) {
    replaceChildren(
      place,
      h("h2", {}, "Recent traces"),
      empty(
        "No traces yet",
        h(
          "p",
          {},
          "“Use example” traces the location of the Eiffel Tower in the shipped GPT. Look for dark cells at the last token of the subject.",
        ),
      ),
    );
  }
  async function load() {
    const page = await get(`/trace?limit=12${cursor ? `&cursor=${encodeURIComponent(cursor)}` : ""}`, {
      signal,
    });
    items.append(
      ...page.items.map((trace) =>
        h(
          "li",
          {},
          h(
            "a",
            { href: `#/traces/${trace.id}` },
            statedPrompt(trace.request).replaceAll("{}", () => trace.request.subject),
            trace.result && h("b", {}, ` ${trace.result.answer.text}`),
          ),
          h(
            "span",
            { class: "meta" },
            pill(trace.status),
            h(
              "span",
              {},
              `${trace.version === null ? "" : `version ${trace.version} · `}${timeAgo(trace.created)}`,
            ),
          ),
        ),
      ),
    );
    cursor = page.next;
    more.hidden = !cursor;
  }
}

async function showTrace(place, id, signal) {
  const path = `/trace/${encodeURIComponent(id)}`;
  draw(await get(path, { signal }));

  function draw(trace) {
    const open = trace.status === "queued" || trace.status === "running";
    const live = h("div");
    const { subject } = trace.request;
    replaceChildren(
      place,
      h("p", { class: "crumbs" }, link("traces", "Traces")),
      h(
        "header",
        { class: "title" },
        h(
          "h1",
          { class: "sentence" },
          statedPrompt(trace.request).replaceAll("{}", () => subject),
          trace.result && [" ", h("ins", { class: "over" }, trace.result.answer.text)],
        ),
        h(
          "p",
          { class: "meta" },
          pill(trace.status),
          h(
            "span",
            {},
            [trace.version === null ? null : `version ${trace.version}`, timeAgo(trace.created)]
              .filter(Boolean)
              .join(" · "),
          ),
        ),
      ),
      open
        ? live
        : [
            trace.error && h("div", { class: "problem" }, h("p", {}, trace.error.detail)),
            trace.result && maps(trace, signal),
            raw(trace),
          ],
    );
    if (open) follow(live, path, "The trace", { signal, ended: draw });
  }
}

function maps(trace, signal) {
  const { result } = trace;
  const stage = h("div", { class: "stage" });
  const side = h("div", { class: "side" });
  const kinds = Object.keys(result.kinds);
  const tabs = [
    ...(kinds.length > 1 ? [["all", "all"]] : []),
    ...Object.keys(result.kinds).map((kind) => [kind, KINDS[kind].words]),
    ...(result.severed ? [["severed", "severed"]] : []),
  ];
  const chosen = choice("Restored", tabs, { change: draw });
  const errorBox = h("div");
  const save = saveButtons(`/trace/${trace.id}`, trace.id, errorBox);
  let shown = tabs[0][0];
  function draw(kind = shown) {
    if (kind !== shown) announce(`Restored: ${tabs.find(([name]) => name === kind)[1]}.`);
    shown = kind;
    const width = Math.max(stage.clientWidth || 640, 240);
    if (kind === "all") {
      drawAll(width);
      return;
    }
    const map = kind === "severed" ? severed(result, width) : heatmap(result, kind, width);
    replaceChildren(stage, map.element);
    replaceChildren(side, map.readout, map.legend ?? scale(result, kind));
  }
  /** Every kind on one scale, as in the downloads: side by side where there is room, else one below the other. */
  function drawAll(width) {
    const share = readout();
    const column = width / kinds.length >= LEAST_MAP ? (width - GAP * (kinds.length - 1)) / kinds.length : width;
    replaceChildren(
      stage,
      h(
        "div",
        { class: "maps" },
        kinds.map((kind) =>
          h("figure", {}, h("figcaption", {}, KINDS[kind].words), heatmap(result, kind, column, share).element),
        ),
      ),
    );
    replaceChildren(side, share.element, kinds.map((kind) => scale(result, kind)));
  }
  let drawn = 0; // width of the last drawing in pixels
  const watcher = new ResizeObserver(() => {
    if (stage.clientWidth === drawn) return;
    drawn = stage.clientWidth;
    draw();
  });
  watcher.observe(stage);
  signal.addEventListener("abort", () => watcher.disconnect());
  const answer = token(result.answer.text);
  return [
    h(
      "p",
      { class: "lead" },
      "The model answers ",
      h("b", {}, answer),
      ` with probability ${percent(result.high)}. With noise on `,
      h("b", {}, result.subject.text),
      result.subject.mentions?.length > 1 ? ` at its ${result.subject.mentions.length} mentions` : "",
      ` the probability is ${percent(result.low)}. Each cell shows the probability with one state restored.`,
    ),
    h("section", { class: "map" }, chosen.element, h("div", { class: "map-body" }, stage, side)),
    h(
      "div",
      { class: "actions" },
      save("Download SVG", "image/svg+xml", "svg"),
      save("Download PNG", "image/png", "png"),
      h(
        "a",
        {
          class: "button",
          href: `#/edits?${new URLSearchParams({ ...queryOf({ ...trace.request, prompt: result.prompt }), subject: trace.request.subject, target_true: result.answer.text })}`,
        },
        "Edit this fact",
      ),
    ),
    errorBox,
    h("section", {}, h("h2", {}, "Strongest states"), best(result)),
    h(
      "section",
      {},
      h("h2", {}, "Details"),
      facts([
        ["Samples", figure(result.samples)],
        [
          "Noise",
          `${result.noise.factor === null ? "" : `${result.noise.factor} σ = `}${figure(result.noise.level)}`,
        ],
        ["Window", plural(result.window, "layer")],
        ["Total effect", percent(result.total_effect)],
        ["Id", h("code", {}, trace.id)],
      ]),
    ),
  ];
}

/** For each kind, the cell with the highest probability within the subject, and overall. */
function best(result) {
  const [first, last] = result.subject.tokens;
  const rows = Object.entries(result.kinds).flatMap(([kind, { best: anywhere, scores }]) => {
    const own = scores
      .slice(first, last)
      .flatMap((row, t) => row.map((score, layer) => ({ token: first + t, layer, score })))
      .reduce((a, b) => (b.score > a.score ? b : a));
    return [
      [own, "in the subject"],
      [anywhere, "anywhere"],
    ].map(([at, where]) => [
      KINDS[kind].words,
      where,
      h("b", {}, token(result.tokens[at.token])),
      String(at.layer),
      percent(at.score),
      percent(result.total_effect > 0 ? Math.max(0, (at.score - result.low) / result.total_effect) : null),
    ]);
  });
  return table(
    "Best cells",
    [["restored"], ["best"], ["token"], ["layer", true], ["probability", true], ["of the effect", true]],
    rows,
  );
}
