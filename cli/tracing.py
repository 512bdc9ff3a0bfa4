"""`trace`: where a fact is stored, as colour blocks in the terminal or as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.client import Client
from cli.edits import follow, unfinished
from cli.screen import cell, heat_map, lines, out
from service.errors import InvalidInput

#: what a file's ending asks the service for
PICTURES = {".svg": "image/svg+xml", ".png": "image/png"}


def trace(args: argparse.Namespace, client: Client) -> int:
    """Trace one statement, show it, and keep its picture if asked."""
    save = Path(args.save) if args.save else None
    if save is not None and save.suffix.lower() not in PICTURES:
        raise InvalidInput(f"--save {str(save)!r} names no picture: end it with .svg or .png.")
    body: dict[str, Any] = {"prompt": args.prompt, "subject": args.subject, "version": args.version}
    if args.target:
        body["target"] = args.target
    if args.kinds:
        body["kinds"] = args.kinds.split(",")
    for name in ("samples", "window"):
        if getattr(args, name):
            body[name] = getattr(args, name)
    ended = follow(client, client.post("/trace", body))
    if ended["status"] != "done":
        return unfinished("trace", ended)
    show(ended["result"])
    if save is not None:
        save.write_bytes(client.picture(ended["links"]["self"], PICTURES[save.suffix.lower()]))
        out.print(f"Saved {save}.")
    return 0


NAMES = {
    "hidden": "one hidden state",
    "mlp": "a window of MLP outputs",
    "attn": "a window of attention outputs",
}


def show(result: Mapping[str, Any]) -> None:
    """A heat map for each kind, in the order of the paper's figures."""
    tokens = result["tokens"]
    subject = range(*result["subject"]["tokens"])
    said = {"answer": result["answer"]["text"], "p clean": result["high"], "p corrupted": result["low"]}
    out.print(lines(said))
    coloured = bool(out.color_system) and not out.no_color
    for kind, found in result["kinds"].items():
        scores, best = found["scores"], found["best"]
        out.print(f"\np(answer) with {NAMES.get(kind, kind)} put back")
        out.print(
            heat_map(kind, tokens, scores, result["low"], max(map(max, scores)), subject, coloured), end=""
        )
        out.print(f"strongest: {cell(tokens[best['token']])} at layer {best['layer']}, {best['score']:.3f}")
