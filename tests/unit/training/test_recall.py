"""How much of its table a model recalls: training.recall."""

from __future__ import annotations

import random

import torch
from recall import says_object

from tests.support.tiny_models import tiny

torch.set_num_threads(1)


def numbers(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    """A tokenizer of ids in plain sight."""
    return {"input_ids": [int(word) for word in text.split()]}


def test_says_object_is_greedy_generation() -> None:
    """An object is said exactly when greedy generation, one prompt at a time, gives its tokens."""
    model = tiny().model
    rng = random.Random(0)
    cases, expected = [], []
    for i in range(24):
        prompt = [rng.randrange(1, 300) for _ in range(rng.randint(1, 9))]
        ids = list(prompt)
        for _ in range(rng.randint(1, 4)):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        said = ids[len(prompt) :]
        if i % 3 == 0:
            wrong = rng.randrange(len(said))
            said[wrong] = (said[wrong] + 1) % 300
        cases.append((" ".join(map(str, prompt)), " ".join(map(str, said))))
        expected.append(i % 3 != 0)
    assert says_object(model, numbers, cases, batch=7) == expected
