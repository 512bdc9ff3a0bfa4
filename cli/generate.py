"""`generate` and `compare`: the model speaks, at any version."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cli.client import Client, ProblemResponse
from cli.terminal import err, out, print_json, strip_control_chars, table


def parse_version(text: str) -> int | str:
    """`head`, `base` or a number, as the contract has it."""
    if text in ("head", "base"):
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no version: write head, base or a number") from None


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was asked of the sampler; what was not is left to the service."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def generate(args: argparse.Namespace, client: Client) -> int:
    """The prompt and its continuation, as it comes; the whole answer at its end for a program."""
    body = {"prompt": args.prompt, "version": args.version, **sampling_options(args)}
    if args.json:
        print_json(client.post("/generate", body))
        return 0
    events = client.stream("/generate", {**body, "stream": True})
    started = False
    for event in events:
        if event.name == "error":
            raise ProblemResponse(
                event.data.get("detail") or event.data.get("title") or "the generation failed."
            )
        if not started:  # not before the service has agreed
            _write(args.prompt)
            started = True
        if event.name == "reset":  # another worker begins the answer anew
            _write("\n" + args.prompt)
        elif event.name == "token":
            _write(event.data["text"])
        elif event.name == "end":
            _write("\n")
            choice = event.data["choices"][0]
            err.print(
                f"version {event.data['version']}, {len(choice['tokens'])} tokens, {choice['finish_reason']}",
                style="dim",
            )
            return 0
    raise ProblemResponse("the stream broke off before its end.")


def _write(text: str) -> None:
    sys.stdout.write(strip_control_chars(text))
    sys.stdout.flush()


def compare(args: argparse.Namespace, client: Client) -> int:
    """Two versions side by side."""
    comparison = client.post(
        "/compare", {"prompt": args.prompt, "versions": args.versions, **sampling_options(args)}
    )
    if args.json:
        print_json(comparison)
        return 0
    sides = comparison["sides"]
    names = [f"version {side['version']}" for side in sides]
    for name, side in zip(names, sides, strict=True):
        out.print(f"{name}: {strip_control_chars(args.prompt)}{strip_control_chars(side['text'])}")
    rows = [
        (token["token"], *token["p"], token["p"][1] - token["p"][0]) for token in comparison["next_tokens"]
    ]
    out.print()
    out.print(table("", ("next token", *names, "change"), rows))
    out.print()
    out.print(f"total variation {comparison['total_variation']:.3f}")
    return 0
