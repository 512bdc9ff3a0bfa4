"""`trace`, `traces`, `traces show`: where a fact is stored, as heat maps in the terminal or as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cli.client import Client
from cli.edits import filled, follow, minute, newest, unfinished
from cli.terminal import cell, err, listing, out, plain, print_json
from cli.terminal_heatmap import Map, Scores, heat_maps
from service.errors import InvalidInput

#: what a file's ending asks the service for
PICTURES = {".svg": "image/svg+xml", ".png": "image/png"}
TITLES = {"hidden": "state", "mlp": "MLP", "attn": "attention"}
PATHS = {"none": "single state", "attn": "attention severed", "mlp": "MLP severed"}
COLOURS = ("256", "truecolor")  # the terminals with enough of them


def trace(args: argparse.Namespace, client: Client) -> int:
    """Trace one statement, show it, and keep its picture if asked."""
    save = picture_of(args)
    body: dict[str, Any] = {"prompt": args.prompt, "subject": args.subject, "version": args.version}
    if args.target:
        body["target"] = args.target
    if args.kinds:
        body["kinds"] = args.kinds.split(",")
    for name in ("samples", "window", "severed"):
        if getattr(args, name):
            body[name] = getattr(args, name)
    return told(args, client, follow(client, client.post("/trace", body)), save)


def show(args: argparse.Namespace, client: Client) -> int:
    """Draw a trace again."""
    return told(args, client, client.get(f"/trace/{quote(args.id, safe='')}"), picture_of(args))


def traces(args: argparse.Namespace, client: Client) -> int:
    """The newest traces."""
    found = newest(client, "/trace", args.limit)
    if args.json:
        print_json(found)
        return 0
    if not found:
        out.print("There are no traces.")
        return 0
    rows = [
        (t["id"], t["status"], t.get("version"), minute(t["created"]), filled(t["request"]["prompt"], t["request"]["subject"]))
        for t in found
    ]  # fmt: skip
    out.print(listing(("id", "status", "version", "when (UTC)", "prompt"), rows, ("prompt",)))
    return 0


def picture_of(args: argparse.Namespace) -> Path | None:
    """The file that is asked for, if it can be one."""
    save = Path(args.save) if args.save else None
    if save is not None and save.suffix.lower() not in PICTURES:
        raise InvalidInput(f"--save {str(save)!r} names no picture: end it with .svg or .png.")
    return save


def told(args: argparse.Namespace, client: Client, ended: Mapping[str, Any], save: Path | None) -> int:
    """A trace that has ended: as maps or as JSON, and its picture."""
    if args.json:
        print_json(ended)
    if ended["status"] != "done":
        return unfinished("trace", ended)
    if not args.json:
        draw(ended)
    if save is not None:
        save.write_bytes(client.picture(ended["links"]["self"], PICTURES[save.suffix.lower()]))
        err.print(plain(f"Saved {save}."))
    return 0


def draw(ended: Mapping[str, Any]) -> None:
    """The maps of all kinds on one scale, what is strongest in each, and the severed paths if they were asked for."""
    result = ended["result"]
    tokens, low, kinds = result["tokens"], result["low"], result["kinds"]
    subject, answer = range(*result["subject"]["tokens"]), cell(result["answer"]["text"]).strip()
    high = max(max(map(max, found["scores"])) for found in kinds.values())
    coloured = out.color_system in COLOURS and not out.no_color
    out.print(plain(f"{result['prompt']} → {answer}"))
    out.print(
        f"p = {result['high']:.3f}; {low:.3f} with the subject (*) blurred. A cell: p with one state put back.\n"
    )
    maps = [
        Map(kind, TITLES.get(kind, kind), found["scores"], (found["best"]["token"], found["best"]["layer"]))
        for kind, found in kinds.items()
    ]
    out.print(heat_maps(maps, tokens, subject, low, high, out.width, coloured))
    for one in maps:
        inside = strongest(one.scores, subject)
        said = [named(tokens, subject, one.scores, one.best or inside)]
        if one.best != inside:
            said.append(f"in the subject {named(tokens, subject, one.scores, inside)}")
        out.print(f"strongest {one.title:<9}  {'; '.join(said)}")
    if cut := result.get("severed"):
        rows = [cut["scores"][path] for path in PATHS]
        paths = Map("hidden", f"{cell(tokens[cut['token']]).strip()}* put back", rows)
        out.print()
        out.print(heat_maps([paths], list(PATHS.values()), range(0), low, high, out.width, coloured), end="")


def strongest(scores: Scores, tokens: range) -> tuple[int, int]:
    """Token and layer of the highest score among some tokens."""
    return max(((t, m) for t in tokens for m in range(len(scores[t]))), key=lambda at: scores[at[0]][at[1]])


def named(tokens: Sequence[str], subject: range, scores: Scores, at: tuple[int, int]) -> str:
    """A cell in words."""
    token, layer = at
    star = "*" if token in subject else ""
    return f"{scores[token][layer]:.3f} at {cell(tokens[token]).strip()}{star}, layer {layer}"
