"""The prompt and the sampling flags of `generate`, `compare` and `chat`."""

from __future__ import annotations

import argparse
from typing import Any

from cli.flags import positive_int

OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop")


def add_prompt(parser: argparse.ArgumentParser) -> None:
    """Add the prompt."""
    parser.add_argument("prompt", metavar="PROMPT", help="text to continue")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the sampling flags. The service has the defaults."""
    parser.add_argument("--max-new-tokens", type=positive_int, metavar="N", help="maximum number of tokens")
    parser.add_argument("--temperature", type=float, metavar="X", help="sampling temperature; 0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample from the N most probable tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="X", help="sample from the fewest tokens whose probabilities sum to X"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the sampler")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; repeatable")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the sampling options that the flags set."""
    return {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
