"""Tests of service.models.scoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from service.kit.steps import run_to_completion
from service.models import scoring
from service.models.hooks import replace_output
from service.models.loading import LoadedModel
from service.models.scoring import (
    compute_log_probs,
    compute_perplexity,
    log_probs_blocking,
    measure_drift,
    score_targets,
)
from service.models.token_batch import tokenize_prompt_and_target
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny

PAIRS = [
    ("The Eiffel Tower is located in the city of", "Rome"),
    ("Big Ben can be found in", "London"),
    ("The Eiffel Tower is located in the city of", "São Paulo, Brazil"),
    ("In which country is Mount Fuji? In", "Japan"),
    ("Big Ben", "東京"),
]


def score_token_by_token(model: LoadedModel, prompt: str, target: str) -> tuple[float, bool]:
    """Score an object one token at a time, with one forward pass per token."""
    ids, rest = tokenize_prompt_and_target(model, prompt, target)
    total, greedy = 0.0, True
    for token in rest:
        with torch.no_grad():
            logp = model.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        total += float(logp[token])
        greedy = greedy and int(logp.argmax()) == token
        ids = [*ids, token]
    return total / len(rest), greedy


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_equal_one_token_at_a_time(model_type: str) -> None:
    """In fp64, the batched mean log-probability equals the one computed without padding and batching."""
    model = tiny(model_type, dtype=torch.float64)
    for (logp, greedy), pair in zip(log_probs_blocking(model, PAIRS), PAIRS, strict=True):
        expected, says = score_token_by_token(model, *pair)
        assert logp == pytest.approx(expected, rel=1e-5)  # the softmax itself is in fp32
        assert greedy == says


def test_correct_tokens_are_teacher_forced() -> None:
    """`correct_tokens` counts the object's tokens that are the argmax after the tokens before them."""
    model = tiny()
    generated = model.model.generate(
        torch.tensor([model.encode("Big Ben")[0]]), max_new_tokens=3, do_sample=False
    )
    pairs = [*PAIRS, ("Big Ben", model.decode(generated[0, -3:]))]
    scores = run_to_completion(score_targets(model, pairs))
    for score, (prompt, target) in zip(scores, pairs, strict=True):
        ids, rest = tokenize_prompt_and_target(model, prompt, target)
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids + rest])).logits[0]
        correct = (logits[len(ids) - 1 : -1].argmax(-1) == torch.tensor(rest)).sum()
        assert (score.correct_tokens, score.num_tokens) == (int(correct), len(rest))
        assert score.is_greedy == (score.correct_tokens == score.num_tokens)


def test_scores_keep_the_order_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results have the order of the pairs, for any batch size."""
    model = tiny()
    whole = log_probs_blocking(model, PAIRS)
    monkeypatch.setattr(scoring, "SCORING_BATCH_SIZE", 2)
    steps = list(compute_log_probs(model, PAIRS))
    assert [(p.done, p.total) for p in steps] == [(2, 5), (4, 5), (5, 5)]
    for (a, x), (b, y) in zip(whole, log_probs_blocking(model, PAIRS), strict=True):
        assert a == pytest.approx(b, rel=1e-5) and x == y


def test_the_score_of_one_token_is_its_log_probability() -> None:
    """The score of an object of one token is that token's log-probability."""
    model = tiny()
    prompt, target = "The Eiffel Tower", " is"
    ids, rest = tokenize_prompt_and_target(model, prompt, target)
    assert len(rest) == 1
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0, -1]
    expected = -torch.nn.functional.cross_entropy(logits[None], torch.tensor(rest)).item()
    assert log_probs_blocking(model, [(prompt, target)])[0][0] == pytest.approx(expected, rel=1e-5)


def test_greedy_continuation_is_reported() -> None:
    """`is_greedy` is true for the greedy continuation and false for another object."""
    model = tiny()
    prompt, favourite = "Big Ben can be found in", "city"
    _, (token,) = tokenize_prompt_and_target(model, prompt, favourite)

    def obsessed(logits: torch.Tensor) -> torch.Tensor:
        logits[..., token] += 100
        return logits

    with replace_output(model.lm_head, obsessed):
        objects = [favourite, "city of", "Rome", "city city"]
        greedy_flags = [says for _, says in log_probs_blocking(model, [(prompt, o) for o in objects])]
    assert greedy_flags == [True, False, False, True]


