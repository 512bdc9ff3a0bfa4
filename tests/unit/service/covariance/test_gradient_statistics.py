"""The statistics that normalize keys and gradients: service.covariance.gradient_statistics."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.covariance.corpus import Corpus
from service.covariance.gradient_statistics import (
    LEAST_DEVIATION,
    OBJECT_TOKENS,
    calibration_rows,
    collect_gradient_statistics,
    load_or_collect_gradient_statistics,
)
from service.errors import InvalidInput
from service.kit.steps import run_to_completion
from service.models.object_gradients import object_gradients
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny

CORPUS = Corpus("test", tuple(TEXTS))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_statistics_are_those_of_one_statement_at_a_time(model_type: str) -> None:
    """Mean and deviation are those of the keys and gradients of each statement alone, on every architecture."""
    model = tiny(model_type)
    found = run_to_completion(collect_gradient_statistics(model, [0, 1], CORPUS))
    alone = [object_gradients(model, [row], [0, 1]) for row in calibration_rows(model, CORPUS)]
    for layer in (0, 1):
        statistics = found[layer]
        assert statistics.count == OBJECT_TOKENS * len(TEXTS)
        for part, mean, deviation in (
            ("keys", statistics.key_mean, statistics.key_deviation),
            ("gradients", statistics.gradient_mean, statistics.gradient_deviation),
        ):
            rows = torch.cat([getattr(g, part)[layer] for g in alone]).double()
            spread = rows.std(0, correction=0)
            torch.testing.assert_close(mean, rows.mean(0), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(
                deviation, spread.clamp_min(LEAST_DEVIATION * float(spread.mean())), rtol=1e-3, atol=1e-6
            )


def test_the_object_of_a_statement_is_that_of_another_text() -> None:
    """Each text is continued with the last tokens of the next one, so that its object is false."""
    model = tiny()
    texts = [model.encode(text)[0] for text in TEXTS]
    rows = {tuple(prompt): list(object_) for prompt, object_ in calibration_rows(model, CORPUS)}
    assert len(rows) == len(TEXTS)
    for text, other in zip(texts, [*texts[1:], texts[0]], strict=True):
        assert rows[tuple(text[: min(len(text), 64)][:-OBJECT_TOKENS])] == other[:64][-OBJECT_TOKENS:]


def test_normalized_rows_have_mean_0_and_deviation_1() -> None:
    """The rows from which the statistics come are normalized to mean 0 and, but for entries that hardly vary, 1."""
    model = tiny()
    statistics = run_to_completion(collect_gradient_statistics(model, [1], CORPUS))[1]
    found = object_gradients(model, calibration_rows(model, CORPUS), [1])
    for rows in statistics.normalize(found.keys[1], found.gradients[1]):
        torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1]).double(), rtol=0, atol=1e-3)
        assert float(rows.std(0, correction=0).max()) == pytest.approx(1, rel=1e-3)


def test_stored_statistics_are_read_again(tmp_path: Path) -> None:
    """A second call reads the files of the first, with the same digest; another corpus has other files, and the digest
    is that of the layer alone."""
    model = tiny()
    first = run_to_completion(load_or_collect_gradient_statistics(model, [0, 1], CORPUS, tmp_path))
    assert len(list(tmp_path.glob("gradients-*.safetensors"))) == 2
    steps = load_or_collect_gradient_statistics(model, [1], CORPUS, tmp_path)
    assert next(steps, None) is None  # nothing is collected
    again = run_to_completion(load_or_collect_gradient_statistics(model, [0, 1], CORPUS, tmp_path))
    assert [again[x].digest for x in (0, 1)] == [first[x].digest for x in (0, 1)]
    other = Corpus("other", (*TEXTS, "Another text about the Louvre in Paris."))
    changed = run_to_completion(load_or_collect_gradient_statistics(model, [1], other, tmp_path))
    assert changed[1].digest != first[1].digest


def test_a_corpus_without_long_texts_is_refused() -> None:
    """A corpus of words alone cannot be split into statements and objects."""
    with pytest.raises(InvalidInput, match="too few texts with more than 3 tokens"):
        calibration_rows(tiny(), Corpus("short", ("a", "b")))
