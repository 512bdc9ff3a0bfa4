"""Batches with sequences of several versions: service.engine.batch_executor.

The versions differ in gated edits, in edited weights, or in both. Each sequence must have what its version gives it
when it is alone.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.engine import sampler
from service.engine.batch_executor import BatchExecutor
from service.engine.decoding import DecodingBatch, DecodingSequence, TokenOutput, new_sequence
from service.engine.scheduler import Scheduler
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.models.hooks import capture, installed_hooks
from service.models.loading import LoadedModel
from service.patches.patch import BASE, PatchSet
from service.schemas import Sampling
from service.weights.factors import Association, CodebookEntry, Gate
from service.weights.gate_space import build_gate_space
from tests.support.tiny_models import tiny

torch.set_num_threads(1)

LAYER = 1
PROMPTS = [
    "The Eiffel Tower is located in the city of",
    "Big Ben",
    "In which country is Mount Fuji? It rises in",
    "São",
    "The Colosseum and the Eiffel Tower",
]
SUBJECTS = [
    "The Eiffel Tower",
    "Big Ben",
    "In which country is Mount Fuji?",
    "The Colosseum",
    "São",
    "the city of",
]


@lru_cache
def statistics(model_type: str) -> KeyStatistics:
    """Return the statistics of keys of random texts in a tiny model."""
    model = tiny(model_type)
    ids = torch.randint(3, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    keys = keys_of(model, ids).flatten(0, 1).double()
    return KeyStatistics(LAYER, keys.T @ keys / len(keys), len(keys), 1e-2, "digest")


def keys_of(model: LoadedModel, ids: Tensor) -> Tensor:
    """Return the keys of all tokens (B, T), (B, T, D)."""
    with capture({0: model.down_proj(LAYER)}, "input") as captured, torch.no_grad():
        model.model(input_ids=ids)
    return captured[0].view(*ids.shape, -1)


@lru_cache
def association(model_type: str, number: int, gated: bool) -> Association:
    """Return an edit of a subject: its key at the last token, and a random change of value."""
    model, known = tiny(model_type), statistics(model_type)
    ids = torch.tensor([model.encode(SUBJECTS[number])[0]])
    key = keys_of(model, ids)[0, -1].float()
    value = 3 * torch.randn(model.hidden_size, generator=torch.Generator().manual_seed(number))
    space = build_gate_space(known, size=64)
    keys = space.project(key[None])
    gate = Gate(space, keys, keys[:0], 0.7) if gated else None
    return Association(
        f"edit_{number}{gated:d}",
        SUBJECTS[number],
        LAYER,
        key,
        known.solve(key.double()).float(),
        value,
        gate=gate,
    )


@lru_cache
def codebook_entry(model_type: str, number: int) -> CodebookEntry:
    """Return an entry of a codebook at the last token of a subject, with a random value."""
    association_of = association(model_type, number, False)
    radius = 0.3 * float(association_of.key.norm())
    return CodebookEntry(
        f"edit_{number}c",
        SUBJECTS[number],
        LAYER,
        association_of.key,
        torch.zeros_like(association_of.value),
        association_of.value,
        radius,
        (number,),
        False,
    )


class ExecutorHarness:
    """A scheduler and an executor with a model whose versions are sets of edits. Records the versions of each step."""

    def __init__(self, model_type: str = "gpt2") -> None:
        self.model_type = model_type
        self.replica = VersionedModel(tiny(model_type), EmptyLedger())
        self.patches: dict[tuple[tuple[int, ...], ...], PatchSet] = {}
        self.scheduler = Scheduler(16, lambda rows, positions: rows * positions)
        self.executor = BatchExecutor(self.replica, self.scheduler)
        self.steps: list[list[PatchSet]] = []
        use_patches = self.replica.use_patches

        @contextmanager
        def record(patches: Sequence[PatchSet]) -> Iterator[LoadedModel]:
            self.steps.append(list(patches))
            with use_patches(patches) as model:
                yield model

        self.replica.use_patches = record  # type: ignore[method-assign]

    def patch(
        self, gated: Sequence[int] = (), dense: Sequence[int] = (), codebook: Sequence[int] = ()
    ) -> PatchSet:
        """Return the patches of a version; the same object for the same version, with the weights and codebooks of
        another one that has the same."""
        key = (tuple(gated), tuple(dense), tuple(codebook))
        if key not in self.patches:
            shared = next((p for k, p in self.patches.items() if k[1:] == key[1:]), None)
            if shared is None:
                solved = [association(self.model_type, i, False) for i in dense]
                entries = [codebook_entry(self.model_type, i) for i in codebook]
                shared = self.replica.compose_patch([*solved, *entries])
            rows = self.replica.compose_patch(association(self.model_type, i, True) for i in gated)
            self.patches[key] = replace(shared, gated=rows.gated)
        return self.patches[key]

    def add(self, patch: PatchSet, prompt: str, sampling: Sampling, caller: str) -> DecodingSequence:
        sequence = new_sequence(self.replica.base, prompt, sampling)
        self.executor.add(patch, [sequence], caller, 1.0)
        return sequence

    def step(self) -> bool:
        for _ in self.executor.step():
            pass
        return bool(self.scheduler)

    def tokens_alone(self, patch: PatchSet, prompt: str, sampling: Sampling) -> list[int]:
        """Return the tokens of a prompt that is decoded alone, with the patches of its version in place."""
        (sequence,) = (batch := self.batch([prompt], sampling)).sequences
        with self.replica.use_patch(patch):
            while len(batch):
                batch.step()
        return sequence.output_ids

    def batch(self, prompts: Sequence[str], sampling: Sampling) -> DecodingBatch:
        return DecodingBatch(
            self.replica.base, [new_sequence(self.replica.base, p, sampling) for p in prompts]
        )


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama", "opt"])
def test_gated_versions_decode_in_one_batch(model_type: str) -> None:
    """The base model and versions with different gated edits share every step, and each has its own tokens."""
    harness = ExecutorHarness(model_type)
    versions = [harness.patch(gated) for gated in ((), (0,), (1,), (0, 1, 2), (5, 4, 3))]
    sampling = Sampling(max_new_tokens=10, temperature=0.8, seed=5)
    added = {
        (i, prompt): harness.add(patch, prompt, sampling, f"caller {i % 3}")
        for i, patch in enumerate(versions)
        for prompt in PROMPTS[:3]
    }
    while harness.step():
        pass
    for (i, prompt), sequence in added.items():
        assert sequence.output_ids == harness.tokens_alone(versions[i], prompt, sampling), (i, prompt)
    for number in (0, 1):
        edited = [added[i, PROMPTS[number]].output_ids for i in (0, 1 + number)]
        assert edited[0] != edited[1]
    assert max(len({id(p) for p in step}) for step in harness.steps) >= 4
    assert not harness.executor._patches


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_other_versions_change_no_bit(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch of several versions, each sequence has the logits and the keys and values that it has in a batch of
    the same prompts that are all at its version, bit for bit, in the prefill and in every step of decoding."""
    harness = ExecutorHarness(model_type)
    versions = [harness.patch(gated, (5,)) for gated in ((), (0,), (0, 1, 2), (1, 4), (0, 3))]
    sampling = Sampling(max_new_tokens=8, seed=2, temperature=1.0)
    mixed = record_logits(harness, versions, sampling, monkeypatch)
    changed = 0
    for i, patch in enumerate(versions):
        own = record_logits(harness, [patch] * len(versions), sampling, monkeypatch, teacher=mixed[1])
        for ours, theirs in zip(mixed[0], own[0], strict=True):
            assert torch.equal(ours[i], theirs[i])
            changed += not torch.equal(ours, theirs)
    assert changed > 10


