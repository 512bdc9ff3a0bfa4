"""The whitened sketch: service.weights.gate_space."""

from __future__ import annotations

import torch

from service.covariance.second_moment import KeyStatistics
from service.weights.gate_space import build_gate_space, deserialize_gate_space

D, LAYER = 60, 1
SPREAD = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
STATISTICS = KeyStatistics(LAYER, SPREAD @ SPREAD.T / D, 1000, 1e-3, "digest")


def whitened_cosine(keys: torch.Tensor) -> torch.Tensor:
    """rho by its definition, with an explicit inverse of the damped C, in fp64."""
    damped = STATISTICS.moment + STATISTICS.damping * STATISTICS.moment.diagonal().mean() * torch.eye(D)
    gram = keys.double() @ torch.linalg.inv(damped) @ keys.double().T
    cosine: torch.Tensor = gram / (gram.diagonal()[:, None] * gram.diagonal()[None]).sqrt()
    return cosine


def test_a_wide_sketch_is_the_whitened_cosine() -> None:
    """The cosine in the space approaches k^T C^-1 l / sqrt(k^T C^-1 k l^T C^-1 l) as the sketch grows."""
    keys = torch.randn(40, D, generator=torch.Generator().manual_seed(4))
    errors = []
    for size in (16, 128, 4096):
        q = build_gate_space(STATISTICS, size).project(keys)
        errors.append(float((q.double() @ q.double().T - whitened_cosine(keys)).abs().mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_projections_have_norm_one_and_ignore_scale() -> None:
    """A key and its multiple have one projection; the zero key gives zero and no NaN."""
    space = build_gate_space(STATISTICS)
    keys = torch.randn(5, D)
    torch.testing.assert_close(space.project(keys), space.project(7 * keys))
    torch.testing.assert_close(space.project(keys).norm(dim=1), torch.ones(5))
    assert not space.project(torch.zeros(1, D)).any()


def test_a_space_is_stored_exactly() -> None:
    """Bytes, layer and digest survive storage, and statistics, size or seed give another digest."""
    space = build_gate_space(STATISTICS)
    read = deserialize_gate_space(space.serialize())
    assert read.layer == LAYER
    assert torch.equal(read.sketch, space.sketch)
    assert read.digest == space.digest
    others = [build_gate_space(STATISTICS, 64), build_gate_space(STATISTICS, seed=1)]
    assert len({space.digest, *(o.digest for o in others)}) == 3
