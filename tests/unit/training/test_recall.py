"""Recall of the table of facts: training/recall.py."""

from __future__ import annotations

import random

import torch
from recall import greedily_predicts

from tests.support.tiny_models import tiny

torch.set_num_threads(1)


def integer_tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """Tokenize a text of integers into these ids."""
    return {"input_ids": [int(word) for word in text.split()]}


def test_greedily_predicts_matches_greedy_generation() -> None:
    """An object counts as recalled exactly if greedy generation from its prompt gives its tokens."""
    model = tiny().model
    rng = random.Random(0)
    cases, expected = [], []
    for i in range(24):
        prompt = [rng.randrange(1, 300) for _ in range(rng.randint(1, 9))]
        ids = list(prompt)
        for _ in range(rng.randint(1, 4)):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        target = ids[len(prompt) :]
        if i % 3 == 0:
            wrong = rng.randrange(len(target))
            target[wrong] = (target[wrong] + 1) % 300
        cases.append((" ".join(map(str, prompt)), " ".join(map(str, target))))
        expected.append(i % 3 != 0)
    assert greedily_predicts(model, integer_tokenizer, cases, batch=7) == expected
