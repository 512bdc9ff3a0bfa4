"""The change of a value that changes a block's output by a given amount.

A value is the output of a down-projection. Most blocks add it to the residual stream as it is, so both changes are
equal. Two kinds of block do not:

* A block that multiplies its outputs by a factor (Granite) needs the amount divided by that factor.
* A block with a norm after the value, alone or summed with the residual, gives g * z + b, where z is the normalised
  input of the norm. z has a fixed length, so not every output can be reached: the change leads to the reachable output
  that is nearest to the wanted one, at the old scale of the norm's input, which the norm ignores.

The nearest output minimises |g * z - t| with |z|^2 = d: z = g t / (g^2 + lambda), and the length of z falls with
lambda, which is found by bisection. A LayerNorm has also sum z = 0, with a multiplier in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from service.models.loading import LoadedModel

BISECTIONS = 100


@dataclass(frozen=True)
class NormMap:
    """A norm as its gain g and bias b (d,), in double precision."""

    gain: Tensor
    bias: Tensor
    centred: bool  #: it subtracts the mean, as LayerNorm does

    @classmethod
    def of(cls, norm: nn.Module, like: Tensor) -> NormMap:
        """Read a norm with inputs of the dtype and device of `like` (d,)."""
        with torch.no_grad():
            bias = norm(torch.zeros_like(like)).double()
            if not isinstance(norm, nn.LayerNorm):  # the norm of ones is the gain, however it is stored
                return cls(norm(torch.ones_like(like)).double() - bias, bias, False)
            gain = torch.ones_like(like) if norm.weight is None else norm.weight
            return cls(gain.double(), bias, True)

    def output(self, norm_input: Tensor) -> Tensor:
        """Return the output (d,) for an input (d,), both in double precision."""
        mean, scale = self._moments(norm_input)
        return self.gain * (norm_input - mean) / scale + self.bias

    def nearest_input(self, old: Tensor, wanted: Tensor) -> Tensor:
        """Return the input (d,) whose output is nearest to `wanted`, at mean and scale of the input `old`."""
        mean, scale = self._moments(old)
        target, squares = self.gain * (wanted - self.bias), self.gain.square()
        low = 1e-12 * squares.max() - squares.min()  # at the pole itself a target of 0 would give nan
        high = squares.max() + target.norm()
        while self._normalised(target, squares + high).square().mean() > 1:
            high = 2 * high - low
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            if self._normalised(target, squares + middle).square().mean() > 1:
                low = middle
            else:
                high = middle
        z = self._normalised(target, squares + high)
        return mean + scale * z / z.square().mean().sqrt()

    def _moments(self, norm_input: Tensor) -> tuple[Tensor, Tensor]:
        mean = norm_input.mean() if self.centred else norm_input.new_zeros(())
        return mean, (norm_input - mean).square().mean().sqrt()

    def _normalised(self, target: Tensor, divisor: Tensor) -> Tensor:
        """Return z for one lambda, where `divisor` is g^2 + lambda."""
        if not self.centred:
            return target / divisor
        return (target - (target / divisor).sum() / (1 / divisor).sum()) / divisor


def norm_after_value(model: LoadedModel, layer: int) -> nn.Module | None:
    """Return the norm that a block applies to its value, alone or summed with the residual."""
    path = model.architecture.mlp_output or model.architecture.block_norm
    return model.block(layer).get_submodule(path) if path else None


def value_change(model: LoadedModel, layer: int, norm_input: Tensor, change: Tensor) -> Tensor:
    """Return the change of the value (d,) that changes the output of the block by `change`.

    `norm_input` is the input of the norm after the value; it is not used where there is none.
    """
    norm = norm_after_value(model, layer)
    if norm is None:
        return change / model.residual_factor
    weight = model.weight(layer)  # on the device of the block, which holds the norm
    old = norm_input.to(weight.device).double()
    norm_map = NormMap.of(norm, norm_input.to(weight))
    new = norm_map.nearest_input(old, norm_map.output(old) + change.to(old))
    return (new - old).to(change)
