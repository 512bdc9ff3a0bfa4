"""How probable objects are: service.models.scoring."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import MODEL_TYPES, TEXTS, tiny

from service.models import scoring
from service.models.hooks import replace
from service.models.loading import LoadedModel
from service.models.prompts import prompt_and_target
from service.models.scoring import log_prob_steps, log_probs, perplexity_steps
from service.progress import finish

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
