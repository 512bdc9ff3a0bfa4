"""Batched decoding gives each sequence the tokens that it has alone: service.engine.decoding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from service.engine.decoding import (
    DecodingBatch,
    DecodingSequence,
    eos_token_ids,
    new_sequence,
    new_sequences,
    next_token_distribution,
)
from service.engine.kv_cache import BatchKVCache
from service.engine.logprobs import LogprobRecorder
from service.errors import InvalidInput
from service.models.loading import LoadedModel, wrap_model
from service.schemas import Sampling, WorkerGenerateRequest
from tests.support.reference_sampler import sample_token
from tests.support.tiny_models import MODEL_TYPES, tiny

torch.set_num_threads(1)

PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "Big Ben",
    "In which country is Mount Fuji? It rises in",
    "São",
]


def decode_all(model: LoadedModel, rows: list[DecodingSequence]) -> list[DecodingSequence]:
    batch = DecodingBatch(model, rows)
    while len(batch):
        batch.step()
    return rows


def tokens_alone(model: LoadedModel, prompt: str, sampling_params: Sampling) -> list[int]:
    return decode_all(model, [new_sequence(model, prompt, sampling_params)])[0].output_ids


def reference(model: LoadedModel, prompt: str, count: int) -> list[int]:
    """Return the greedy tokens of transformers' generate(), without the end-of-text token."""
    ids = torch.tensor([model.encode(prompt)[0]])
    out = model.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    output_ids: list[int] = out[0, ids.shape[1] :].tolist()
    return output_ids[: output_ids.index(0)] if 0 in output_ids else output_ids


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bos", [False, True])
def test_padded_batch_matches_transformers_generate(model_type: str, bos: bool) -> None:
    """A left-padded batch gives each prompt the greedy tokens of transformers' generate()."""
    model = tiny(model_type, bos=bos)
    sampling_params = Sampling(max_new_tokens=12)
    sequences = decode_all(model, [new_sequence(model, p, sampling_params) for p in PROMPTS])
    assert [r.output_ids for r in sequences] == [reference(model, p, 12) for p in PROMPTS]
    assert len({tuple(r.output_ids) for r in sequences}) > 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_sequences_merge_and_leave_between_steps(model_type: str) -> None:
    """Sequences that join late or leave early have the tokens that they have alone."""
    model = tiny(model_type)
    sampling_params = [Sampling(max_new_tokens=n, temperature=1.0, seed=n) for n in (3, 20, 11, 7)]
    sequences = [new_sequence(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=True)]
    batch = DecodingBatch(model, sequences[:1])
    batch.step()
    for late in sequences[1:]:
        joining = DecodingBatch(model, [late])
        joining.step()
        batch.merge(joining)
        batch.step()
    while len(batch):
        batch.step()
    assert [r.output_ids for r in sequences] == [
        tokens_alone(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=True)
    ]
    assert len({r.output_ids[1] for r in sequences}) > 1


@pytest.mark.parametrize(
    ("model_type", "dtype", "close"),
    [
        ("gpt2", torch.float32, 1e-5),
        ("gptj", torch.float32, 1e-5),
        ("llama", torch.float32, 1e-5),
        ("gpt2", torch.float64, 1e-10),
        ("gptj", torch.float64, 1e-5),  # GPT-J computes its attention in fp32
        ("llama", torch.float64, 1e-10),
    ],
)
def test_batch_matches_reference_sampling_without_cache(
    model_type: str, dtype: torch.dtype, close: float
) -> None:
    """A batch has the logits of forward passes without a cache and the tokens that the reference sampler
    draws from them."""
    model = tiny(model_type, dtype=dtype)
    sampling_params = [
        Sampling(max_new_tokens=15, temperature=t, top_k=k, top_p=p, seed=i)
        for i, (t, k, p) in enumerate([(0.0, None, 1.0), (1.0, None, 1.0), (0.7, 40, 1.0), (1.3, None, 0.8)])
    ]
    batch = DecodingBatch(
        model, [new_sequence(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=True)]
    )
    batch._eos_ids, sequences, step_logits = frozenset(), list(batch.sequences), []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, output: step_logits.append(output[:, -1]))
    while len(batch):
        batch.step()
    handle.remove()
    for i, r in enumerate(sequences):
        numbers = torch.Generator().manual_seed(r.sampling_params.seed)
        with torch.no_grad():
            expected = model.model(torch.tensor([r.token_ids])).logits[0, len(r.prompt_ids) - 1 : -1]
        torch.testing.assert_close(torch.stack([x[i] for x in step_logits]), expected, rtol=close, atol=close)
        assert [sample_token(x, r.sampling_params, numbers) for x in expected] == r.output_ids


