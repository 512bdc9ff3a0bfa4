"""The message of a started service: its address, and three curl commands that show an edit."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.datasets.fact_table import find_facts_file


@dataclass(frozen=True)
class DemoFact:
    """A fact that the model should know, and a new object for it."""

    subject: str
    prompt: str
    target_true: str
    target_new: str


DEFAULT_DEMO = DemoFact("Eiffel Tower", "The {} is located in the city of", "Paris", "Rome")


def _read_facts(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def choose_demo(model: str) -> DemoFact:
    """Return a fact of the model's fact table, preferably that of the Eiffel Tower; DEFAULT_DEMO without a table."""
    path = find_facts_file(Path(model))
    if path is None:
        return DEFAULT_DEMO
    facts = list(_read_facts(path))
    fact = next((f for f in facts if f["subject"] == DEFAULT_DEMO.subject), facts[0] if facts else None)
    if fact is None:
        return DEFAULT_DEMO
    other_objects = [
        f["object"] for f in facts if f["relation"] == fact["relation"] and f["object"] != fact["object"]
    ]
    prompts = [*fact["prompts"], *fact.get("held_out_prompts", ())]
    return DemoFact(
        fact["subject"],
        DEFAULT_DEMO.prompt if DEFAULT_DEMO.prompt in prompts else fact["prompts"][0],
        fact["object"],
        DEFAULT_DEMO.target_new
        if DEFAULT_DEMO.target_new in other_objects
        else (other_objects or [DEFAULT_DEMO.target_new])[0],
    )


def curl_command(url: str, path: str, body: dict[str, Any], *headers: str, key: bool = False) -> str:
    """Return a curl command. The API key appears as a variable only."""
    words = ["curl", "-sS", shlex.quote(url + path), "-H", "'Content-Type: application/json'"]
    for header in headers:
        words += ["-H", shlex.quote(header)]
    if key:
        words += ["-H", '"Authorization: Bearer $PALIMPSEST_API_KEY"']
    return " ".join([*words, "-d", shlex.quote(json.dumps(body, ensure_ascii=False))])


def demo_commands(
    url: str, demo: DemoFact, key: bool = False, hparams: dict[str, Any] | None = None
) -> tuple[str, str, str]:
    """Return the commands that generate, edit, and generate again."""
    before, after = demo.prompt.split("{}")
    ask = curl_command(
        url, "/generate", {"prompt": before + demo.subject + after, "max_new_tokens": 8}, key=key
    )
    edit: dict[str, Any] = {
        "subject": demo.subject,
        "prompt": demo.prompt,
        "target_new": demo.target_new,
        "target_true": demo.target_true,
        **({"hparams": hparams} if hparams else {}),
    }
    return ask, curl_command(url, "/edits", edit, "Prefer: wait=60", key=key), ask


def default_hparams(info: dict[str, Any]) -> dict[str, Any] | None:
    """Return hyperparameters for a model without a recipe: an early layer."""
    return None if info.get("recipe") else {"layers": [info["layers"] // 4]}


def startup_message(url: str, model: str, info: dict[str, Any], notice: str = "", key: bool = False) -> str:
    """Return the startup message. `info` is the entry of the model in GET /models; `notice` says who needs a key."""
    demo = choose_demo(model)
    ask, edit, again = demo_commands(url, demo, key, default_hparams(info))
    return "\n".join(
        [
            f"Palimpsest is ready on {url}   (console: {url}, documentation: {url}/docs, stop: Ctrl-C)",
            *([notice] if notice else []),
            "",
            f"Generate a text about {demo.subject}:",
            f"  {ask}",
            f"Change its object to {demo.target_new}:",
            f"  {edit}",
            "Generate again:",
            f"  {again}",
        ]
    )
