"""Random tensors of edits at the limits of what an import accepts: service.application.edit_set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import numpy as np
from safetensors.numpy import save

from service.application.tensor_checks import MAX_MAGNITUDE
from service.methods.registry import SOLVE_RULES
from service.weights.factors import EditUpdate, deserialize_updates

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Tensors = dict[str, np.ndarray[tuple[int, ...], np.dtype[np.floating | np.integer]]]

#: sizes of numbers, from the smallest denormal number of fp32 to the largest that an import accepts
SIZES = (0.0, 1e-45, 1e-38, 1e-20, 1e-6, 1.0, 1.0, 1.0, 1e6, 1e20, MAX_MAGNITUDE)
RIDGES = (0.0, 0.0, 5e-324, 1e-30, 1e-3, 1.0, 15000.0, MAX_MAGNITUDE)
MODES = tuple(SOLVE_RULES)
POWERS = (
    -100,
    -60,
    -20,
    -1,
    1,
    20,
    60,
    100,
)  #: of 2: scaling by these is exact, and leaves a system singular


class HostileFactors:
    """Draws the tensors of edits. Later ones repeat, negate, scale and slightly change vectors of earlier ones."""

    def __init__(self, random: Random, width: int, inner_width: int) -> None:
        self._random, self._width, self._inner_width = random, width, inner_width
        self._numbers = np.random.default_rng(random.getrandbits(32))
        self._earlier: dict[int, list[Array]] = {width: [], inner_width: []}

    def associations(self, layers: Sequence[int], most: int = 1) -> Tensors:
        """Return the tensors of one association at each layer, or of several where an edit can have them."""
        tensors: Tensors = {}
        counts = {layer: self._random.choice((1, 2, 3)) if most > 1 else 1 for layer in layers}
        places = [(layer, n) for layer, count in counts.items() for n in range(count)]
        for layer, number in places:
            key = self._vector(self._inner_width)
            related = self._random.random() < 0.5
            direction = self._related(key) if related else self._vector(self._inner_width)
            value = self._vector(self._width)
            names = {"key": key, "direction": direction, "value": value, "left": value, "right": direction}
            place = f"{layer}.{number}" if number else str(layer)
            tensors |= {f"layer.{place}.{name}": vector for name, vector in names.items()}
            if number == 0 and self._random.random() < 0.7:
                ridge = self._random.choice(RIDGES)
                tensors[f"layer.{layer}.form.{self._random.choice(MODES)}"] = np.array([ridge])
        return tensors

    def dense(self, layers: Sequence[int], parts: Mapping[str, Sequence[int]]) -> Tensors:
        """Return the change of each of these parts of each layer, which `parts` maps to their shapes."""
        return {
            f"weight.{layer}.{part}": self._new(shape[0] * shape[1]).reshape(*shape)
            for layer in layers
            for part, shape in parts.items()
        }

    def entries(self, layers: Sequence[int]) -> Tensors:
        """Return the tensors of one entry of a codebook at each layer."""
        tensors: Tensors = {}
        for layer in layers:
            parts = {
                "key": self._vector(self._inner_width),
                "output": self._vector(self._width),
                "value": self._vector(self._width),
                "radius": np.array([self._random.choice(SIZES)]),
                "label": np.array(self._random.choice(([3], [-1, 3], [4, 5])), np.int64),
                "replayed": np.array([0], np.uint8),
            }
            tensors |= {f"codebook.{layer}.{name}": tensor for name, tensor in parts.items()}
        return tensors

    def classifier(self, layer: int, dimensions: int = 3) -> Tensors:
        """Return the tensors of a scope classifier."""
        scale = self._random.choice([s for s in SIZES if s > 0])
        thresholds = [self._random.choice((0.0, 0.5, 1.0)) for _ in range(2)]
        return {
            f"scope.{layer}.center": self._vector(self._width),
            f"scope.{layer}.projection": self._new(dimensions * self._width).reshape(dimensions, -1),
            f"scope.{layer}.numbers": np.array([scale, *thresholds]),
        }

    def record(self, layer: int, classifier: str, text: bytes, dimensions: int = 3) -> Tensors:
        """Return the tensors of a statement record, whose classifier has this digest."""
        parts: Tensors = {
            "classifier": np.frombuffer(bytes.fromhex(classifier), np.uint8),
            "keys": self._new(2 * dimensions).reshape(2, -1).astype(np.float64),
            "text": np.frombuffer(text, np.uint8),
            "threshold": np.array([self._random.choice((0.0, 0.5, 1.0))]),
        }
        return {f"record.{layer}.{name}": tensor for name, tensor in parts.items()}

    def _vector(self, n: int) -> Array:
        earlier = self._earlier[n]
        vector = (
            self._related(self._random.choice(earlier))
            if earlier and self._random.random() < 0.6
            else self._new(n)
        )
        earlier.append(vector)
        return vector

    def _new(self, n: int) -> Array:
        size, kind = self._random.choice(SIZES), self._random.randrange(4)
        if kind == 0:
            numbers = np.full(n, size)
        elif kind == 1:
            numbers = size * np.eye(n)[self._random.randrange(n)]
        elif kind == 2:  # numbers of very different sizes
            numbers = self._numbers.standard_normal(n) * self._numbers.choice(SIZES, n)
        else:
            numbers = size * self._numbers.standard_normal(n)
        return _accepted(numbers)

    def _related(self, vector: Array) -> Array:
        kind = self._random.randrange(6)
        if kind == 0:
            return vector
        if kind == 1:
            return -vector
        if kind == 2:
            return _accepted(vector.astype(float) * 2.0 ** self._random.choice(POWERS))
        if kind == 3:  # nearly parallel
            return _accepted(vector * (1 + 1e-7 * self._numbers.standard_normal(len(vector))))
        if kind == 4:
            return np.nextafter(vector, np.float32(0))
        return _accepted(vector + self._new(len(vector)).astype(float))


def _accepted(numbers: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Array:
    """Return the numbers as fp32, none larger than an import accepts."""
    limit = np.nextafter(np.float32(MAX_MAGNITUDE), np.float32(0))
    with np.errstate(under="ignore", over="ignore"):
        return np.clip(numbers, -float(limit), float(limit)).astype(np.float32)


def random_updates(random: Random, width: int, inner_width: int, edits: int) -> dict[str, list[EditUpdate]]:
    """Return the updates of edits of layer 0 by id, as read from their stored bytes. Some share a subject."""
    factors = HostileFactors(random, width, inner_width)
    updates: dict[str, list[EditUpdate]] = {}
    for number in range(edits):
        edit = f"edit_{number:03}"
        is_dense = random.random() < 0.15
        tensors = factors.dense([0], {"mlp": (width, inner_width)}) if is_dense else factors.associations([0])
        updates[edit] = deserialize_updates(save(tensors), edit, random.choice("abcd"))
    return updates
