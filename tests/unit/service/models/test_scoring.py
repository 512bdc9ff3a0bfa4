"""How probable objects are: service.models.scoring."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch

from service.kit.steps import finish
from service.models import scoring
from service.models.hooks import replace
from service.models.loading import LoadedModel
from service.models.scoring import drift_steps, log_prob_steps, log_probs, perplexity_steps, score_steps
from service.models.token_batch import prompt_and_target
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny

PAIRS = [
    ("The Eiffel Tower is located in the city of", "Rome"),
    ("Big Ben can be found in", "London"),
    ("The Eiffel Tower is located in the city of", "São Paulo, Brazil"),
    ("In which country is Mount Fuji? In", "Japan"),
    ("Big Ben", "東京"),
]


def by_hand(model: LoadedModel, prompt: str, target: str) -> tuple[float, bool]:
    """One token at a time: the model is asked again after each token of the object."""
    ids, rest = prompt_and_target(model, prompt, target)
    total, greedy = 0.0, True
    for token in rest:
        with torch.no_grad():
            logp = model.model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        total += float(logp[token])
        greedy = greedy and int(logp.argmax()) == token
        ids = [*ids, token]
    return total / len(rest), greedy


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_scores_equal_asking_one_token_at_a_time(model_type: str) -> None:
    """In fp64, the batched mean log-probability equals the sum by hand, unpadded and without company."""
    model = tiny(model_type, dtype=torch.float64)
    for (logp, greedy), pair in zip(log_probs(model, PAIRS), PAIRS, strict=True):
        expected, says = by_hand(model, *pair)
        assert logp == pytest.approx(expected, rel=1e-5)  # the softmax itself is in fp32
        assert greedy == says


def test_right_tokens_are_counted_with_those_before_them_given() -> None:
    """Of each object as many tokens are right as the model, asked after the tokens before, would say itself."""
    model = tiny()
    said = model.model.generate(torch.tensor([model.encode("Big Ben")[0]]), max_new_tokens=3, do_sample=False)
    pairs = [*PAIRS, ("Big Ben", model.decode(said[0, -3:]))]
    scores = finish(score_steps(model, pairs))
    for score, (prompt, target) in zip(scores, pairs, strict=True):
        ids, rest = prompt_and_target(model, prompt, target)
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids + rest])).logits[0]
        right = (logits[len(ids) - 1 : -1].argmax(-1) == torch.tensor(rest)).sum()
        assert (score.right, score.tokens) == (int(right), len(rest))
        assert score.says == (score.right == score.tokens)


def test_scores_come_in_the_order_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs are sorted by length for batching and handed back as they were given, whatever the batches are."""
    model = tiny()
    whole = log_probs(model, PAIRS)
    monkeypatch.setattr(scoring, "CHUNK", 2)
    steps = list(log_prob_steps(model, PAIRS))
    assert [(p.done, p.total) for p in steps] == [(2, 5), (4, 5), (5, 5)]
    for (a, x), (b, y) in zip(whole, log_probs(model, PAIRS), strict=True):
        assert a == pytest.approx(b, rel=1e-5) and x == y


def test_the_score_of_one_token_is_its_log_probability() -> None:
    """For an object of one token, the score is the negative log-likelihood of that token, turned around."""
    model = tiny()
    prompt, target = "The Eiffel Tower", " is"
    ids, rest = prompt_and_target(model, prompt, target)
    assert len(rest) == 1
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0, -1]
    expected = -torch.nn.functional.cross_entropy(logits[None], torch.tensor(rest)).item()
    assert log_probs(model, [(prompt, target)])[0][0] == pytest.approx(expected, rel=1e-5)


def test_the_greedy_continuation_is_known_as_such() -> None:
    """What the model itself says counts as said, every token of it; another object does not."""
    model = tiny()
    prompt, favourite = "Big Ben can be found in", "city"
    _, (token,) = prompt_and_target(model, prompt, favourite)

    def obsessed(logits: torch.Tensor) -> torch.Tensor:
        logits[..., token] += 100
        return logits

    with replace(model.head, obsessed):
        objects = [favourite, "city of", "Rome", "city city"]
        said = [says for _, says in log_probs(model, [(prompt, o) for o in objects])]
    assert said == [True, False, False, True]


