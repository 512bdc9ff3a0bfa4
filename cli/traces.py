"""`trace`, `traces`, `traces show`: where a fact is stored, as heat maps in the terminal or as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cli.client import Client
from cli.edits import fetch_newest, format_minute, prompt_with_subject, report_job_failure, wait_for_job
from cli.terminal import err, format_cell, format_list, out, print_json, strip_control_chars
from cli.terminal_heatmap import HeatMap, Scores, render_heat_maps
from service.errors import InvalidInput

#: what a file's ending asks the service for
IMAGE_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
KIND_TITLES = {"hidden": "state", "mlp": "MLP", "attn": "attention"}
SEVERED_TITLES = {"none": "single state", "attn": "attention severed", "mlp": "MLP severed"}
COLOUR_SYSTEMS = ("256", "truecolor")  # the terminals with enough of them


def submit_trace(args: argparse.Namespace, client: Client) -> int:
    """Trace one statement, show it, and keep its picture if asked."""
    save = image_path(args)
    body: dict[str, Any] = {"prompt": args.prompt, "subject": args.subject, "version": args.version}
    if args.target:
        body["target"] = args.target
    if args.kinds:
        body["kinds"] = args.kinds.split(",")
    for name in ("samples", "window", "severed"):
        if getattr(args, name):
            body[name] = getattr(args, name)
    return print_trace(args, client, wait_for_job(client, client.post("/trace", body)), save)


def show_trace(args: argparse.Namespace, client: Client) -> int:
    """Draw a trace again."""
    return print_trace(args, client, client.get(f"/trace/{quote(args.id, safe='')}"), image_path(args))


def list_traces(args: argparse.Namespace, client: Client) -> int:
    """The newest traces."""
    items = fetch_newest(client, "/trace", args.limit)
    if args.json:
        print_json(items)
        return 0
    if not items:
        out.print("There are no traces.")
        return 0
    rows = [
        (t["id"], t["status"], t.get("version"), format_minute(t["created"]), prompt_with_subject(t["request"]["prompt"], t["request"]["subject"]))
        for t in items
    ]  # fmt: skip
    out.print(format_list(("id", "status", "version", "when (UTC)", "prompt"), rows, ("prompt",)))
    return 0


def image_path(args: argparse.Namespace) -> Path | None:
    """The file that is asked for, if it can be one."""
    save = Path(args.save) if args.save else None
    if save is not None and save.suffix.lower() not in IMAGE_TYPES:
        raise InvalidInput(f"--save {str(save)!r} names no picture: end it with .svg or .png.")
    return save


def print_trace(
    args: argparse.Namespace, client: Client, resource: Mapping[str, Any], save: Path | None
) -> int:
    """A trace that has ended: as maps or as JSON, and its picture."""
    if args.json:
        print_json(resource)
    if resource["status"] != "done":
        return report_job_failure("trace", resource)
    if not args.json:
        draw_trace(resource)
    if save is not None:
        save.write_bytes(client.picture(resource["links"]["self"], IMAGE_TYPES[save.suffix.lower()]))
        err.print(strip_control_chars(f"Saved {save}."))
    return 0


def draw_trace(resource: Mapping[str, Any]) -> None:
    """The maps of all kinds on one scale, what is strongest in each, and the severed paths if they were asked for."""
    result = resource["result"]
    tokens, low, kinds = result["tokens"], result["low"], result["kinds"]
    subject, answer = range(*result["subject"]["tokens"]), format_cell(result["answer"]["text"]).strip()
    high = max(max(map(max, found["scores"])) for found in kinds.values())
    coloured = out.color_system in COLOUR_SYSTEMS and not out.no_color
    out.print(strip_control_chars(f"{result['prompt']} → {answer}"))
    out.print(
        f"p = {result['high']:.3f}; {low:.3f} with the subject (*) blurred. A cell: p with one state put back.\n"
    )
    maps = [
        HeatMap(
            kind,
            KIND_TITLES.get(kind, kind),
            found["scores"],
            (found["best"]["token"], found["best"]["layer"]),
        )
        for kind, found in kinds.items()
    ]
    out.print(render_heat_maps(maps, tokens, subject, low, high, out.width, coloured))
    for heat_map in maps:
        in_subject = strongest_cell(heat_map.scores, subject)
        descriptions = [describe_cell(tokens, subject, heat_map.scores, heat_map.best or in_subject)]
        if heat_map.best != in_subject:
            descriptions.append(
                f"in the subject {describe_cell(tokens, subject, heat_map.scores, in_subject)}"
            )
        out.print(f"strongest {heat_map.title:<9}  {'; '.join(descriptions)}")
    if severed := result.get("severed"):
        rows = [severed["scores"][path] for path in SEVERED_TITLES]
        paths = HeatMap("hidden", f"{format_cell(tokens[severed['token']]).strip()}* put back", rows)
        out.print()
        out.print(
            render_heat_maps(
                [paths], list(SEVERED_TITLES.values()), range(0), low, high, out.width, coloured
            ),
            end="",
        )


def strongest_cell(scores: Scores, tokens: range) -> tuple[int, int]:
    """Token and layer of the highest score among some tokens."""
    return max(((t, m) for t in tokens for m in range(len(scores[t]))), key=lambda at: scores[at[0]][at[1]])


def describe_cell(tokens: Sequence[str], subject: range, scores: Scores, position: tuple[int, int]) -> str:
    """A cell in words."""
    token, layer = position
    star = "*" if token in subject else ""
    return f"{scores[token][layer]:.3f} at {format_cell(tokens[token]).strip()}{star}, layer {layer}"