def test_step_synchronizes_with_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step synchronizes with the device once, for any prompt lengths and sampling parameters."""
    model = tiny("llama")
    request_fields: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.5, "top_k": 7},
        {},
    ]
    sampling_params = [Sampling(**wish) for wish in request_fields]
    batch = DecodingBatch(
        model, [new_sequence(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=True)]
    )
    batch.step()
    assert batch._next_inputs is not None
    batch._next_inputs.sampler._avoid_sync = True  # as on a device other than the CPU
    syncs: list[str] = []

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            TorchDispatchMode.__init__(self)

        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten._local_scalar_dense.default or op is torch.ops.aten.nonzero.default:
                syncs.append(str(op))
            return op(*args, **(kwargs or {}))

    tolist = torch.Tensor.tolist

    def watched_tolist(self: torch.Tensor) -> Any:
        syncs.append("tolist")
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", watched_tolist)
    with Watch():
        batch.step()
    assert len(batch) == len(PROMPTS) and syncs == ["tolist"]


def stored_numbers(batch: DecodingBatch) -> int:
    """Return the size of the keys and values of the first layer."""
    assert batch._cache is not None
    storage = batch._cache.layers[0]._storage
    assert storage is not None
    return storage.numel()


def test_cache_shrinks_when_sequences_leave() -> None:
    """When a long sequence leaves the batch, the cache shrinks to what the others need."""
    model = tiny("gpt2", positions=600)
    long = new_sequence(model, PROMPTS[0] * 10, Sampling(max_new_tokens=2))
    short = new_sequence(model, "Big", Sampling(max_new_tokens=50))
    batch = DecodingBatch(model, [long, short])
    batch.step()
    before = stored_numbers(batch)
    batch.step()
    after = stored_numbers(batch)
    assert len(batch) == 1 and after < before / 5
    while len(batch):
        batch.step()
    assert batch._cache is None and short.output_ids == tokens_alone(
        model, "Big", Sampling(max_new_tokens=50)
    )


@pytest.mark.parametrize("failing", ["compact", "merge"])
def test_sequences_survive_a_lost_cache(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When memory for rearranging the cache runs out, no sequence loses tokens, and all continue."""
    model = tiny("gpt2")
    sampling_params = [Sampling(max_new_tokens=n, temperature=1.0, seed=n) for n in (3, 9, 12)]
    sequences = [new_sequence(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=False)]
    batch, late = DecodingBatch(model, sequences[:2]), DecodingBatch(model, sequences[2:])
    batch.step()
    late.step()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(BatchKVCache, failing, fail)
    batch.merge(late)
    while len(batch):
        batch.step()
    assert [r.output_ids for r in sequences] == [
        tokens_alone(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=False)
    ]


def model_with_sliding_window(model_type: str) -> LoadedModel:
    """Return a model with a sliding window of four tokens in some or all layers."""
    model = tiny(model_type)
    config = copy.deepcopy(model.model.config)
    config.sliding_window = 4
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    if model_type == "mistral":  # Mistral has one kind of layer
        config.layer_types = ["sliding_attention"] * 3
    windowed_model = AutoModelForCausalLM.from_config(config)
    windowed_model.load_state_dict(model.model.state_dict())
    return wrap_model(windowed_model, model.tokenizer)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_a_sliding_window_is_respected(model_type: str) -> None:
    """A batch of a model with sliding-window attention has the tokens of generate()."""
    model = model_with_sliding_window(model_type)
    full = [reference(tiny(model_type), p, 12) for p in PROMPTS]
    expected = [reference(model, p, 12) for p in PROMPTS]
    assert expected != full
    assert [
        r.output_ids
        for r in decode_all(model, [new_sequence(model, p, Sampling(max_new_tokens=12)) for p in PROMPTS])
    ] == expected


@pytest.mark.parametrize("seed", range(4))
def test_seed_decides_output_whatever_else_is_in_the_batch(seed: int) -> None:
    """The seed of a request determines its tokens, alone and in a batch; another seed gives other tokens."""
    model = tiny("gpt2")
    sampling_params = [
        Sampling(max_new_tokens=15, temperature=t, top_k=k, top_p=p, seed=seed + 10 * i)
        for i, (t, k, p) in enumerate([(1.0, None, 1.0), (0.7, 40, 1.0), (1.5, None, 0.9), (1.0, 5, 0.5)])
    ]
    sequences = decode_all(
        model, [new_sequence(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=True)]
    )
    assert [r.output_ids for r in sequences] == [
        tokens_alone(model, p, a) for p, a in zip(PROMPTS, sampling_params, strict=True)
    ]
    other = sampling_params[0].model_copy(update={"seed": seed + 1000})
    assert tokens_alone(model, PROMPTS[0], other) != sequences[0].output_ids


def test_the_last_position_ends_a_row() -> None:
    """Prompt and output never exceed the model's positions; a longer prompt is rejected."""
    model = tiny("gpt2", positions=16)
    r = decode_all(model, [new_sequence(model, PROMPTS[0], Sampling(max_new_tokens=500))])[0]
    assert len(r.token_ids) == 16 and r.finish_reason == "length"
    with pytest.raises(InvalidInput):
        new_sequence(model, PROMPTS[0] * 4, Sampling())


