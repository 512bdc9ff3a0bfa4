"""Tests of service.models.sampling."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from service.kit.steps import Phase, run_to_completion
from service.models import sampling
from service.models.loading import LoadedModel, start_token_id
from service.models.sampling import sample_texts
from tests.support.tiny_models import MODEL_TYPES, tiny


def sample(
    model: LoadedModel, count: int = 3, length: int = 6, seed: int = 0, top_k: int | None = None
) -> list[str]:
    return run_to_completion(sample_texts(model, count, length, torch.Generator().manual_seed(seed), top_k))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_samples_are_a_function_of_model_and_seed(model_type: str) -> None:
    """The same seed gives the same texts and another seed gives others, on every architecture."""
    model = tiny(model_type)
    one = sample(model)
    assert len(one) == 3
    assert one == sample(model)
    assert one != sample(model, seed=1)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_with_one_candidate_sampling_is_greedy(model_type: str) -> None:
    """Top-k 1 gives the greedy continuation of the BOS token, as passes without a cache compute it."""
    model = tiny(model_type)
    start = start_token_id(model)
    assert start is not None
    ids = [start]
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert sample(model, count=1, length=6, top_k=1) == [model.decode(ids)]


def test_the_length_counts_the_start_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """`length` counts the BOS token: length - 1 tokens are sampled."""
    model = tiny()
    monkeypatch.setattr(sampling, "SAMPLE_BATCH_SIZE", 2)
    steps = list(sample_texts(model, 3, 5, torch.Generator().manual_seed(0), top_k=5, phase=Phase.CONTEXTS))
    assert len(steps) == 2 * 4
    assert {s.phase for s in steps} == {"contexts"}


def test_more_candidates_than_words_are_all_words() -> None:
    """A top-k larger than the vocabulary has no effect."""
    assert sample(tiny(), top_k=10_000) == sample(tiny())


def test_a_model_without_special_tokens_begins_with_its_first() -> None:
    """The first token is the tokenizer's BOS token, or token 0 without one."""
    model = tiny()
    assert start_token_id(model) == model.tokenizer.bos_token_id

    class Bare:
        bos_token_id = eos_token_id = None
        all_special_tokens: Sequence[str] = ()

    object.__setattr__(model, "tokenizer", Bare())
    assert start_token_id(model) is None


def test_texts_begin_after_the_separator_of_documents() -> None:
    """Where the BOS token begins a message and <|endoftext|> is a special token, too, texts begin after the latter."""
    model = tiny()

    class ChatTokenizer:
        bos_token_id, eos_token_id = 1, 2
        all_special_tokens: Sequence[str] = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

        def convert_tokens_to_ids(self, token: str) -> int:
            return {"<|endoftext|>": 7}[token]

    object.__setattr__(model, "tokenizer", ChatTokenizer())
    assert start_token_id(model) == 7


def test_words_are_drawn_with_their_probabilities() -> None:
    """Of a whole vocabulary each word comes as often as its probability says, and an impossible one never."""
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    drawn = sampling._sample(shares.log().expand(20_000, -1), None, generator)
    counts = torch.bincount(drawn[:, 0], minlength=5) / 20_000
    assert counts[1] == 0
    assert (counts - shares).abs().max() < 0.015
