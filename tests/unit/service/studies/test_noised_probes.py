"""Scores and answers under subject noise: service.studies.noised_probes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from service.datasets.record import NeighborProbe, Record
from service.evaluation.metrics import scoring_pairs
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt, locate_subject
from service.models.hooks import capture
from service.models.hooks import replace_output as hooked
from service.models.scoring import score_targets
from service.models.token_batch import tokenize_prompt_and_target, tokenize_statement
from service.studies.noised_probes import noised_greedy_answer, score_under_noise, subject_noise
from service.tracing.noise import NoiseLevel, draw_noise
from tests.support.tiny_models import tiny

RECORD = Record(
    "record 1", "Big Ben", "{} can be found in", "Rome", "London",
    ("The city of Big Ben is", "It lies in"), (NeighborProbe("Mount Fuji is in", "Japan"),),
)  # fmt: skip


def test_noise_is_the_first_draw_of_the_trace() -> None:
    """The noise has a row for each token of the subject and equals the first draw of a trace with the same seed and
    strength.
    """
    model = tiny()
    begin, end = tokenize_statement(model, fill_prompt(RECORD.prompt, RECORD.subject)).subject
    assert torch.equal(
        subject_noise(model, RECORD, NoiseLevel(0.5), 3),
        0.5 * draw_noise(7, end - begin, model.hidden_size, 3)[0],
    )


def test_answer_is_greedy_and_as_long_as_the_true_object() -> None:
    """Without noise the answer is the greedy continuation, with as many tokens as the true object."""
    model = tiny()
    ids, _ = model.encode(RECORD.text)
    whole, _ = model.encode(RECORD.text + " London")
    said = list(ids)
    with torch.no_grad():
        for _ in range(len(whole) - len(ids)):
            said.append(int(model.model(torch.tensor([said])).logits[0, -1].argmax()))
    quiet = subject_noise(model, RECORD, NoiseLevel(0.0), 1)
    assert noised_greedy_answer(model, RECORD, quiet) == model.decode(said[len(ids) :])
    answers = [
        noised_greedy_answer(model, RECORD, subject_noise(model, RECORD, NoiseLevel(2.0), s))
        for s in (1, 1, 2, 3, 4)
    ]
    assert answers[0] == answers[1] and len(set(answers)) > 1


def test_scores_without_noise_are_unchanged() -> None:
    """Noise of strength 0 changes no score."""
    model = tiny()
    plain = run_to_completion(score_targets(model, scoring_pairs(RECORD)))
    found = run_to_completion(
        score_under_noise(model, RECORD, subject_noise(model, RECORD, NoiseLevel(0.0), 1))
    )
    assert [s.log_p for s in found] == pytest.approx([s.log_p for s in plain], abs=1e-5)
    assert [s[1:4] for s in found] == [s[1:4] for s in plain]
    assert [[t.id for t in s.tokens] for s in found] == [[t.id for t in s.tokens] for s in plain]


@pytest.mark.parametrize("prompt", [RECORD.text, RECORD.paraphrases[0]])
def test_scores_match_a_pass_with_noised_embeddings(prompt: str) -> None:
    """Scores of prompt and paraphrase equal those of a forward pass with noise added to the subject's embeddings."""
    model = tiny()
    noise = subject_noise(model, RECORD, NoiseLevel(1.0), 1)
    found = run_to_completion(score_under_noise(model, RECORD, noise))
    at = next(i for i, pair in enumerate(scoring_pairs(RECORD)) if pair == (prompt, "London"))
    ids, target = tokenize_prompt_and_target(model, prompt, "London")
    begin, end = tokenize_statement(model, locate_subject(prompt, RECORD.subject)).subject
    size = min(end - begin, len(noise))

    def disturb(embedded: torch.Tensor) -> torch.Tensor:
        embedded[0, end - size : end] += noise[-size:].float()
        return embedded

    with torch.no_grad(), hooked(model.embedding, disturb):
        logp = model.model(torch.tensor([ids + target[:-1]])).logits[0, len(ids) - 1 :].log_softmax(-1)
    wanted = torch.tensor(target)
    assert found[at].log_p == pytest.approx(float(logp.gather(1, wanted[:, None]).mean()), abs=1e-5)


def test_other_subjects_are_not_noised() -> None:
    """A paraphrase without the subject and neighbours are scored without noise, and no hook remains."""
    model = tiny()
    plain = run_to_completion(score_targets(model, scoring_pairs(RECORD)))
    found = run_to_completion(
        score_under_noise(model, RECORD, subject_noise(model, RECORD, NoiseLevel(2.0), 1))
    )
    same = [s.log_p == pytest.approx(p.log_p, abs=1e-5) for s, p in zip(found, plain, strict=True)]
    assert same == [False] * 4 + [True] * 4
    with capture({0: model.embedding}) as seen:
        run_to_completion(score_targets(model, [("Big Ben", "Rome")]))
    again = replace(RECORD, paraphrases=(), neighbours=())
    assert (
        len(
            run_to_completion(
                score_under_noise(model, again, subject_noise(model, again, NoiseLevel(2.0), 1))
            )
        )
        == 2
    )
    assert torch.equal(seen[0][0, 0], model.embedding.weight[model.encode("Big Ben")[0][0]])  # type: ignore[index]
