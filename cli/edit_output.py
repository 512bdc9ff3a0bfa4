"""Edits on the terminal: measurements as bars, and a fact in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rich.cells import cell_len
from rich.text import Text

from cli.job_output import JobJson
from cli.terminal import format_cell, format_pairs, out, probability_bar, strip_control_chars, truncate
from service.errors import InvalidInput

BAR_WIDTH = 14  # columns of a probability bar
MAX_OBJECT_WIDTH = 24  # columns


def parse_hparam(text: str) -> tuple[str, Any]:
    """Parse NAME=VALUE: `layers=[1,2]` -> ("layers", [1, 2]). A value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidInput(f"--hparam {text!r} is not of the form NAME=VALUE, such as --hparam steps=20.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def print_edit_result(edit: JobJson) -> None:
    """Print the probabilities before and after an edit, the generated texts, side effects and the conflicts."""
    result = edit.get("result") or {}
    if result:
        out.print(measurement_table(result))
    if rewrite := result.get("rewrite"):
        out.print(
            format_pairs({"text before": rewrite.get("text_before"), "text after": rewrite.get("text_after")})
        )
    if gate := result.get("gate"):
        out.print(strip_control_chars(gate_text(gate)))
        out.print(strip_control_chars(openings_text(result)))
    if ball := result.get("ball"):
        out.print(strip_control_chars(ball_text(ball)))
    for line in side_effect_lines(result):
        out.print(strip_control_chars(line))
    if search := result.get("layer_search"):
        out.print(strip_control_chars(layer_search_text(search)))
    superseded_ids = result.get("supersedes") or []
    for other in result.get("conflicts") or []:
        relation = "superseded" if other["edit"] in superseded_ids else "conflict"
        out.print(
            strip_control_chars(f"{relation}: {other['edit']}, {other['prompt']!r}: {other['target_new']}")
        )


def gate_text(gate: JobJson) -> str:
    """Return how well the gate of a gated edit distinguishes its subject."""
    verdict = "distinguished from others" if gate["is_apart"] else "not distinguished from others"
    advice = (
        ""
        if gate["is_apart"]
        else ". Other subjects may be changed, or wordings missed: compare `--form weights`, or raise `--hparam gate_threshold=`"
    )
    return (
        f"gated: the subject is {verdict} (its keys agree to {gate['agreement']:.2f}; the nearest other one, "
        f"{truncate(gate['nearest_source'].strip(), MAX_OBJECT_WIDTH)!r}, comes to {gate['nearest']:.2f}; it acts above {gate['threshold']:.2f}){advice}"
    )


def openings_text(result: JobJson) -> str:
    """Return at which token of its prompt a gated edit acts, and in how many of the other probes it does."""
    tokens = ", ".join(repr(token.strip()) for token in result["rewrite"]["opened"] or ()) or "no token"
    counts = [
        f"{sum(bool(probe['opened']) for probe in probes)} of {len(probes)} {name}"
        for name, probes in (("paraphrases", result["paraphrase"]), ("neighbors", result["neighborhood"]))
        if probes
    ]
    return f"it acts at {tokens} of its prompt" + "".join(f", in {count}" for count in counts)


def ball_text(ball: JobJson) -> str:
    """Return how far from its key the entry of a codebook acts."""
    radius = ball["radius"]
    acts = "in the ball of an earlier edit" if radius is None else f"within {radius:.2f} of its key"
    text = f"codebook: it acts {acts} (radius {ball['first_radius']:.2f})"
    if ball["nearest"] is None:
        return text
    return f"{text}; the nearest other key is {ball['nearest']:.2f} away, that of {ball['nearest_edit']}"


def side_effect_lines(result: JobJson) -> Iterator[str]:
    """Yield how many found probes are right, whether the model still names and describes the subject, and
    what else changed."""
    rewordings, neighbors = _found_probes(result, "paraphrase"), _found_probes(result, "neighborhood")
    if rewordings:
        follow = sum(map(_prefers_new, rewordings))
        yield f"paraphrases: the new object is the more probable one after {follow} of {len(rewordings)}"
    if _was_checked(result, "subject"):
        name = result["subject_name"]
        yield f"subject: named with p {format_cell(name['before'])} before and {format_cell(name['after'])} after, in a restatement"
    description = result.get("description_kl") or {}
    if _was_checked(result, "description"):
        before, after = format_cell(description["before"]), format_cell(description["after"])
        yield f"description: {after} nats per token from that of the base model, {before} before"
    side_effects = result.get("side_effects") or {}
    if neighbors:
        kept = side_effects["neighbors"] - side_effects["changed"]
        yield f"neighbors: {kept} of {side_effects['neighbors']} keep their answers"
    if side_effects.get("reason"):
        yield f"side effects: not measured ({side_effects['reason']})"
    for change in result.get("also_changed") or []:
        what = change["subject"] or change["prompt"]
        yield f"also changed: {what}: {change['before']} to {change['after'] or 'no answer'}"


def _was_checked(result: JobJson, name: str) -> bool:
    """Whether the guard judged a figure: the name of the subject only if the model knew it before the edit, and its
    description only if the request has a limit."""
    checks = (result.get("guard") or {}).get("checks") or []
    return any(check["name"] == name for check in checks)


def _found_probes(result: JobJson, kind: str) -> list[JobJson]:
    return [probe for probe in result.get(kind) or [] if not is_given(probe)]


def is_given(probe: JobJson) -> bool:
    """Whether the request gave a probe; otherwise the service found it."""
    return bool(probe.get("source", "request") == "request")


def _prefers_new(probe: JobJson) -> bool:
    new, true = probe["after"]["new"], probe["after"]["true"]
    return None not in (new, true) and bool(new > true)  # a figure that is not finite is null


def layer_search_text(search: JobJson) -> str:
    """Return which layer an edit without a recipe was made at, and the score of each layer that was tried."""
    tried = ", ".join(f"layer {trial['layer']}: {trial['score']:.3f}" for trial in search["tried"])
    return f"layer {search['layer']} chosen by the {search['criterion']} ({tried})"


def measurement_table(result: JobJson) -> Text:
    """Return each prompt, and below it the probabilities of its objects before and after as bars."""
    rows = [
        (what, format_cell(prompt), format_cell(name), *p)
        for what, prompt, name, *p in iter_measurements(result)
    ]
    width = max((min(MAX_OBJECT_WIDTH, cell_len(name)) for _, _, name, *_ in rows), default=0)
    text, last = Text().append(f"{'':{width}}  {'p before':<{BAR_WIDTH + 9}}p after", "bold"), ("", "")
    for what, prompt, name, before, after in rows:
        if (what, prompt) != last:
            text.append("\n").append(what, "bold").append(f": {prompt}")
        name, last = truncate(name, width), (what, prompt)
        text.append(
            f"\n{name}{' ' * (width - cell_len(name))}  {_format_probability(before)}  {_format_probability(after).rstrip()}"
        )
    return text


def _format_probability(p: float | None) -> str:
    return f"{format_cell(p):<5}  {probability_bar(p, BAR_WIDTH) if p is not None else '':{BAR_WIDTH}}"


def iter_measurements(result: JobJson) -> Iterator[tuple[Any, ...]]:
    """Yield (kind, prompt, object, before, after): both objects on the edited prompt, the expected one on each given
    probe."""
    for probe_kind, objects in (
        ("rewrite", ("new", "true")),
        ("paraphrase", ("new",)),
        ("neighborhood", ("true",)),
    ):
        probes = result.get(probe_kind) or []
        for probe in filter(is_given, [probes] if isinstance(probes, Mapping) else probes):
            for kind in objects if probe["new"] != probe["true"] else objects[:1]:
                yield probe_kind, probe["prompt"], probe[kind], probe["before"][kind], probe["after"][kind]


def status_text(edit: JobJson) -> str:
    """Return the status of an edit."""
    return f"{edit['status']} (dry run)" if edit.get("dry_run") else str(edit["status"])


def fact_text(item: JobJson) -> str:
    """Return a fact in one line: the prompt with its subject, and the new object. A revert has no object."""
    sentence, new_object = stated_text(item), object_text(item)
    return f"{sentence} → {new_object}" if new_object else sentence


def stated_text(item: JobJson) -> str:
    """Return a prompt with `{}` replaced by the subject; of a conversation the last message that has it."""
    contents = [str(m["content"]) for m in item.get("messages") or () if "{}" in str(m["content"])]
    text, count = (contents[-1], -1) if contents else (str(item.get("prompt") or "{}"), 1)
    return text.replace("{}", str(item.get("subject")), count)


def object_text(item: JobJson) -> str | None:
    """Return the new object of an edit or ledger entry; for `erase` and `amplify` the objective and the true object."""
    objective = item.get("objective") or "write"
    if objective == "write":
        return item.get("target_new")
    true_object = ((item.get("result") or {}).get("rewrite") or {}).get("true")
    return f"{objective} {item.get('resolved_true') or item.get('target_true') or true_object or 'the predicted object'}"
