"""Tests of service.tracing.fast_trace against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.errors import InvalidInput
from service.kit.steps import Progress, run_steps, run_to_completion
from service.kit.text import Statement, fill_prompt, locate_subject
from service.models import budget, memory_estimates
from service.models.loading import LoadedModel, wrap_model
from service.tracing.fast_trace import FastTracer, trace_statement
from service.tracing.interventions import list_cells
from service.tracing.reference import TRACE_KINDS, trace_reference
from service.tracing.result import TraceResult
from service.tracing.trace_input import build_trace_input
from tests.support.tiny_models import MODEL_TYPES, tiny, tokenizer

STATEMENT = locate_subject("In The Eiffel Tower is in", "Eiffel Tower")
TRACE_OPTIONS: dict[str, Any] = {"samples": 2, "window": 3, "noise": 0.5}


def run_trace(model: LoadedModel, statement: Statement = STATEMENT, **options: Any) -> TraceResult:
    return run_to_completion(trace_statement(model, statement, **(TRACE_OPTIONS | options)))


def assert_matches_reference(
    model: LoadedModel, statement: Statement = STATEMENT, tolerance: float = 1e-5, **options: Any
) -> TraceResult:
    """Return the fast trace after comparing it with the reference."""
    slow, fast = (
        run_to_completion(trace_reference(model, statement, **(TRACE_OPTIONS | options))),
        run_trace(model, statement, **options),
    )
    assert slow.scores.keys() == fast.scores.keys()
    assert (slow.tokens, slow.subject, slow.answer_ids) == (fast.tokens, fast.subject, fast.answer_ids)
    pairs: list[tuple[Any, Any]] = [((slow.high, slow.low), (fast.high, fast.low))]
    pairs += [(slow.scores[kind], fast.scores[kind]) for kind in slow.scores]
    if slow.severed and fast.severed:
        pairs += [(scores, fast.severed[path]) for path, scores in slow.severed.items()]
    for a, b in pairs:
        expected, actual = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, atol=tolerance / 100, rtol=tolerance)
    return fast


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("target", [None, "Paris"])
def test_fast_trace_equals_the_reference(model_type: str, target: str | None) -> None:
    """On every architecture, all cells and severed paths equal those of full passes."""
    result = assert_matches_reference(tiny(model_type, layers=4), target=target, severed=True)
    assert result.high != result.low
    assert (len(result.answer_ids) > 1) == (target is not None)


@pytest.mark.parametrize(
    ("model_type", "tolerance"),
    [("gpt2", 1e-10), ("llama", 1e-10), ("gptj", 1e-7)],  # GPT-J's attention is always in fp32
)
@pytest.mark.parametrize("target", [None, "Paris"])
def test_no_approximation(model_type: str, tolerance: float, target: str | None) -> None:
    """In double precision the scores equal those of full passes to ten places."""
    model = tiny(model_type, layers=5, dtype=torch.float64)
    assert_matches_reference(model, tolerance=tolerance, target=target, window=4, severed=True)


@pytest.mark.parametrize("window", [1, 2, 5, 10, 100])
@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_windows(model_type: str, window: int) -> None:
    """Windows of any size, also larger than the model, agree with full passes."""
    assert_matches_reference(tiny(model_type, layers=6), window=window, kinds=["attn", "mlp"])


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gpt_neox", {"use_parallel_residual": False}),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 8, "ffn_dim": 40}),
        ("mistral", {"sliding_window": 3, "num_key_value_heads": 1}),
        ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    ],
)
def test_unusual_members_of_the_families(model_type: str, changes: dict[str, Any]) -> None:
    """Serial NeoX, OPT with post-norm and projected embeddings, and sliding windows agree with full passes."""
    own = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    common = {"vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **common, **own, **changes))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    assert_matches_reference(wrap_model(model, tokenizer()), severed=True)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Rome is in", "Rome"),  # the first token of all
        ("Here is Marie Curie", "Marie Curie"),  # the last
        ("Rome", "Rome"),  # both
        ("Rome, not Rome, is in", "Rome"),  # twice
        ("So Big Ben and Big\tBen: Big Ben", "Big Ben"),  # three times, the last one at the end
        ("In 東京 is", "東京"),  # characters of several tokens
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_subjects_anywhere(text: str, subject: str, bos: bool) -> None:
    """The subject may be anywhere and have any tokens, with or without a special token before it."""
    assert_matches_reference(
        tiny("llama" if bos else "gpt2", bos=bos), locate_subject(text, subject), severed=True
    )


@pytest.mark.parametrize("mentions", ["all", "last"])
def test_subjects_that_are_repeated(mentions: str) -> None:
    """In double precision the trace of all mentions, and that of one, equal full passes; more noise changes the low
    score."""
    model = tiny(dtype=torch.float64)
    statement = fill_prompt("Rome, {}, not Rome", "Rome")
    trace = assert_matches_reference(model, statement, 1e-10, severed=True, mentions=mentions)
    assert len(trace.mentions) == (3 if mentions == "all" else 1)
    unmentioned = trace.scores["hidden"][: trace.mentions[0][0]]
    assert all(score == trace.low for row in unmentioned for score in row)


def test_the_reference_noise() -> None:
    """With compat, both tracers draw the noise of the authors' code."""
    model = tiny()
    assert assert_matches_reference(model, compat="meng2022").low != run_trace(model).low


@pytest.mark.parametrize("kinds", [["mlp"], ["attn", "hidden"]])
@pytest.mark.parametrize("severed", [False, True])
def test_some_kinds(kinds: list[str], severed: bool) -> None:
    """The result has the requested kinds in their order; severed paths need no kind."""
    assert list(assert_matches_reference(tiny(), kinds=kinds, severed=severed).scores) == kinds