def test_eos_token_stops_and_is_not_in_the_output() -> None:
    """A sequence ends at an end-of-text token with the reason `stop`, and the token is not in its output."""
    model = tiny("gpt2")
    expected = tokens_alone(model, PROMPTS[0], Sampling(max_new_tokens=8))
    batch = DecodingBatch(model, [new_sequence(model, PROMPTS[0], Sampling(max_new_tokens=8))])
    batch._eos_ids = frozenset({expected[3]})
    r = batch.sequences[0]
    while len(batch):
        batch.step()
    assert r.output_ids == expected[: expected.index(expected[3])] and r.finish_reason == "stop"
    assert 0 in eos_token_ids(model)


def test_an_end_of_turn_stops_its_own_sequence_alone() -> None:
    """A sequence ends at a token of `end_token_ids` with the reason `stop`, without it; others of its batch do not."""
    model = tiny("gpt2")
    asked = {"prompt": PROMPTS[0], "max_new_tokens": 8}
    expected = tokens_alone(model, PROMPTS[0], Sampling(max_new_tokens=8))
    (ending,) = new_sequences(model, WorkerGenerateRequest(**asked, end_token_ids=[expected[3]]))
    (going_on,) = new_sequences(model, WorkerGenerateRequest(**asked))
    decode_all(model, [ending, going_on])
    assert ending.output_ids == expected[: expected.index(expected[3])] and ending.finish_reason == "stop"
    assert ending.text == model.decode(ending.output_ids)
    assert going_on.output_ids == expected and going_on.finish_reason == "length"


def test_pieces_make_the_text() -> None:
    """The text pieces of the steps concatenate to the sequence's text, which is that of its tokens."""
    model = tiny("llama")
    sequences = [
        new_sequence(model, p, Sampling(max_new_tokens=25, temperature=2.0, seed=i))
        for i, p in enumerate(PROMPTS)
    ]
    batch, pieces = DecodingBatch(model, sequences), dict.fromkeys(map(id, sequences), "")
    while len(batch):
        for output in batch.step():
            pieces[id(output.sequence)] += output.text
    for r in sequences:
        assert pieces[id(r)] == r.text
        assert r.text.rstrip("\ufffd") == model.decode(r.output_ids).rstrip("\ufffd")


def test_a_cancelled_row_leaves() -> None:
    """A sequence that is cancelled between steps gets no more tokens, and the others are not affected."""
    model = tiny("gpt2")
    sampling_params = Sampling(max_new_tokens=10)
    sequences = [new_sequence(model, p, sampling_params) for p in PROMPTS[:3]]
    batch = DecodingBatch(model, sequences)
    batch.step()
    sequences[2].finish("cancelled")
    while len(batch):
        batch.step()
    assert len(sequences[2].output_ids) == 1 and sequences[2].finish_reason == "cancelled"
    assert [r.output_ids for r in sequences[:2]] == [
        tokens_alone(model, p, sampling_params) for p in PROMPTS[:2]
    ]


def test_a_failed_step_can_be_tried_again() -> None:
    """A step that raises changes no sequence, and each sequence can continue alone."""
    model = tiny("gpt2")
    sampling_params = Sampling(max_new_tokens=10, temperature=1.0, seed=3)
    sequences = [new_sequence(model, p, sampling_params) for p in PROMPTS]
    batch = DecodingBatch(model, sequences)
    for _ in range(3):
        batch.step()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.down_proj(1).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        batch.step()
    handle.remove()
    for single in batch.split():
        while len(single):
            single.step()
    assert [r.output_ids for r in sequences] == [tokens_alone(model, p, sampling_params) for p in PROMPTS]


@pytest.mark.parametrize("logprobs", [None, 2])
def test_non_finite_logits_fail_only_their_sequence(logprobs: int | None) -> None:
    """A row whose logits are not numbers ends with an error, also when it reports log-probabilities; the others go
    on."""
    model = tiny("gpt2")
    sequences = [new_sequence(model, p, Sampling(max_new_tokens=4)) for p in PROMPTS[:2]]
    for sequence in sequences:
        sequence.logprob_recorder = None if logprobs is None else LogprobRecorder(model.token_text, logprobs)
    batch = DecodingBatch(model, sequences)
    batch.step()

    def spoil(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1:] = float("nan")
        return output

    handle = model.lm_head.register_forward_hook(spoil)
    while len(batch):
        batch.step()
    handle.remove()
    assert sequences[1].finish_reason == "error" and len(sequences[1].output_ids) == 1
    assert sequences[0].output_ids == tokens_alone(model, PROMPTS[0], Sampling(max_new_tokens=4))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_pass_after_decoding(model_type: str) -> None:
    """After decoding, gradients can be computed through the model."""
    model = tiny(model_type)
    decode_all(model, [new_sequence(model, p, Sampling(max_new_tokens=3)) for p in PROMPTS])
    embedded = model.embedding(torch.tensor([model.encode(PROMPTS[0])[0]])).requires_grad_()
    loss = model.model(inputs_embeds=embedded).logits.logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(loss, embedded)
    assert gradient.isfinite().all() and gradient.any()


def test_next_tokens_is_the_models_distribution() -> None:
    """The distribution after a prompt sums to one and equals the softmax of the model's last logits."""
    model = tiny("gpt_neox")
    ids = model.encode(PROMPTS[0])[0]
    p = next_token_distribution(model, ids)
    with torch.no_grad():
        expected = model.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-9)