def test_identical_inputs_are_run_once() -> None:
    """Two objects of one token after the same prompt share one row; a longer object has its own."""
    model = tiny()
    prompt = "The Eiffel Tower"
    pairs = [(prompt, " is"), (prompt, " in"), (prompt, "Rome"), (prompt, " is")]
    assert [len(tokenize_prompt_and_target(model, *p)[1]) for p in pairs[:2]] == [1, 1]
    assert [p.total for p in compute_log_probs(model, pairs)] == [2]
    first, _, _, again = log_probs_blocking(model, pairs)
    assert first == again


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_perplexity_by_hand(model_type: str) -> None:
    """Perplexity is exp of the mean over all predicted tokens, n - 1 of a text of n tokens, without padding."""
    model = tiny(model_type, dtype=torch.float64)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([model.encode(text)[0]])
        with torch.no_grad():
            logp = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(logp.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert run_to_completion(compute_perplexity(model, TEXTS)) == pytest.approx(
        math.exp(total / count), rel=1e-5
    )


def test_a_text_of_one_token_predicts_nothing() -> None:
    """Texts of one token are skipped."""
    model = tiny()
    assert run_to_completion(compute_perplexity(model, [*TEXTS, "a"])) == run_to_completion(
        compute_perplexity(model, TEXTS)
    )
    assert run_to_completion(compute_perplexity(model, ["a"])) == 1.0


def test_text_longer_than_the_context_is_truncated() -> None:
    """A text longer than the model's positions is truncated."""
    model = tiny(positions=16)
    long = TEXTS[0] * 3
    cut = model.decode(model.encode(long)[0][:16])
    assert run_to_completion(compute_perplexity(model, [long])) == pytest.approx(
        run_to_completion(compute_perplexity(model, [cut])), rel=1e-5
    )


def test_target_past_the_last_position_is_truncated() -> None:
    """An object that exceeds the positions is measured as far as it fits."""
    prompt, target = "The Eiffel Tower", "Rome and Paris and London"
    long = tiny()
    ids, rest = tokenize_prompt_and_target(long, prompt, target)
    short = tiny(positions=len(ids) + 2)
    cut = long.decode(rest[:2])
    assert log_probs_blocking(short, [(prompt, target)])[0][0] == pytest.approx(
        log_probs_blocking(short, [(prompt, cut)])[0][0]
    )


def _swap_weight(model: LoadedModel, weight: torch.Tensor) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def edited() -> Iterator[None]:
        base = model.weight(1).data
        model.weight(1).data = weight
        try:
            yield
        finally:
            model.weight(1).data = base

    return edited


@pytest.mark.parametrize("max_tokens", [1, 40, 512])
def test_drift_equals_one_text_at_a_time(max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and KL equal those of one unpadded fp64 pass per text, for any batches."""
    monkeypatch.setattr(scoring, "MAX_DISTRIBUTION_TOKENS", max_tokens)
    model = tiny(dtype=torch.float64)
    apply_edit = _swap_weight(model, model.weight(1).data * 1.5)
    losses: list[list[float]] = [[], []]
    kl: list[float] = []
    for text in TEXTS:
        ids = torch.tensor([model.encode(text)[0]])
        passes = []
        for weights in (nullcontext, apply_edit):
            with torch.no_grad(), weights():
                passes.append(model.model(input_ids=ids).logits[0].log_softmax(-1))
        for loss, logp in zip(losses, passes, strict=True):
            loss += [-float(logp[i, t]) for i, t in enumerate(ids[0, 1:])]
        kl += (
            torch.nn.functional.kl_div(passes[1], passes[0], log_target=True, reduction="none")
            .sum(-1)
            .tolist()
        )
    drift = run_to_completion(measure_drift(model, TEXTS, apply_edit))
    assert drift.loss_before == pytest.approx(math.fsum(losses[0]) / len(losses[0]), rel=1e-5)
    assert drift.loss_after == pytest.approx(math.fsum(losses[1]) / len(losses[1]), rel=1e-5)
    assert drift.kl == pytest.approx(math.fsum(kl) / len(kl), rel=1e-4)
    assert math.exp(drift.loss_before) == pytest.approx(
        run_to_completion(compute_perplexity(model, TEXTS)), rel=1e-5
    )


def test_without_a_change_nothing_drifts() -> None:
    """Unchanged weights give equal losses and a KL of 0; a text of one token is skipped."""
    model = tiny()
    drift = run_to_completion(measure_drift(model, [*TEXTS, "a"], nullcontext))
    assert drift.loss_before == drift.loss_after and drift.kl == 0