def test_no_noise() -> None:
    """Without noise every cell is the high score."""
    result = run_trace(tiny(), noise=0)
    for grid in result.scores.values():
        torch.testing.assert_close(torch.tensor(grid), torch.full((len(grid), 3), result.high))


def test_the_last_state_is_high() -> None:
    """Restoring the last block's output at the last token gives the high score; at other tokens the low score."""
    result = run_trace(tiny())
    column = [row[-1] for row in result.scores["hidden"]]
    assert column[-1] == pytest.approx(result.high, rel=1e-5)
    assert column[:-1] == [result.low] * (len(column) - 1)


@pytest.mark.parametrize("flops", [1, 2**16])
def test_step_size_does_not_change_scores(monkeypatch: pytest.MonkeyPatch, flops: int) -> None:
    """A smaller step budget gives the same scores in more steps."""
    model = tiny()
    large = run_trace(model, severed=True)
    small: list[Progress] = []
    monkeypatch.setitem(budget.STEP_FLOPS, "cpu", flops)
    result = run_steps(trace_statement(model, STATEMENT, severed=True, **TRACE_OPTIONS), small.append)
    for kind, grid in large.scores.items():
        torch.testing.assert_close(
            torch.tensor(result.scores[kind]), torch.tensor(grid), atol=1e-7, rtol=1e-4
        )
    assert len(small) > 60


def block_sizes(model: LoadedModel) -> list[int]:
    """Record the number of tokens of each block call."""
    sizes: list[int] = []
    for layer in range(model.num_layers):
        model.attention(layer).register_forward_pre_hook(
            lambda _module, inputs: sizes.append(inputs[0].shape[:2].numel())
        )
    return sizes


def test_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block call exceeds the step budget."""
    model = tiny()
    sizes = block_sizes(model)
    cost = 2 * sum(p.numel() for p in model.block(0).parameters())
    monkeypatch.setitem(budget.STEP_FLOPS, "cpu", 30 * cost)
    run_trace(model, samples=7, kinds=["mlp"])
    assert max(sizes) <= 30


def test_less_work_than_the_reference() -> None:
    """Less than a sixth of the reference's tokens pass through blocks."""
    model = tiny(layers=8)
    sizes = block_sizes(model)
    run_trace(model)
    fast = sum(sizes)
    sizes.clear()
    run_to_completion(trace_reference(model, STATEMENT, **TRACE_OPTIONS))
    assert 0 < 6 * fast < sum(sizes)


@pytest.mark.parametrize(("window", "runs"), [(1, 21), (3, 23), (10, 17), (100, 9)])
def test_identical_runs_are_deduplicated(window: int, runs: int) -> None:
    """Cells whose windows cover the same layers, or differ only in the last block, share one run; a token has
    24 cells."""
    model = tiny(layers=8)
    trace_input = build_trace_input(model, STATEMENT, None, 1, 0.5, 1, None, ())
    tracer = FastTracer(
        model, trace_input, list_cells(trace_input, TRACE_KINDS, window, False, model.num_layers)
    )
    assert sum(map(len, tracer.chunks_by_token[trace_input.subject[0]])) == runs


def test_last_block_runs_at_answer_positions_only() -> None:
    """The last MLP runs only on the positions that predict the answer, except in the base runs."""
    model = tiny(layers=4)
    last, sizes = model.down_proj(model.num_layers - 1), list[int]()
    last.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape[1]))
    result = run_trace(model)
    assert set(sizes) == {1, len(result.tokens)}


def test_model_is_unhooked_between_steps() -> None:
    """After every step the model has no hooks, unchanged outputs and enabled gradients."""
    model = tiny()
    ids = torch.tensor([model.encode("The Colosseum is in")[0]])
    before = model.model(ids).logits
    for _ in trace_statement(model, STATEMENT, severed=True, **TRACE_OPTIONS):
        assert torch.is_grad_enabled()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
        assert torch.equal(model.model(ids).logits, before)


def test_progress() -> None:
    """Each phase counts its steps from one to its total."""
    reported: list[Progress] = []
    run_steps(trace_statement(tiny(), STATEMENT, **TRACE_OPTIONS), reported.append)
    for phase in ("run", "trace"):
        steps = [p for p in reported if p.phase == phase]
        assert [p.done for p in steps] == list(range(1, len(steps) + 1))
        assert {p.total for p in steps} == {len(steps)}


def test_the_seed_decides() -> None:
    """The same seed gives the same trace, and another seed gives other scores."""
    model = tiny()
    assert run_trace(model, seed=5) == run_trace(model, seed=5)
    assert run_trace(model, seed=6).low != run_trace(model, seed=5).low


def test_low_precision() -> None:
    """A bfloat16 model is traced with probabilities in fp32."""
    model = tiny(dtype=torch.bfloat16)
    result = run_trace(model)
    assert 0 < result.low < 1


def test_noise_that_overflows_is_refused() -> None:
    """Noise that makes probabilities non-finite is rejected, not returned as NaN."""
    with pytest.raises(InvalidInput, match="use less"):
        run_trace(tiny(), noise=1e39)


def test_too_much_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that exceeds the memory is rejected before it runs; the error says what to reduce."""
    monkeypatch.setattr(memory_estimates, "free_bytes", lambda _device: 1000)
    monkeypatch.setattr(memory_estimates, "total_bytes", lambda _device: 1000)
    with pytest.raises(InvalidInput, match="use fewer samples") as refused:
        run_trace(tiny())
    assert refused.value.field == "samples"
