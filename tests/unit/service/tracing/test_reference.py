"""The oracle: what must be true of any causal trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.kit.steps import finish
from service.kit.text import Statement, find
from service.models.hooks import replace
from service.models.loading import LoadedModel
from service.models.scoring import log_probs
from service.tracing.reference import KINDS, _pass, oracle_steps, window_of
from service.tracing.result import TraceResult
from service.tracing.trace_input import Question, ask
from tests.support.tiny_models import MODEL_TYPES, tiny

STATEMENT = find("In The Eiffel Tower is in", "Eiffel Tower")


def oracle(model: LoadedModel, statement: Statement = STATEMENT, **asked: Any) -> TraceResult:
    return finish(oracle_steps(model, statement, **({"samples": 2, "window": 3, "noise": 0.5} | asked)))


def question(model: LoadedModel, noise: float = 0.5) -> Question:
    return ask(model, STATEMENT, None, 2, noise, 1, None, ())


def close(a: Any, b: Any) -> bool:
    return bool(torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=1e-6))


def test_windows() -> None:
    """Ten layers around l are l-5 to l+4, three are l-1 to l+1, one is l alone; all cut off at the ends."""
    assert window_of(20, 10, 48) == (15, 25)
    assert window_of(20, 3, 48) == (19, 22)
    assert window_of(20, 1, 48) == (20, 21)
    assert window_of(0, 10, 48) == (0, 5) and window_of(47, 10, 48) == (42, 48)


def test_no_noise_no_effect() -> None:
    """Without noise every cell, and the low score, is the high score."""
    found = oracle(tiny(), noise=0.0, severed=True)
    assert close(found.low, found.high)
    for kind in KINDS:
        assert close(found.scores[kind], found.high)


def test_high_is_the_clean_probability() -> None:
    """The high score is the product of the answer's next-token probabilities in the clean model."""
    model = tiny()
    found = oracle(model, target="Paris", kinds=["hidden"])
    mean, _ = log_probs(model, [(STATEMENT.text, "Paris")])[0]
    n = len(found.answer_ids)
    assert n > 1
    assert found.high == pytest.approx(torch.tensor(mean * n).exp().item(), rel=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_causality_says(model_type: str) -> None:
    """Before the subject, and in the last layer before the last token, cells are low; the last state of all is high.

    The low score comes from a run of its own: were its noise another, none of this would hold.
    """
    found = oracle(tiny(model_type))
    hidden, before, last = found.scores["hidden"], found.subject[0], len(found.tokens) - 1
    assert before > 0 and abs(found.total_effect) > 1e-4
    for kind in KINDS:
        assert close(found.scores[kind][:before], found.low)
    assert close([row[-1] for row in hidden[:last]], found.low)
    assert close(hidden[last][-1], found.high)


def test_whole_layers_bring_all_back() -> None:
    """Restoring all positions at any block, or the subject at the embedding, gives the high score."""
    model = tiny()
    q = question(model)

    def clean(states: torch.Tensor) -> torch.Tensor:
        states[1:] = states[0]
        return states

    high = _pass(model, q)[0].expand(q.samples)
    assert not close(_pass(model, q)[1:], high)
    for layer in range(model.layers):
        with replace(model.block(layer), clean):
            assert close(_pass(model, q)[1:], high)
    still = ask(model, STATEMENT, None, 2, 0.0, 1, None, ())
    assert close(_pass(model, still)[1:], high)


def test_a_window_of_one_by_hand() -> None:
    """A window of one layer restores the module output of that layer and token, and nothing else."""
    model = tiny()
    q = question(model)
    found = oracle(model, window=1, kinds=["mlp"])
    token = q.subject[1] - 1

    def clean(outputs: torch.Tensor) -> torch.Tensor:
        outputs[1:, token] = outputs[0, token]
        return outputs

    for layer in range(model.layers):
        with replace(model.down(layer), clean):
            assert close(found.scores["mlp"][token][layer], _pass(model, q)[1:].mean())


@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_severed_paths(model_type: str) -> None:
    """Above the last block there is no path left to cut, so there the severed score is the ordinary one.

    And a cut path matters below. With another noise in the run that the held values come from, the first would fail.
    """
    model = tiny(model_type, layers=4)
    found = oracle(model, severed=True)
    assert found.severed is not None
    plain = found.severed["none"]
    assert close(plain, found.scores["hidden"][found.subject[1] - 1])
    for cut in ("mlp", "attn"):
        assert close(found.severed[cut][-1], plain[-1])
        assert not close(found.severed[cut][0], plain[0])


def test_severing_below_changes_nothing() -> None:
    """Holding the corrupted values in a corrupted run is no change: the last block's cell is low, as without holding."""
    found = oracle(tiny(), severed=True)
    assert found.severed is not None
    assert close(found.severed["mlp"][-1], found.low) and close(found.severed["attn"][-1], found.low)


def test_noise_is_paired() -> None:
    """Two traces of one seed agree to the last bit, and another seed gives other scores."""
    model = tiny()
    assert oracle(model) == oracle(model)
    assert oracle(model, seed=2).low != oracle(model).low


def test_the_model_is_left_as_it_was() -> None:
    """After a trace nothing is hooked to the model."""
    model = tiny()
    oracle(model, severed=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
