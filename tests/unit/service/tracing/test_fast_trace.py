"""The fast trace, held to the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.errors import InvalidInput
from service.kit.steps import Progress, finish
from service.kit.text import Statement, find
from service.models import budget, memory_estimates
from service.models.loading import LoadedModel, wrap
from service.tracing.fast_trace import Tracer, trace_steps
from service.tracing.interventions import cells_of
from service.tracing.reference import KINDS, oracle_steps
from service.tracing.result import TraceResult
from service.tracing.trace_input import ask
from tests.support.tiny_models import MODEL_TYPES, tiny, tokenizer

STATEMENT = find("In The Eiffel Tower is in", "Eiffel Tower")
ASKED = {"samples": 2, "window": 3, "noise": 0.5}


def trace(model: LoadedModel, statement: Statement = STATEMENT, **asked: Any) -> TraceResult:
    return finish(trace_steps(model, statement, **(ASKED | asked)))


def agree(
    model: LoadedModel, statement: Statement = STATEMENT, tolerance: float = 1e-5, **asked: Any
) -> TraceResult:
    """The fast trace, once it is found to be the oracle's."""
    slow, fast = finish(oracle_steps(model, statement, **(ASKED | asked))), trace(model, statement, **asked)
    assert slow.scores.keys() == fast.scores.keys()
    assert (slow.tokens, slow.subject, slow.answer_ids) == (fast.tokens, fast.subject, fast.answer_ids)
    pairs = [((slow.high, slow.low), (fast.high, fast.low))]
    pairs += [(slow.scores[kind], fast.scores[kind]) for kind in slow.scores]
    pairs += [(slow.severed[cut], fast.severed[cut]) for cut in slow.severed or () if fast.severed]
    for a, b in pairs:
        wanted, found = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, atol=tolerance / 100, rtol=tolerance)
    return fast


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("target", [None, "Paris"])
def test_equal_to_the_oracle(model_type: str, target: str | None) -> None:
    """On every architecture all cells of all kinds, severed paths too, are those of full passes."""
    found = agree(tiny(model_type, layers=4), target=target, severed=True)
    assert found.high != found.low
    assert (len(found.answer_ids) > 1) == (target is not None)


@pytest.mark.parametrize(
    ("model_type", "tolerance"),
    [("gpt2", 1e-10), ("llama", 1e-10), ("gptj", 1e-7)],  # GPT-J's attention is in single precision always
)
@pytest.mark.parametrize("target", [None, "Paris"])
def test_no_approximation(model_type: str, tolerance: float, target: str | None) -> None:
    """In double precision the scores are those of full passes to ten places: what is left out is nothing but repetition."""
    model = tiny(model_type, layers=8, dtype=torch.float64)
    agree(model, tolerance=tolerance, target=target, window=4, severed=True)


@pytest.mark.parametrize("window", [1, 2, 5, 10, 100])
@pytest.mark.parametrize("model_type", ["gpt2", "gptj"])
def test_windows(model_type: str, window: int) -> None:
    """Windows of any size agree with full passes, also those longer than the model."""
    agree(tiny(model_type, layers=6), window=window, kinds=["attn", "mlp"])


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
    """Serial NeoX, OPT with norms after its sums and narrow embeddings, sliding windows: the same engine serves them."""
    own = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    common = {"vocab_size": 320, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **common, **own, **changes))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    agree(wrap(model, tokenizer()), severed=True)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Rome is in", "Rome"),  # the first token of all
        ("Here is Marie Curie", "Marie Curie"),  # the last
        ("Rome", "Rome"),  # both
        ("Rome, not Rome, is in", "Rome"),  # twice
        ("In 東京 is", "東京"),  # characters of several tokens
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_subjects_anywhere(text: str, subject: str, bos: bool) -> None:
    """The subject may stand anywhere and be of any tokens, with or without a special token before it."""
    agree(tiny("llama" if bos else "gpt2", bos=bos), find(text, subject), severed=True)


def test_the_reference_noise() -> None:
    """With compat both draw the reference's noise."""
    model = tiny()
    assert agree(model, compat="meng2022").low != trace(model).low


@pytest.mark.parametrize("kinds", [["mlp"], ["attn", "hidden"]])
@pytest.mark.parametrize("severed", [False, True])
def test_some_kinds(kinds: list[str], severed: bool) -> None:
    """Only the kinds asked for are in the result, in their order, and severed paths need none of them."""
    assert list(agree(tiny(), kinds=kinds, severed=severed).scores) == kinds


def test_no_noise() -> None:
    """Without noise every cell is the high score."""
    found = trace(tiny(), noise=0)
    for grid in found.scores.values():
        torch.testing.assert_close(torch.tensor(grid), torch.full((len(grid), 3), found.high))


