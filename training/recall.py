"""Recall of the table of facts: whether the object is the greedy continuation of the prompt.

python training/recall.py models/almanac
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from table import Fact
from transformers import AutoModelForCausalLM, AutoTokenizer

Tokenizer = Callable[..., Any]


@torch.no_grad()
def greedily_predicts(
    model: torch.nn.Module, tokenizer: Tokenizer, cases: list[tuple[str, str]], batch: int = 128
) -> list[bool]:
    """Return for each (prompt, object) whether the object's tokens are the greedy continuation of the prompt."""
    order = sorted(range(len(cases)), key=lambda i: len(cases[i][0]))
    result = [False] * len(cases)
    for at in range(0, len(order), batch):
        chosen = order[at : at + batch]
        prompts = [tokenizer(cases[i][0])["input_ids"] for i in chosen]
        targets = [tokenizer(" " + cases[i][1], add_special_tokens=False)["input_ids"] for i in chosen]
        width = max(len(p) + len(t) for p, t in zip(prompts, targets, strict=True))
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        for row, (p, t) in enumerate(zip(prompts, targets, strict=True)):
            ids[row, : len(p) + len(t)] = torch.tensor(p + t)
        best = model(ids).logits.argmax(-1)
        for row, (i, p, t) in enumerate(zip(chosen, prompts, targets, strict=True)):
            result[i] = best[row, len(p) - 1 : len(p) + len(t) - 1].tolist() == t
    return result


def fill_fact_prompt(fact: Fact | FactRow, prompt: str) -> str:
    return prompt.replace("{}", fact.subject)


def recall(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    facts: Sequence[Fact | FactRow],
    sample: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the share of facts recalled on trained prompts, on held-out prompts and after one to three statements."""
    model.eval()
    rng = random.Random(seed)
    chosen = facts if sample is None else rng.sample(facts, min(sample, len(facts)))
    trained, held_out, after_others = [], [], []
    for fact in chosen:
        prompts = fact.prompts if sample is None else [rng.choice(fact.prompts)]
        trained += [(fill_fact_prompt(fact, p), fact.object) for p in prompts]
        held_out += [(fill_fact_prompt(fact, p), fact.object) for p in fact.held_out_prompts]
        others = rng.sample(facts, rng.randint(1, 3))
        context = " ".join(f"{fill_fact_prompt(o, rng.choice(o.prompts))} {o.object}." for o in others)
        after_others.append((f"{context} {fill_fact_prompt(fact, rng.choice(fact.prompts))}", fact.object))
    figures = {}
    for name, cases in (("trained", trained), ("held_out", held_out), ("after_others", after_others)):
        hits = greedily_predicts(model, tokenizer, cases)
        figures[name] = round(sum(hits) / len(hits), 4)
    model.train()
    return figures


class FactRow:
    """One line of facts.jsonl."""

    def __init__(self, line: str) -> None:
        row = json.loads(line)
        self.subject, self.relation, self.object = row["subject"], row["relation"], row["object"]
        self.prompts, self.held_out_prompts = row["prompts"], row["held_out_prompts"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    p.add_argument("model", type=Path)
    p.add_argument("--sample", type=int, default=None, help="number of facts (default: all)")
    args = p.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = (args.model / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    print(json.dumps(recall(model, tokenizer, [FactRow(x) for x in lines], args.sample), indent=1))


if __name__ == "__main__":
    main()