def record_logits(
    harness: ExecutorHarness,
    versions: Sequence[PatchSet],
    sampling: Sampling,
    monkeypatch: pytest.MonkeyPatch,
    teacher: list[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits and the tokens of each step of one batch, in which each prompt has a version. `teacher`: the
    tokens that are taken in place of the sampled ones."""
    batch = harness.batch(PROMPTS, sampling)
    logits: list[Tensor] = []
    tokens: list[Tensor] = []
    call = sampler.Sampler.__call__

    def record(self: sampler.Sampler, row_logits: Tensor, uniforms: Tensor) -> Tensor:
        logits.append(row_logits.clone())
        tokens.append(call(self, row_logits, uniforms) if teacher is None else teacher[len(tokens)])
        return tokens[-1]

    with monkeypatch.context() as patching:
        patching.setattr(sampler.Sampler, "__call__", record)
        patching.setattr("service.engine.decoding.eos_token_ids", lambda _: frozenset())
        batch = harness.batch(PROMPTS, sampling)
        for _ in range(sampling.max_new_tokens):
            with harness.replica.use_patches(versions):
                batch.step()
    return logits, tokens


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6))
def test_any_mix_of_versions_gives_each_its_own_tokens(seed: int) -> None:
    """Calls of random versions, with gated edits, edits in the weights, edits in codebooks or several kinds, that come
    and go at random times: each has the tokens of its version alone, and no step has two models."""
    rng = random.Random(seed)
    harness = ExecutorHarness("gpt2")
    calls = []
    for number in range(8):
        gated = rng.sample(range(6), rng.randrange(5))
        dense = rng.choice(([], [], [1], [2, 3]))
        codebook = rng.choice(([], [], [4], [0, 5]))
        sampling = Sampling(
            max_new_tokens=rng.randrange(1, 9), temperature=rng.choice((0.0, 0.9)), seed=number
        )
        patch, prompt = harness.patch(gated, dense, codebook), rng.choice(PROMPTS)
        sequence = harness.add(patch, prompt, sampling, rng.choice("abc"))
        calls.append((patch, prompt, sampling, sequence))
        for _ in range(rng.randrange(3)):
            harness.step()
        if rng.random() < 0.1:
            rng.choice(calls)[-1].finish_reason = "cancelled"
    while harness.step():
        pass
    for patch, prompt, sampling, sequence in calls:
        expected = harness.tokens_alone(patch, prompt, sampling)
        if sequence.finish_reason == "cancelled":
            assert sequence.output_ids == expected[: len(sequence.output_ids)]
        else:
            assert sequence.output_ids == expected
    assert all(len({p.shared for p in step}) == 1 for step in harness.steps)


def test_a_new_version_joins_a_running_batch() -> None:
    """A call of a newer gated version joins the batch of a running one in the middle of it. Both keep their versions to
    their ends, with the keys and values that they had."""
    harness = ExecutorHarness()
    sampling = Sampling(max_new_tokens=12)
    old, new = harness.patch((0,)), harness.patch((0, 1))
    first = harness.add(old, PROMPTS[0], sampling, "a")
    for _ in range(5):
        harness.step()
    second = harness.add(new, "Big Ben and the Eiffel Tower", sampling, "a")
    while harness.step():
        pass
    assert first.output_ids == harness.tokens_alone(old, PROMPTS[0], sampling)
    assert second.output_ids == harness.tokens_alone(new, "Big Ben and the Eiffel Tower", sampling)
    sizes = Counter(len({id(p) for p in step}) for step in harness.steps)
    assert sizes[2] >= 5


def test_a_cancelled_sequence_moves_no_version(caplog: pytest.LogCaptureFixture) -> None:
    """When a sequence is cancelled between two steps and another one takes its place in the batch, the remaining ones
    keep their versions."""
    harness = ExecutorHarness()
    sampling = Sampling(max_new_tokens=10)
    versions = [BASE, harness.patch((1,)), harness.patch((0,))]
    sequences = [
        harness.add(patch, prompt, sampling, "a") for patch, prompt in zip(versions, PROMPTS, strict=False)
    ]
    harness.step()
    sequences[0].finish_reason = "cancelled"
    while harness.step():
        pass
    for patch, prompt, sequence in zip(versions[1:], PROMPTS[1:], sequences[1:], strict=False):
        assert sequence.output_ids == harness.tokens_alone(patch, prompt, sampling)
    assert not caplog.records  # no step failed and was repeated


def test_other_weights_have_a_batch_of_their_own() -> None:
    """Versions with the same weights and other gated edits share a batch; other weights do not join it."""
    harness = ExecutorHarness()
    same = [harness.patch((0,), (2,)), harness.patch((1,), (2,)), harness.patch((), (2,))]
    other = [harness.patch((0,)), harness.patch((0,), (3,))]
    for patch in (*same, *other):
        harness.add(patch, PROMPTS[1], Sampling(max_new_tokens=4), "a")
    harness.step()
    harness.step()
    harness.step()
    assert {batch.weights for batch in harness.scheduler.batches()} == {
        (),
        (same[0].dense,),
        (other[1].dense,),
    }


def test_without_gated_edits_no_hook_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch in which no version has gated edits runs without a hook, and one in which some have, with one for each
    layer."""
    harness = ExecutorHarness()
    installed: list[int] = []
    step = DecodingBatch.step

    def record(self: DecodingBatch) -> list[TokenOutput]:
        installed.append(installed_hooks())
        return step(self)

    monkeypatch.setattr(DecodingBatch, "step", record)
    harness.add(harness.patch((), (2,)), PROMPTS[0], Sampling(max_new_tokens=3), "a")
    harness.add(BASE, PROMPTS[0], Sampling(max_new_tokens=3), "a")
    while harness.step():
        pass
    assert set(installed) == {0}
    for patch in (BASE, harness.patch((0,)), harness.patch((1, 2))):
        harness.add(patch, PROMPTS[0], Sampling(max_new_tokens=3), "a")
    installed.clear()
    while harness.step():
        pass
    assert set(installed) == {1}


def test_a_closed_gate_changes_no_byte() -> None:
    """A version whose gates open nowhere in a text gives the logits of the base model, byte for byte."""
    harness = ExecutorHarness()
    ids = torch.tensor([harness.replica.base.encode("It rises in Japan")[0]])
    with torch.no_grad():
        base = harness.replica.base.model(input_ids=ids).logits
        with harness.replica.use_patch(harness.patch((0, 1))) as model:
            assert torch.equal(model.model(input_ids=ids).logits.view(torch.int32), base.view(torch.int32))
        opened = torch.tensor([harness.replica.base.encode(PROMPTS[0])[0]])
        base = harness.replica.base.model(input_ids=opened).logits
        with harness.replica.use_patch(harness.patch((0, 1))) as model:
            assert not torch.equal(model.model(input_ids=opened).logits, base)
