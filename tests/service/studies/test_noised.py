"""What a model says when the subject is noised: service.studies.noised."""

from __future__ import annotations

import torch
from tiny import tiny

from service.evaluation.records import Record
from service.models.hooks import capture
from service.studies.noised import noised, noised_answer
from service.tracing.noise import Level, draw

RECORD = Record("record 1", "Big Ben", "{} can be found in", "Rome", "London")


def test_the_noise_is_one_draw_at_the_subject() -> None:
    """The subject's embeddings carry the seed's noise, in every row and every pass alike; the others stay; then it is gone."""
    model = tiny()
    ids = torch.tensor([[5, 6, 7, 8]]).expand(2, -1)

    def seen() -> torch.Tensor:
        with capture({0: model.embedding}) as found, torch.no_grad():
            model.model(ids)
        return found[0]

    plain = seen()
    with noised(model, (1, 3), Level(0.5), seed=3):
        once, again = seen(), seen()
    assert torch.equal(once, again) and torch.equal(seen(), plain)
    assert torch.allclose(once[:, 1:3] - plain[:, 1:3], (0.5 * draw(1, 2, model.width, 3)).float(), atol=1e-6)
    assert torch.equal(once[:, 0], plain[:, 0]) and torch.equal(once[:, 3], plain[:, 3])


def test_the_answer_is_greedy_and_as_long_as_the_true_object() -> None:
    """Without noise it is the model's greedy continuation, token by token, with as many tokens as the true object has."""
    model = tiny()
    ids, _ = model.encode(RECORD.text)
    whole, _ = model.encode(RECORD.text + " London")
    said = list(ids)
    with torch.no_grad():
        for _ in range(len(whole) - len(ids)):
            said.append(int(model.model(torch.tensor([said])).logits[0, -1].argmax()))
    assert noised_answer(model, RECORD, Level(0.0), seed=1) == model.decode(said[len(ids) :])
    assert noised_answer(model, RECORD, Level(2.0), seed=1) == noised_answer(
        model, RECORD, Level(2.0), seed=1
    )
    assert len({noised_answer(model, RECORD, Level(2.0), seed=s) for s in range(5)}) > 1
