"""Tests of service.tracing.noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from service.errors import InvalidInput
from service.tracing.noise import corrupt, draw_noise, embedding_deviation, parse_noise_level
from tests.support.tiny_models import tiny


@pytest.mark.parametrize("noise", ["3sigma", "3 sigma", "3σ", "3s", "s3", " 3.0sigma "])
def test_multiples_of_sigma(noise: str) -> None:
    """Every spelling of three sigma is three times the embeddings' deviation."""
    model = tiny()
    parsed = parse_noise_level(model, noise, ["Eiffel Tower"])
    assert parsed.factor == 3
    assert parsed.value == pytest.approx(3 * embedding_deviation(model, ["Eiffel Tower"]))


@pytest.mark.parametrize("noise", [0.1, "0.1", ".1"])
def test_a_number_is_the_level(noise: float | str) -> None:
    """A number, also as a string, is the level itself."""
    assert parse_noise_level(tiny(), noise).value == 0.1


def test_whole_numbers_and_nothing_are_levels() -> None:
    """1 and 0 are valid levels."""
    assert parse_noise_level(tiny(), 1).value == 1 and parse_noise_level(tiny(), 0).value == 0


@pytest.mark.parametrize(
    "noise", ["", "sigma", "s", "-1", "nan", "inf", "3sigmas", "3 %", "1e3", math.nan, math.inf, -0.1]
)
def test_bad_noise(noise: Any) -> None:
    """Anything but a non-negative number or a multiple of sigma is rejected with a hint."""
    with pytest.raises(InvalidInput, match="noise"):
        parse_noise_level(tiny(), noise)


@pytest.mark.parametrize("bos", [False, True])
def test_deviation_over_subjects(bos: bool) -> None:
    """Sigma is torch's unbiased std over all scalars of the subjects' tokens without special tokens."""
    model, subjects = tiny(bos=bos), ["Eiffel Tower", "Big Ben", "Tower"]
    ids = [i for s in subjects for i in tiny().tokenizer(s)["input_ids"]]
    expected = model.embedding.get_parameter("weight")[ids].std().item()
    assert embedding_deviation(model, subjects) == pytest.approx(expected, rel=1e-5)


def test_deviation_without_subjects() -> None:
    """Without subjects, sigma is that of the whole embedding matrix."""
    model = tiny()
    assert embedding_deviation(model) == pytest.approx(
        model.embedding.get_parameter("weight").std().item(), rel=1e-5
    )


@pytest.mark.parametrize("compat", [None, "meng2022"])
def test_samples_come_one_after_another(compat: str | None) -> None:
    """The first samples do not depend on the number of samples."""
    assert torch.equal(draw_noise(3, 2, 5, 1, compat), draw_noise(7, 2, 5, 1, compat)[:3])


def test_seeds_differ() -> None:
    """The same seed gives the same noise and another seed another."""
    assert torch.equal(draw_noise(2, 3, 4, 7), draw_noise(2, 3, 4, 7))
    assert not torch.equal(draw_noise(2, 3, 4, 7), draw_noise(2, 3, 4, 8))


def test_the_reference_stream() -> None:
    """With compat, the noise is numpy's RandomState(1).randn in fp64, as in the authors' code."""
    expected = np.random.RandomState(1).randn(4, 2, 16)
    assert draw_noise(4, 2, 16, 1, "meng2022").dtype == torch.float64
    assert np.array_equal(draw_noise(4, 2, 16, 1, "meng2022").numpy(), expected)


def test_only_the_subject_is_corrupted() -> None:
    """Noise is added at every row's subject positions only."""
    x, z = torch.zeros(2, 5, 3), torch.ones(2, 2, 3, dtype=torch.float64)
    changed = corrupt(x.clone(), [1, 2], z)
    assert (changed[:, 1:3] == 1).all()
    assert (changed[:, [0, 3, 4]] == 0).all()


def test_the_sum_is_rounded_once() -> None:
    """The sum is computed in fp64 and rounded once to the model's dtype."""
    x = torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16)
    z = torch.full((1, 1, 1), 0.0117, dtype=torch.float64)
    assert corrupt(x.clone(), [0], z).item() == torch.tensor(1.0117, dtype=torch.float64).bfloat16().item()