def test_what_is_read_alike_is_read_once() -> None:
    """Two objects of one token after one prompt take one row; a longer object takes its own."""
    model = tiny()
    prompt = "The Eiffel Tower"
    pairs = [(prompt, " is"), (prompt, " in"), (prompt, "Rome"), (prompt, " is")]
    assert [len(prompt_and_target(model, *p)[1]) for p in pairs[:2]] == [1, 1]
    assert [p.total for p in log_prob_steps(model, pairs)] == [2]
    first, _, _, again = log_probs(model, pairs)
    assert first == again


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_perplexity_by_hand(model_type: str) -> None:
    """exp of the mean over all predicted tokens of all texts: n - 1 of a text of n tokens, none of its padding."""
    model = tiny(model_type, dtype=torch.float64)
    total, count = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([model.encode(text)[0]])
        with torch.no_grad():
            logp = model.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total -= float(logp.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert finish(perplexity_steps(model, TEXTS)) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_text_of_one_token_predicts_nothing() -> None:
    """Texts without a prediction are left out."""
    model = tiny()
    assert finish(perplexity_steps(model, [*TEXTS, "a"])) == finish(perplexity_steps(model, TEXTS))
    assert finish(perplexity_steps(model, ["a"])) == 1.0


def test_a_text_longer_than_the_model_is_cut() -> None:
    """A line of a corpus may be longer than the model's positions: what fits is measured."""
    model = tiny(positions=16)
    long = TEXTS[0] * 3
    cut = model.decode(model.encode(long)[0][:16])
    assert finish(perplexity_steps(model, [long])) == pytest.approx(
        finish(perplexity_steps(model, [cut])), rel=1e-5
    )


def test_an_object_past_the_last_position_is_cut() -> None:
    """An object longer than the room behind the prompt is measured as far as it fits, and nothing fails."""
    prompt, target = "The Eiffel Tower", "Rome and Paris and London"
    long = tiny()
    ids, rest = prompt_and_target(long, prompt, target)
    short = tiny(positions=len(ids) + 2)
    cut = long.decode(rest[:2])
    assert log_probs(short, [(prompt, target)])[0][0] == pytest.approx(
        log_probs(short, [(prompt, cut)])[0][0]
    )


def _edited(model: LoadedModel, weight: torch.Tensor) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def edited() -> Iterator[None]:
        base = model.weight(1).data
        model.weight(1).data = weight
        try:
            yield
        finally:
            model.weight(1).data = base

    return edited


@pytest.mark.parametrize("whole", [1, 40, 512])
def test_drift_equals_asking_one_text_at_a_time(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and KL equal, whatever the batches, those of one unpadded fp64 pass a text before and after."""
    monkeypatch.setattr(scoring, "WHOLE", whole)
    model = tiny(dtype=torch.float64)
    edited = _edited(model, model.weight(1).data * 1.5)
    losses, kl = [[], []], []
    for text in TEXTS:
        ids = torch.tensor([model.encode(text)[0]])
        passes = []
        for standing in (nullcontext, edited):
            with torch.no_grad(), standing():
                passes.append(model.model(input_ids=ids).logits[0].log_softmax(-1))
        for loss, logp in zip(losses, passes, strict=True):
            loss += [-float(logp[i, t]) for i, t in enumerate(ids[0, 1:])]
        kl += (
            torch.nn.functional.kl_div(passes[1], passes[0], log_target=True, reduction="none")
            .sum(-1)
            .tolist()
        )
    found = finish(drift_steps(model, TEXTS, edited))
    assert found.before == pytest.approx(math.fsum(losses[0]) / len(losses[0]), rel=1e-5)
    assert found.after == pytest.approx(math.fsum(losses[1]) / len(losses[1]), rel=1e-5)
    assert found.kl == pytest.approx(math.fsum(kl) / len(kl), rel=1e-4)
    assert math.exp(found.before) == pytest.approx(finish(perplexity_steps(model, TEXTS)), rel=1e-5)


def test_without_a_change_nothing_drifts() -> None:
    """The same weights give the same losses and a KL of 0; a text of one token is passed over."""
    model = tiny()
    found = finish(drift_steps(model, [*TEXTS, "a"], nullcontext))
    assert found.before == found.after and found.kl == 0
