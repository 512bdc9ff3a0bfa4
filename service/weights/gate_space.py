"""The space in which a gate compares keys: a whitened sketch.

The whitened cosine of two keys, rho(k, l) = k^T C^-1 l / sqrt((k^T C^-1 k) (l^T C^-1 l)), is the cosine of L^-1 k and
L^-1 l with C = L L^T. It tells subjects apart where the plain cosine does not, because the keys of a layer share a few
strong directions. The sketch keeps it at a fraction of the cost:

    q(k) = R k / |R k|        R = Omega L^-1 / sqrt(r)        Omega (r, D), independent standard normal entries

|R k|^2 estimates k^T C^-1 k with relative standard deviation sqrt(2 / r) (Johnson and Lindenstrauss 1984), at r D
products a token in place of D^2. C is the second moment of keys (`service/covariance/second_moment.py`).

Decisions are made in fp32: keys of a lower precision are widened first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import torch
from safetensors.torch import load, save
from torch import Tensor

from service.covariance.second_moment import KeyStatistics
from service.methods.gate_sizes import SKETCH_SIZE

SEED = 0


@dataclass(frozen=True)
class GateSpace:
    """The sketch of one layer."""

    layer: int
    sketch: Tensor = field(repr=False)  #: R (r, D) in fp32

    @cached_property
    def digest(self) -> str:
        """The sha256 of the layer and the bytes of the sketch. It identifies the space in the ledger."""
        digest = hashlib.sha256(f"{self.layer}:{tuple(self.sketch.shape)}".encode())
        digest.update(self.sketch.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def project(self, keys: Tensor) -> Tensor:
        """Return q(k) of keys (..., D), (..., r) in fp32 on their device. A key in the kernel of R gives zero."""
        projected: Tensor = torch.nn.functional.normalize(
            keys.float() @ self.sketch.to(keys.device).T, dim=-1
        )
        return projected

    def serialize(self) -> bytes:
        """Return the space as a safetensors file."""
        return save({f"layer.{self.layer}.sketch": self.sketch.contiguous()})


def build_gate_space(statistics: KeyStatistics, size: int = SKETCH_SIZE, seed: int = SEED) -> GateSpace:
    """Return the space of a layer from its statistics. The product is computed in fp64 and rounded once."""
    lower = statistics.cholesky
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(size, len(lower), generator=generator, dtype=torch.float64)
    sketch = torch.linalg.solve_triangular(lower.mT, omega.T, upper=True).T / size**0.5
    return GateSpace(statistics.layer, sketch.float().contiguous())


def deserialize_gate_space(data: bytes) -> GateSpace:
    """Return the space from the bytes of `GateSpace.serialize`."""
    ((name, sketch),) = load(data).items()
    return GateSpace(int(name.split(".")[1]), sketch)
