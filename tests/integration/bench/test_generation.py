"""bench/generation.py: the backends of the generation bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch

from bench.embedded_service import BenchService
from bench.generation import (
    Backend,
    BackendComparison,
    ContinuousBatchingBackend,
    RunResult,
    SequentialBackend,
    ServiceBackend,
    stock_model,
    without_end_tokens,
)
from service.engine.decoding import eos_token_ids
from service.models.loading import LoadedModel
from service.schemas import Sampling
from tests.support.tiny_models import tiny

torch.set_num_threads(1)

PROMPTS = ["The Eiffel Tower is located in", "Big Ben", "In which country is Mount Fuji?"]
GREEDY = Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny("gpt2")


@pytest.fixture(scope="module")
def bench_service(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BenchService]:
    with BenchService(tmp_path_factory.mktemp("house"), model) as new_service:
        yield new_service


def test_a_plain_model_has_the_same_weights_in_their_own_modules(model: LoadedModel) -> None:
    """The reference is an unmodified transformers model with the same logits."""
    ids = torch.tensor([model.encode(PROMPTS[0])[0]])
    theirs = stock_model(model)
    assert theirs is not model.model and type(theirs) is type(model.model)
    torch.testing.assert_close(theirs(ids).logits, model.model(ids).logits)


def test_backends_give_the_same_tokens(model: LoadedModel, bench_service: BenchService) -> None:
    """All backends give the same greedy tokens, one generation per prompt."""
    backends: dict[str, Backend] = {
        "one by one": SequentialBackend(model),
        "continuous": ContinuousBatchingBackend(model),
        "ours": ServiceBackend(bench_service, "base"),
    }
    with without_end_tokens(model):
        results = {name: way(PROMPTS, GREEDY, 2) for name, way in backends.items()}
    assert results["ours"].token_ids == results["continuous"].token_ids == results["one by one"].token_ids
    assert all(
        len(h.first_token_seconds) == len(PROMPTS) and h.tokens == 18 and h.tokens_per_second > 0
        for h in results.values()
    )
    assert len(results["ours"].inter_token_seconds) <= 15


def test_without_end_tokens(model: LoadedModel) -> None:
    """The end-of-text token is removed within the context and restored afterwards."""
    before = eos_token_ids(model)
    with without_end_tokens(model):
        assert not eos_token_ids(model)
    assert eos_token_ids(model) == before


def test_sequential_backend_counts_queueing(model: LoadedModel) -> None:
    """With several callers, the first-token time of "one by one" includes the wait in the queue."""
    backend = SequentialBackend(model)
    alone, queued = backend(PROMPTS, GREEDY, 1), backend(PROMPTS, GREEDY, 3)
    assert sorted(queued.first_token_seconds) == queued.first_token_seconds
    assert sum(alone.first_token_seconds) < alone.seconds and queued.first_token_seconds[-1] < queued.seconds


def test_failing_backend_is_reported_and_skipped(model: LoadedModel, bench_service: BenchService) -> None:
    """After the failure of a backend the others run. The table has a row per other backend and number of
    callers."""

    def broken(prompts: Sequence[str], sampling: Sampling, callers: int) -> RunResult:
        raise RuntimeError("not on this machine")

    backends: dict[str, Backend] = {
        "one by one": SequentialBackend(model),
        "continuous": broken,
        "ours": ServiceBackend(bench_service, "base"),
    }
    comparison = BackendComparison(backends, [1, 2], PROMPTS)
    comparison.run(GREEDY, 2, lambda way: nullcontext(), lambda: None)
    assert comparison.errors == {"continuous": "RuntimeError: not on this machine"}
    assert [tuple(row[:2]) for row in comparison.table_rows()] == [
        ("one by one", 1),
        ("ours", 1),
        ("one by one", 2),
        ("ours", 2),
    ]
    assert comparison.token_parity("ours").startswith("ours: 12 of 12 generations")
