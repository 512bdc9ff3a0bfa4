"""Features of texts: the mean of the base model's hidden states at a low layer.

    f(x) = 1/T sum_t h_t / rms(h_t)        h_t (d,): the output of one block at token t;  rms(h) = |h| / sqrt(d)

Each state is divided by its root mean square first, because the state of a text's first token is many times longer
than the others in most models.

A feature is a function of the base model and the tokens alone. It is read from a copy of the model's modules that
shares the storage of the base weights, so that edited weights and hooks that are in place have no effect; and each
text is read in a pass of its own, so that neither company in a batch nor padding has one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad

MAX_CACHED_FEATURES = 4096


class FeatureReader:
    """Reads the features of texts at one layer. Make it while the model holds its base bytes."""

    def __init__(self, model: LoadedModel, layer: int) -> None:
        self.layer = layer
        self._base = replace(model, model=_share_weights(model.model))
        self._block = self._base.block(layer)
        self._cache: OrderedDict[tuple[int, ...], Tensor] = OrderedDict()

    def read(self, ids: Sequence[int]) -> Tensor:
        """Return f (d,) in fp32 on the CPU of token ids, at most as many as the model has positions."""
        key = tuple(ids[: self._base.max_positions])
        if key not in self._cache:
            self._cache[key] = mean_direction(self._run([key])[0])
            if len(self._cache) > MAX_CACHED_FEATURES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def read_batch(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the features (n, d) of several texts from one pass, for training: their last bits depend on the
        batch."""
        rows = [ids[: self._base.max_positions] for ids in texts]
        states = self._run(rows)
        return torch.stack([mean_direction(s[: len(ids)]) for s, ids in zip(states, rows, strict=True)])

    def _run(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the hidden states (n, T, d) in fp32 on the CPU."""
        with capture({0: self._block}) as states, stop_after(self._block):
            forward(self._base, pad(rows, self._base))
        return states[0].float().cpu()


def mean_direction(states: Tensor) -> Tensor:
    """Return f (d,) of hidden states (T, d)."""
    rms = states.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(states.dtype).tiny)
    return (states / rms).mean(0)


def reader_of(model: LoadedModel, layer: int) -> FeatureReader:
    """Return the reader of a layer, which all routers of the model share."""
    if layer not in model.routing.readers:
        model.routing.readers[layer] = FeatureReader(model, layer)
    reader: FeatureReader = model.routing.readers[layer]
    return reader


def _share_weights(module: nn.Module) -> nn.Module:
    """Return a copy of modules whose parameters are tensors of their own on the same storage."""
    shared: dict[int, object] = {
        id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()
    }
    shared |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, shared)
