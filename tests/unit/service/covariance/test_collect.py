"""Collected statistics and their files: service.covariance.collect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from service.covariance import collect
from service.covariance.collect import (
    batch_by_length,
    collect_statistics,
    load_or_collect_statistics,
    tokenize_corpus,
)
from service.covariance.corpus import Corpus, load_corpus
from service.errors import Misconfigured
from service.kit.steps import run_to_completion
from service.models.hooks import capture
from service.models.token_batch import forward, pad
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny

CORPUS = Corpus("test", tuple(TEXTS))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_collection_equals_one_text_at_a_time(model_type: str) -> None:
    """Batched collection gives the moment of collecting each text alone, on every architecture."""
    model = tiny(model_type)
    statistics = run_to_completion(collect_statistics(model, [0, 1], CORPUS))
    for layer in (0, 1):
        keys = []
        for text in TEXTS:
            with capture({0: model.down_proj(layer)}, "input") as seen, torch.no_grad():
                forward(model, pad([model.encode(text)[0]], model))
            keys.append(seen[0].reshape(-1, model.intermediate_size))
        rows = torch.cat(keys).double()
        assert statistics[layer].count == len(rows)
        torch.testing.assert_close(statistics[layer].moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)


def test_a_text_too_long_for_one_pass_is_several_rows() -> None:
    """A long text is split into rows without losing tokens."""
    model = tiny(positions=16)
    rows = tokenize_corpus(model, CORPUS)
    assert max(map(len, rows)) == 16
    assert [token for row in rows for token in row] == [
        token for text in TEXTS for token in model.encode(text)[0]
    ]


def test_a_pass_is_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch has at most STATISTICS_BATCH_TOKENS tokens, and the batches have every row once."""
    monkeypatch.setattr(collect, "STATISTICS_BATCH_TOKENS", 50)
    rows = [[i] * (1 + i % 40) for i in range(100)]
    batches = batch_by_length(rows)
    assert max(len(b) * max(map(len, b)) for b in batches) <= 50
    assert sorted(row for b in batches for row in b) == sorted(rows)


def test_statistics_are_factored_before_they_are_given_out() -> None:
    """Statistics are factorized before they are returned."""
    statistics = run_to_completion(load_or_collect_statistics(tiny(), [0, 1], CORPUS, None))
    assert all("cholesky" in vars(s) for s in statistics.values())


def test_statistics_are_stored_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start loads the stored statistics with the same digest."""
    model = tiny()
    first = run_to_completion(load_or_collect_statistics(model, [0, 2], CORPUS, tmp_path))
    monkeypatch.setattr(collect, "collect_statistics", None)
    again = run_to_completion(load_or_collect_statistics(model, [0, 2], CORPUS, tmp_path))
    assert {x: s.digest for x, s in first.items()} == {x: s.digest for x, s in again.items()}


def test_two_workers_may_collect_into_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers may store the same statistics at the same time."""
    model = tiny()

    def saved_by_another_as_well(*args: Any) -> None:
        monkeypatch.setattr(collect, "save_file", save_file)
        save_file(*args)
        run_to_completion(load_or_collect_statistics(model, [0], CORPUS, tmp_path))

    monkeypatch.setattr(collect, "save_file", saved_by_another_as_well)
    run_to_completion(load_or_collect_statistics(model, [0], CORPUS, tmp_path))
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_an_interrupted_collection_continues_with_the_same_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an interruption between two checkpoints of its layers, a collection ends with the bytes of an
    uninterrupted one, does not read the first texts again, and leaves no checkpoint."""
    monkeypatch.setattr(collect, "STATISTICS_BATCH_TOKENS", 20)
    monkeypatch.setattr(collect, "CHECKPOINT_INTERVAL", 0.0)
    model = tiny()
    whole = run_to_completion(load_or_collect_statistics(model, [0, 1], CORPUS, None))
    interrupted = load_or_collect_statistics(model, [0, 1], CORPUS, tmp_path)
    while len(list(tmp_path.glob("*.partial"))) < 2:
        next(interrupted)
    for _ in range(4):  # a batch more of two layers, and its checkpoint of the first one only
        next(interrupted)
    interrupted.close()
    phases = [
        p for p in load_or_collect_statistics(model, [0, 1], CORPUS, tmp_path) if p.phase == "statistics"
    ]
    assert phases[0].done >= 1
    resumed = run_to_completion(load_or_collect_statistics(model, [0, 1], CORPUS, tmp_path))
    assert {x: s.digest for x, s in resumed.items()} == {x: s.digest for x, s in whole.items()}
    assert not list(tmp_path.glob("*.partial"))


def test_the_key_holds_everything_it_depends_on(tmp_path: Path) -> None:
    """Corpus, model and damping are part of the cache key."""
    run_to_completion(load_or_collect_statistics(tiny(), [0], CORPUS, tmp_path))
    run_to_completion(load_or_collect_statistics(tiny(), [0], Corpus("test", ("Another text.",)), tmp_path))
    run_to_completion(load_or_collect_statistics(tiny(seed=1), [0], CORPUS, tmp_path))
    run_to_completion(load_or_collect_statistics(tiny(), [0], CORPUS, tmp_path, damping=0.5))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_corpus_file_comes_first(tmp_path: Path) -> None:
    """A given text file is the corpus, cut at the maximum number of tokens."""
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS * 10), encoding="utf-8")
    corpus = run_to_completion(load_corpus(tiny(), 60, file))
    assert corpus.texts[0] == TEXTS[0]
    assert len(corpus.texts) < 5


def test_an_unreadable_corpus_says_so(tmp_path: Path) -> None:
    """The error of an unreadable corpus names it."""
    with pytest.raises(Misconfigured, match=r"nowhere\.txt"):
        run_to_completion(load_corpus(tiny(), 60, tmp_path / "nowhere.txt"))


def test_without_a_corpus_the_model_writes_one() -> None:
    """A model without texts samples its corpus, reproducibly."""
    one = run_to_completion(load_corpus(tiny(), 500, None))
    two = run_to_completion(load_corpus(tiny(), 500, None))
    assert one.digest == two.digest
    assert "samples" in one.source
