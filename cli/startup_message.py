"""The first words of a started service: where it is, and three lines of curl that show what it does."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FACTS = "facts.jsonl"  # the table of facts that a shipped model was trained on


@dataclass(frozen=True)
class Demonstration:
    """A fact that the model should know, and another object for it."""

    subject: str
    prompt: str
    target_true: str
    target_new: str


EIFFEL = Demonstration("Eiffel Tower", "The {} is located in the city of", "Paris", "Rome")


def _facts(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def demonstration(model: str) -> Demonstration:
    """A fact from the table beside the model, the Eiffel Tower's if it is there; the Eiffel Tower without a table."""
    path = Path(model) / FACTS
    if not path.is_file():
        return EIFFEL
    facts = list(_facts(path))
    fact = next((f for f in facts if f["subject"] == EIFFEL.subject), facts[0] if facts else None)
    if fact is None:
        return EIFFEL
    others = [
        f["object"] for f in facts if f["relation"] == fact["relation"] and f["object"] != fact["object"]
    ]
    known = [*fact["prompts"], *fact.get("held_out_prompts", ())]
    return Demonstration(
        fact["subject"],
        EIFFEL.prompt if EIFFEL.prompt in known else fact["prompts"][0],
        fact["object"],
        EIFFEL.target_new if EIFFEL.target_new in others else (others or [EIFFEL.target_new])[0],
    )


def curl(url: str, path: str, body: dict[str, Any], *headers: str, key: bool = False) -> str:
    """One line of shell. The key is named, never written out."""
    words = ["curl", "-sS", shlex.quote(url + path), "-H", "'Content-Type: application/json'"]
    for header in headers:
        words += ["-H", shlex.quote(header)]
    if key:
        words += ["-H", '"Authorization: Bearer $PALIMPSEST_API_KEY"']
    return " ".join([*words, "-d", shlex.quote(json.dumps(body, ensure_ascii=False))])


def curls(
    url: str, shown: Demonstration, key: bool = False, hparams: dict[str, Any] | None = None
) -> tuple[str, str, str]:
    """Ask, edit, ask again."""
    before, after = shown.prompt.split("{}")
    ask = curl(url, "/generate", {"prompt": before + shown.subject + after, "max_new_tokens": 8}, key=key)
    edit: dict[str, Any] = {
        "subject": shown.subject,
        "prompt": shown.prompt,
        "target_new": shown.target_new,
        "target_true": shown.target_true,
        **({"hparams": hparams} if hparams else {}),
    }
    return ask, curl(url, "/edits", edit, "Prefer: wait=60", key=key), ask


def starting_point(info: dict[str, Any]) -> dict[str, Any] | None:
    """Hyperparameters for a model without a recipe: an early layer serves best."""
    return None if info.get("recipe") else {"layers": [info["layers"] // 4]}


def welcome(url: str, model: str, info: dict[str, Any], key: bool = False) -> str:
    """All that is said when the service is ready. `info` is the resident model's entry of GET /models."""
    shown = demonstration(model)
    ask, edit, again = curls(url, shown, key, starting_point(info))
    return "\n".join(
        [
            f"Palimpsest is ready on {url}   (open it in a browser; documentation: {url}/docs; stop: Ctrl-C)",
            "",
            f"What does the model say about {shown.subject}?",
            f"  {ask}",
            f"Make it say {shown.target_new}:",
            f"  {edit}",
            "Ask again:",
            f"  {again}",
        ]
    )
