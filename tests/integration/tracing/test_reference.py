"""Tests of service.tracing.reference: properties of every causal trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.kit.steps import run_to_completion
from service.kit.text import Statement, locate_subject
from service.models.hooks import replace_output
from service.models.loading import LoadedModel
from service.models.scoring import log_probs_blocking
from service.tracing.reference import TRACE_KINDS, _answer_probabilities, restoration_window, trace_reference
from service.tracing.result import TraceResult
from service.tracing.trace_input import TraceInput, build_trace_input
from tests.support.tiny_models import MODEL_TYPES, tiny

STATEMENT = locate_subject("In The Eiffel Tower is in", "Eiffel Tower")


def reference_trace(model: LoadedModel, statement: Statement = STATEMENT, **options: Any) -> TraceResult:
    return run_to_completion(
        trace_reference(model, statement, **({"samples": 2, "window": 3, "noise": 0.5} | options))
    )


def make_input(model: LoadedModel, noise: float = 0.5) -> TraceInput:
    return build_trace_input(model, STATEMENT, None, 2, noise, 1, None, ())


def all_close(a: Any, b: Any) -> bool:
    return bool(torch.allclose(torch.as_tensor(a), torch.as_tensor(b), atol=1e-6))


def test_windows() -> None:
    """A window of ten around l is l-5 to l+4, of three l-1 to l+1, of one l; all are clipped at the ends."""
    assert restoration_window(20, 10, 48) == (15, 25)
    assert restoration_window(20, 3, 48) == (19, 22)
    assert restoration_window(20, 1, 48) == (20, 21)
    assert restoration_window(0, 10, 48) == (0, 5) and restoration_window(47, 10, 48) == (42, 48)


def test_no_noise_no_effect() -> None:
    """Without noise, every cell and the low score equal the high score."""
    result = reference_trace(tiny(), noise=0.0, severed=True)
    assert all_close(result.low, result.high)
    for kind in TRACE_KINDS:
        assert all_close(result.scores[kind], result.high)


def test_high_is_the_clean_probability() -> None:
    """The high score is the product of the answer's next-token probabilities in the clean model."""
    model = tiny()
    result = reference_trace(model, target="Paris", kinds=["hidden"])
    mean, _ = log_probs_blocking(model, [(STATEMENT.text, "Paris")])[0]
    n = len(result.answer_ids)
    assert n > 1
    assert result.high == pytest.approx(torch.tensor(mean * n).exp().item(), rel=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_cells_fixed_by_causality(model_type: str) -> None:
    """Cells before the subject and the last layer's cells before the last token are low; the last token's is
    high.

    The low score is computed in a separate run, so this holds only if both runs draw the same noise.
    """
    result = reference_trace(tiny(model_type))
    hidden, before, last = result.scores["hidden"], result.subject[0], len(result.tokens) - 1
    assert before > 0 and abs(result.total_effect) > 1e-4
    for kind in TRACE_KINDS:
        assert all_close(result.scores[kind][:before], result.low)
    assert all_close([row[-1] for row in hidden[:last]], result.low)
    assert all_close(hidden[last][-1], result.high)


def test_restoring_all_positions_gives_high() -> None:
    """Restoring all positions at any block, or the subject at the embedding, gives the high score."""
    model = tiny()
    trace_input = make_input(model)

    def clean(states: torch.Tensor) -> torch.Tensor:
        states[1:] = states[0]
        return states

    high = _answer_probabilities(model, trace_input)[0].expand(trace_input.samples)
    assert not all_close(_answer_probabilities(model, trace_input)[1:], high)
    for layer in range(model.num_layers):
        with replace_output(model.block(layer), clean):
            assert all_close(_answer_probabilities(model, trace_input)[1:], high)
    noiseless = build_trace_input(model, STATEMENT, None, 2, 0.0, 1, None, ())
    assert all_close(_answer_probabilities(model, noiseless)[1:], high)


def test_a_window_of_one_by_hand() -> None:
    """A window of one layer restores the module output of that layer and token, and nothing else."""
    model = tiny()
    trace_input = make_input(model)
    result = reference_trace(model, window=1, kinds=["mlp"])
    token = trace_input.subject[1] - 1

    def clean(outputs: torch.Tensor) -> torch.Tensor:
        outputs[1:, token] = outputs[0, token]
        return outputs

    for layer in range(model.num_layers):
        with replace_output(model.down_proj(layer), clean):
            assert all_close(
                result.scores["mlp"][token][layer], _answer_probabilities(model, trace_input)[1:].mean()
            )


@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_severed_paths(model_type: str) -> None:
    """At the last block the severed scores equal the ordinary ones; at the first block they differ.

    No path above the last block can be severed. The equality holds only if the run that provides the held
    values draws the same noise.
    """
    model = tiny(model_type, layers=4)
    result = reference_trace(model, severed=True)
    assert result.severed is not None
    plain = result.severed["none"]
    assert all_close(plain, result.scores["hidden"][result.subject[1] - 1])
    for kind in ("mlp", "attn"):
        assert all_close(result.severed[kind][-1], plain[-1])
        assert not all_close(result.severed[kind][0], plain[0])


def test_severing_below_changes_nothing() -> None:
    """Holding corrupted values in a corrupted run changes nothing: the last block's cell is low."""
    result = reference_trace(tiny(), severed=True)
    assert result.severed is not None
    assert all_close(result.severed["mlp"][-1], result.low) and all_close(
        result.severed["attn"][-1], result.low
    )


def test_noise_is_paired() -> None:
    """Two traces with one seed are identical, and another seed gives other scores."""
    model = tiny()
    assert reference_trace(model) == reference_trace(model)
    assert reference_trace(model, seed=2).low != reference_trace(model).low


def test_the_model_is_left_as_it_was() -> None:
    """After a trace no hook remains."""
    model = tiny()
    reference_trace(model, severed=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
