"""Decoding: rows side by side say what each says alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from service.engine.decoding import Batch, Row, end_tokens, next_tokens, row
from service.engine.kv_cache import RowCache
from service.errors import InvalidInput
from service.models.loading import LoadedModel, wrap
from service.schemas import Sampling
from tests.support.reference_sampler import choose
from tests.support.tiny_models import MODEL_TYPES, tiny

torch.set_num_threads(1)

PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "Big Ben",
    "In which country is Mount Fuji? It rises in",
    "São",
]


def run(model: LoadedModel, rows: list[Row]) -> list[Row]:
    batch = Batch(model, rows)
    while len(batch):
        batch.step()
    return rows


def alone(model: LoadedModel, prompt: str, asked: Sampling) -> list[int]:
    return run(model, [row(model, prompt, asked)])[0].said


def reference(model: LoadedModel, prompt: str, count: int) -> list[int]:
    """Greedy tokens of transformers' own generate(), without the end-of-text token."""
    ids = torch.tensor([model.encode(prompt)[0]])
    out = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    said = out[0, ids.shape[1] :].tolist()
    return said[: said.index(0)] if 0 in said else said


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bos", [False, True])
def test_a_padded_batch_says_what_generate_says(model_type: str, bos: bool) -> None:
    """Left-padded rows of unequal length say, greedily, what transformers' generate() says for each alone."""
    model = tiny(model_type, bos=bos)
    asked = Sampling(max_new_tokens=12)
    rows = run(model, [row(model, p, asked) for p in PROMPTS])
    assert [r.said for r in rows] == [reference(model, p, 12) for p in PROMPTS]
    assert len({tuple(r.said) for r in rows}) > 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rows_join_and_leave_between_steps(model_type: str) -> None:
    """Rows of different lengths that join late and leave early say what they say alone."""
    model = tiny(model_type)
    asked = [Sampling(max_new_tokens=n, temperature=1.0, seed=n) for n in (3, 20, 11, 7)]
    rows = [row(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)]
    batch = Batch(model, rows[:1])
    batch.step()
    for late in rows[1:]:
        joining = Batch(model, [late])
        joining.step()
        batch.join(joining)
        batch.step()
    while len(batch):
        batch.step()
    assert [r.said for r in rows] == [alone(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)]
    assert len({r.said[1] for r in rows}) > 1