def test_the_last_state_is_high() -> None:
    """The last block's output at the last token, restored, gives the high score; at other tokens the low one."""
    found = trace(tiny())
    column = [row[-1] for row in found.scores["hidden"]]
    assert column[-1] == pytest.approx(found.high, rel=1e-5)
    assert column[:-1] == [found.low] * (len(column) - 1)


@pytest.mark.parametrize("operations", [1, 2**16])
def test_short_steps(monkeypatch: pytest.MonkeyPatch, operations: int) -> None:
    """However little one step may do, the scores are the same; there are only more steps."""
    model = tiny()
    large, small = trace(model, severed=True), []
    monkeypatch.setitem(budget.STEP, "cpu", operations)
    found = finish(trace_steps(model, STATEMENT, severed=True, **ASKED), small.append)
    for kind, grid in large.scores.items():
        torch.testing.assert_close(torch.tensor(found.scores[kind]), torch.tensor(grid), atol=1e-7, rtol=1e-4)
    assert len(small) > 60


def block_sizes(model: LoadedModel) -> list[int]:
    """Filled, as the model runs, with how many tokens each block takes in."""
    sizes: list[int] = []
    for layer in range(model.layers):
        model.attention(layer).register_forward_pre_hook(
            lambda _module, inputs: sizes.append(inputs[0].shape[:2].numel())
        )
    return sizes


def test_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block call takes more rows and positions than a step may."""
    model = tiny()
    sizes = block_sizes(model)
    cost = 2 * sum(p.numel() for p in model.block(0).parameters())
    monkeypatch.setitem(budget.STEP, "cpu", 30 * cost)
    trace(model, samples=7, kinds=["mlp"])
    assert max(sizes) <= 30


def test_less_work_than_the_oracle() -> None:
    """Fewer than a sixth of the oracle's tokens go through blocks."""
    model = tiny(layers=8)
    sizes = block_sizes(model)
    trace(model)
    fast = sum(sizes)
    sizes.clear()
    finish(oracle_steps(model, STATEMENT, **ASKED))
    assert 0 < 6 * fast < sum(sizes)


@pytest.mark.parametrize(("window", "tracks"), [(1, 21), (3, 23), (10, 17), (100, 9)])
def test_what_is_alike_is_run_once(window: int, tracks: int) -> None:
    """Windows that cover the same layers, or differ in the last block alone, are one run: one token's 24 cells."""
    model = tiny(layers=8)
    q = ask(model, STATEMENT, None, 1, 0.5, 1, None, ())
    tracer = Tracer(model, q, cells_of(q, KINDS, window, False, model.layers))
    assert sum(map(len, tracer.plan[q.subject[0]])) == tracks


def test_the_last_block_runs_where_the_answer_is_said() -> None:
    """Of the last MLP nothing is asked at other positions, but for the runs of the whole text."""
    model = tiny(layers=4)
    last, sizes = model.down(model.layers - 1), list[int]()
    last.register_forward_pre_hook(lambda _module, inputs: sizes.append(inputs[0].shape[1]))
    found = trace(model)
    assert set(sizes) == {1, len(found.tokens)}


def test_between_steps_the_model_is_free() -> None:
    """After every step the model answers as ever and gradients are on: others may use it in between."""
    model = tiny()
    ids = torch.tensor([model.encode("The Colosseum is in")[0]])
    before = model.model(ids).logits
    for _ in trace_steps(model, STATEMENT, severed=True, **ASKED):
        assert torch.is_grad_enabled()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
        assert torch.equal(model.model(ids).logits, before)


def test_progress() -> None:
    """Each phase counts its steps from one to its total."""
    seen: list[Progress] = []
    finish(trace_steps(tiny(), STATEMENT, **ASKED), seen.append)
    for phase in ("run", "trace"):
        steps = [p for p in seen if p.phase == phase]
        assert [p.done for p in steps] == list(range(1, len(steps) + 1))
        assert {p.total for p in steps} == {len(steps)}


def test_the_seed_decides() -> None:
    """Two traces of one seed are the same, and another seed gives other scores."""
    model = tiny()
    assert trace(model, seed=5) == trace(model, seed=5)
    assert trace(model, seed=6).low != trace(model, seed=5).low


def test_low_precision() -> None:
    """A model in bfloat16 is traced too, with probabilities in full precision."""
    model = tiny(dtype=torch.bfloat16)
    found = trace(model)
    assert 0 < found.low < 1


def test_noise_beyond_numbers() -> None:
    """Noise that drives the model out of its numbers is refused, not returned as NaN."""
    with pytest.raises(InvalidInput, match="use less"):
        trace(tiny(), noise=1e39)


def test_too_much_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that would not fit is refused before it runs, with what would make it fit."""
    monkeypatch.setattr(memory_estimates, "room", lambda _device: 1000)
    monkeypatch.setattr(memory_estimates, "capacity", lambda _device: 1000)
    with pytest.raises(InvalidInput, match="use fewer samples") as refused:
        trace(tiny())
    assert refused.value.field == "samples"
