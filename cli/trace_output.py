"""Traces on the terminal: heat maps and the strongest states."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from cli.job_output import JobJson, report_job_failure
from cli.terminal import err, format_cell, out, print_json, strip_control_chars
from cli.terminal_heatmap import HeatMap, Scores, render_heat_maps
from palimpsest import Client, Trace
from service.errors import InvalidInput

IMAGE_FORMATS = (".svg", ".png")
KIND_TITLES = {"hidden": "state", "mlp": "MLP", "attn": "attention"}
SEVERED_TITLES = {"none": "single state", "attn": "attention severed", "mlp": "MLP severed"}
COLOUR_SYSTEMS = ("256", "truecolor")  # terminals with enough colors


def add_save_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--save FILE`."""
    parser.add_argument("--save", metavar="FILE", help="also save the heat map as FILE.svg or FILE.png")


def image_path(args: argparse.Namespace) -> Path | None:
    """Return the file of --save; raise `InvalidInput` if the service cannot render its format."""
    save = Path(args.save) if args.save else None
    if save is not None and save.suffix.lower() not in IMAGE_FORMATS:
        raise InvalidInput(f"--save {str(save)!r} is not a picture: end the name with .svg or .png.")
    return save


def print_trace(args: argparse.Namespace, client: Client, trace: Trace, save: Path | None) -> int:
    """Print a finished trace as heat maps or as JSON, and save its picture."""
    if args.json:
        print_json(trace.raw)
    if trace.status != "done":
        return report_job_failure("trace", trace.raw)
    if not args.json:
        draw_trace(trace.raw)
    if save is not None:
        save.write_bytes(client.picture(trace, "svg" if save.suffix.lower() == ".svg" else "png"))
        err.print(strip_control_chars(f"Saved {save}."))
    return 0


def draw_trace(trace: JobJson) -> None:
    """Print the maps of all kinds on one scale, the strongest state of each, and the severed paths if they were
    traced."""
    result = trace["result"]
    tokens, low, kinds = result["tokens"], result["low"], result["kinds"]
    subject, answer = range(*result["subject"]["tokens"]), format_cell(result["answer"]["text"]).strip()
    mentions = result["subject"].get("mentions", [result["subject"]["tokens"]])
    corrupted = [token for mention in mentions for token in range(*mention)]
    high = max(max(map(max, kind["scores"])) for kind in kinds.values())
    coloured = out.color_system in COLOUR_SYSTEMS and not out.no_color
    out.print(strip_control_chars(f"{result['prompt']} → {answer}"))
    out.print(
        f"p = {result['high']:.3f}; {low:.3f} with noise on the subject (*). A cell: p with one state restored.\n"
    )
    maps = [
        HeatMap(
            kind,
            KIND_TITLES.get(kind, kind),
            scores["scores"],
            (scores["best"]["token"], scores["best"]["layer"]),
        )
        for kind, scores in kinds.items()
    ]
    out.print(render_heat_maps(maps, tokens, corrupted, low, high, out.width, coloured))
    for heat_map in maps:
        in_subject = strongest_cell(heat_map.scores, subject)
        descriptions = [describe_cell(tokens, corrupted, heat_map.scores, heat_map.best or in_subject)]
        if heat_map.best != in_subject:
            descriptions.append(
                f"in the subject {describe_cell(tokens, corrupted, heat_map.scores, in_subject)}"
            )
        out.print(f"strongest {heat_map.title:<9}  {'; '.join(descriptions)}")
    if severed := result.get("severed"):
        rows = [severed["scores"][path] for path in SEVERED_TITLES]
        paths = HeatMap("hidden", f"{format_cell(tokens[severed['token']]).strip()}* restored", rows)
        out.print()
        out.print(
            render_heat_maps(
                [paths], list(SEVERED_TITLES.values()), range(0), low, high, out.width, coloured
            ),
            end="",
        )


def strongest_cell(scores: Scores, tokens: range) -> tuple[int, int]:
    """Return token and layer of the highest score among some tokens."""
    return max(((t, m) for t in tokens for m in range(len(scores[t]))), key=lambda at: scores[at[0]][at[1]])


def describe_cell(
    tokens: Sequence[str], corrupted: Collection[int], scores: Scores, position: tuple[int, int]
) -> str:
    """Return the score and the position of a cell as text."""
    token, layer = position
    star = "*" if token in corrupted else ""
    return f"{scores[token][layer]:.3f} at {format_cell(tokens[token]).strip()}{star}, layer {layer}"