@pytest.mark.parametrize(
    ("model_type", "dtype", "close"),
    [
        ("gpt2", torch.float32, 1e-5),
        ("gptj", torch.float32, 1e-5),
        ("llama", torch.float32, 1e-5),
        ("gpt2", torch.float64, 1e-10),
        ("gptj", torch.float64, 1e-5),  # whose attention is fp32 in any case
        ("llama", torch.float64, 1e-10),
    ],
)
def test_rows_say_what_is_drawn_slowly(model_type: str, dtype: torch.dtype, close: float) -> None:
    """A batch has the logits of whole texts read without a cache, and says what the definition draws from those."""
    model = tiny(model_type, dtype=dtype)
    asked = [
        Sampling(max_new_tokens=15, temperature=t, top_k=k, top_p=p, seed=i)
        for i, (t, k, p) in enumerate([(0.0, None, 1.0), (1.0, None, 1.0), (0.7, 40, 1.0), (1.3, None, 0.8)])
    ]
    batch = Batch(model, [row(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)])
    batch._ends, rows, found = frozenset(), list(batch.rows), []
    handle = model.head.register_forward_hook(lambda _m, _i, output: found.append(output[:, -1]))
    while len(batch):
        batch.step()
    handle.remove()
    for i, r in enumerate(rows):
        numbers = torch.Generator().manual_seed(r.asked.seed)
        with torch.no_grad():
            wanted = model.model(torch.tensor([r.ids])).logits[0, len(r.prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack([x[i] for x in found]), wanted, rtol=close, atol=close)
        assert [choose(x, r.asked, numbers) for x in wanted] == r.said


def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rows of unequal length nor any way of drawing make a step of decoding ask for more than its tokens."""
    model = tiny("llama")
    wishes: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.5, "top_k": 7},
        {},
    ]
    asked = [Sampling(**wish) for wish in wishes]
    batch = Batch(model, [row(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)])
    batch.step()
    assert batch._next is not None
    batch._next.sampler._waits = True  # as where the model is not on the CPU
    asks: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten._local_scalar_dense.default or op is torch.ops.aten.nonzero.default:
                asks.append(str(op))
            return op(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: asks.append("tolist") or tolist(self))
    with Watch():
        batch.step()
    assert len(batch) == len(PROMPTS) and asks == ["tolist"]


def test_memory_is_given_back_when_rows_leave() -> None:
    """When a long row leaves, the columns and the place that only it needed go with it."""
    model = tiny("gpt2", positions=600)
    long = row(model, PROMPTS[0] * 10, Sampling(max_new_tokens=2))
    short = row(model, "Big", Sampling(max_new_tokens=50))
    batch = Batch(model, [long, short])
    batch.step()
    assert batch._cache is not None
    before = batch._cache.layers[0]._store.numel()
    batch.step()
    after = batch._cache.layers[0]._store.numel()
    assert len(batch) == 1 and after < before / 5
    while len(batch):
        batch.step()
    assert batch._cache is None and short.said == alone(model, "Big", Sampling(max_new_tokens=50))


@pytest.mark.parametrize("failing", ["keep", "join"])
def test_rows_outlive_their_cache(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When there is no memory to rearrange the cache, nothing that was said is lost, and all rows go on."""
    model = tiny("gpt2")
    asked = [Sampling(max_new_tokens=n, temperature=1.0, seed=n) for n in (3, 9, 12)]
    rows = [row(model, p, a) for p, a in zip(PROMPTS, asked, strict=False)]
    batch, late = Batch(model, rows[:2]), Batch(model, rows[2:])
    batch.step()
    late.step()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(RowCache, failing, fail)
    batch.join(late)
    while len(batch):
        batch.step()
    assert [r.said for r in rows] == [alone(model, p, a) for p, a in zip(PROMPTS, asked, strict=False)]


def windowed(model_type: str) -> LoadedModel:
    """A model some of whose layers look back four tokens only."""
    model = tiny(model_type)
    config = copy.deepcopy(model.model.config)
    config.sliding_window = 4
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    if model_type == "mistral":  # which has one kind of layer
        config.layer_types = ["sliding_attention"] * 3
    made = AutoModelForCausalLM.from_config(config)
    made.load_state_dict(model.model.state_dict())
    return wrap(made, model.tokenizer)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_is_respected(model_type: str) -> None:
    """A model whose attention reaches back only a few tokens says in a batch what generate() says."""
    model = windowed(model_type)
    full = [reference(tiny(model_type), p, 12) for p in PROMPTS]
    wanted = [reference(model, p, 12) for p in PROMPTS]
    assert wanted != full
    assert [
        r.said for r in run(model, [row(model, p, Sampling(max_new_tokens=12)) for p in PROMPTS])
    ] == wanted


@pytest.mark.parametrize("seed", range(4))
def test_the_seed_decides_whatever_runs_beside(seed: int) -> None:
    """A request of one seed says the same alone and beside others; other seeds say other things."""
    model = tiny("gpt2")
    asked = [
        Sampling(max_new_tokens=15, temperature=t, top_k=k, top_p=p, seed=seed + 10 * i)
        for i, (t, k, p) in enumerate([(1.0, None, 1.0), (0.7, 40, 1.0), (1.5, None, 0.9), (1.0, 5, 0.5)])
    ]
    rows = run(model, [row(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)])
    assert [r.said for r in rows] == [alone(model, p, a) for p, a in zip(PROMPTS, asked, strict=True)]
    other = asked[0].model_copy(update={"seed": seed + 1000})
    assert alone(model, PROMPTS[0], other) != rows[0].said


def test_the_last_position_ends_a_row() -> None:
    """Prompt and answer together never exceed the model's positions; beyond them nothing is admitted."""
    model = tiny("gpt2", positions=16)
    r = run(model, [row(model, PROMPTS[0], Sampling(max_new_tokens=500))])[0]
    assert len(r.ids) == 16 and r.finish_reason == "length"
    with pytest.raises(InvalidInput):
        row(model, PROMPTS[0] * 4, Sampling())


def test_the_end_token_stops_and_is_not_said() -> None:
    """A row ends at the end-of-text token with reason stop, and the token is not in its text."""
    model = tiny("gpt2")
    wanted = alone(model, PROMPTS[0], Sampling(max_new_tokens=8))
    batch = Batch(model, [row(model, PROMPTS[0], Sampling(max_new_tokens=8))])
    batch._ends = frozenset({wanted[3]})
    r = batch.rows[0]
    while len(batch):
        batch.step()
    assert r.said == wanted[: wanted.index(wanted[3])] and r.finish_reason == "stop"
    assert 0 in end_tokens(model)


def test_pieces_make_the_text() -> None:
    """The pieces of the steps concatenate to the row's text, which is the text of its tokens."""
    model = tiny("llama")
    rows = [
        row(model, p, Sampling(max_new_tokens=25, temperature=2.0, seed=i)) for i, p in enumerate(PROMPTS)
    ]
    batch, pieces = Batch(model, rows), dict.fromkeys(map(id, rows), "")
    while len(batch):
        for said in batch.step():
            pieces[id(said.row)] += said.piece
    for r in rows:
        assert pieces[id(r)] == r.text
        assert r.text.rstrip("\ufffd") == model.decode(r.said).rstrip("\ufffd")


def test_a_cancelled_row_leaves() -> None:
    """A row that is cancelled between steps says no more, and its neighbours go on undisturbed."""
    model = tiny("gpt2")
    asked = Sampling(max_new_tokens=10)
    rows = [row(model, p, asked) for p in PROMPTS[:3]]
    batch = Batch(model, rows)
    batch.step()
    rows[2].finish("cancelled")
    while len(batch):
        batch.step()
    assert len(rows[2].said) == 1 and rows[2].finish_reason == "cancelled"
    assert [r.said for r in rows[:2]] == [alone(model, p, asked) for p in PROMPTS[:2]]


def test_a_failed_step_can_be_tried_again() -> None:
    """When a pass fails, no row has lost or gained a token, and each can go on alone."""
    model = tiny("gpt2")
    asked = Sampling(max_new_tokens=10, temperature=1.0, seed=3)
    rows = [row(model, p, asked) for p in PROMPTS]
    batch = Batch(model, rows)
    for _ in range(3):
        batch.step()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.down(1).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        batch.step()
    handle.remove()
    for single in batch.split():
        while len(single):
            single.step()
    assert [r.said for r in rows] == [alone(model, p, asked) for p in PROMPTS]


def test_a_row_without_numbers_fails_alone() -> None:
    """A row whose logits are not numbers ends with an error; the others go on."""
    model = tiny("gpt2")
    rows = [row(model, p, Sampling(max_new_tokens=4)) for p in PROMPTS[:2]]
    batch = Batch(model, rows)
    batch.step()

    def spoil(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1:] = float("nan")
        return output

    handle = model.head.register_forward_hook(spoil)
    while len(batch):
        batch.step()
    handle.remove()
    assert rows[1].finish_reason == "error" and len(rows[1].said) == 1
    assert rows[0].said == alone(model, PROMPTS[0], Sampling(max_new_tokens=4))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_pass_after_decoding(model_type: str) -> None:
    """Decoding leaves nothing in the model that an edit, which needs gradients, could not use."""
    model = tiny(model_type)
    run(model, [row(model, p, Sampling(max_new_tokens=3)) for p in PROMPTS])
    embedded = model.embedding(torch.tensor([model.encode(PROMPTS[0])[0]])).requires_grad_()
    loss = model.model(inputs_embeds=embedded).logits.logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(loss, embedded)
    assert gradient.isfinite().all() and gradient.any()


def test_next_tokens_is_the_models_distribution() -> None:
    """The distribution after a prompt sums to one and equals the softmax of the model's last logits."""
    model = tiny("gpt_neox")
    ids = model.encode(PROMPTS[0])[0]
    p = next_tokens(model, ids)
    with torch.no_grad():
        wanted = model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-9)
