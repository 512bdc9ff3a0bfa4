"""`generate` and `compare`: the model speaks, at any version."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cli.client import Client, Refused
from cli.terminal import err, out, plain, print_json, table


def version(text: str) -> int | str:
    """`head`, `base` or a number, as the contract has it."""
    if text in ("head", "base"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no version: write head, base or a number") from None


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of the sampler; what was not is left to the service."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def generate(args: argparse.Namespace, client: Client) -> int:
    """The prompt and its continuation, as it comes; the whole answer at its end for a program."""
    body = {"prompt": args.prompt, "version": args.version, **sampling(args)}
    if args.json:
        print_json(client.post("/generate", body))
        return 0
    events = client.stream("/generate", {**body, "stream": True})
    begun = False
    for event in events:
        if event.name == "error":
            raise Refused(event.data.get("detail") or event.data.get("title") or "the generation failed.")
        if not begun:  # not before the service has agreed
            _say(args.prompt)
            begun = True
        if event.name == "restart":  # another worker begins the answer anew
            _say("\n" + args.prompt)
        elif event.name == "token":
            _say(event.data["text"])
        elif event.name == "end":
            _say("\n")
            choice = event.data["choices"][0]
            err.print(
                f"version {event.data['version']}, {len(choice['tokens'])} tokens, {choice['finish_reason']}",
                style="dim",
            )
            return 0
    raise Refused("the stream broke off before its end.")


def _say(text: str) -> None:
    sys.stdout.write(plain(text))
    sys.stdout.flush()


def compare(args: argparse.Namespace, client: Client) -> int:
    """Two versions side by side."""
    found = client.post("/compare", {"prompt": args.prompt, "versions": args.versions, **sampling(args)})
    if args.json:
        print_json(found)
        return 0
    sides = found["sides"]
    names = [f"version {side['version']}" for side in sides]
    for name, side in zip(names, sides, strict=True):
        out.print(f"{name}: {plain(args.prompt)}{plain(side['text'])}")
    rows = [(token["token"], *token["p"], token["p"][1] - token["p"][0]) for token in found["next_tokens"]]
    out.print()
    out.print(table("", ("next token", *names, "change"), rows))
    out.print()
    out.print(f"total variation {found['total_variation']:.3f}")
    return 0
