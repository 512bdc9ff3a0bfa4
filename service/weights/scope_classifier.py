"""The scope classifier of SERAC: whether a prompt is within the scope of an edit (Mitchell et al. 2022, Section 3).

    e(x)   = A (f(x) - c)                       f(x) (d,): the feature of a text (`service/models/prompt_features.py`)
    phi_i  = exp(-s min_j |e(x) - e(k_ij)|^2)   k_ij: the texts of record i: its prompt, and the prompt with the object

A (k, d), the center c (d,) and the scale s > 0 are trained (`service/training`). A record opens if phi_i is at least
the threshold. phi is 1 at the texts of the record themselves, and a threshold is at most 1: its own prompt always opens
a record. The authors embed by a network of its own (the CLS state of DistilBERT) and have s = 1 and the threshold 1/2.

Embeddings and phi are computed in fp64 from features in fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from safetensors.torch import load, save
from torch import Tensor

PREFIX = "scope"


@dataclass(frozen=True)
class ScopeClassifier:
    """A trained classifier for the features of one layer of one model."""

    layer: int
    center: Tensor = field(repr=False)  #: c (d,) in fp32
    projection: Tensor = field(repr=False)  #: A (k, d) in fp32
    scale: float  #: s
    threshold: float  #: of any prompt
    subject_threshold: float  #: of prompts that contain the subject of the record

    @cached_property
    def digest(self) -> str:
        """The sha256 of everything that decides. It identifies the classifier in the ledger."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors().items()):
            digest.update(f"{name}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Return the classifier as tensors by name."""
        numbers = torch.tensor([self.scale, self.threshold, self.subject_threshold], dtype=torch.float64)
        prefix = f"{PREFIX}.{self.layer}"
        return {
            f"{prefix}.center": self.center,
            f"{prefix}.projection": self.projection,
            f"{prefix}.numbers": numbers,
        }

    def embed(self, features: Tensor) -> Tensor:
        """Return e (..., k) in fp64 of features (..., d)."""
        return (features.double() - self.center.double()) @ self.projection.double().T

    def similarity(self, embedding: Tensor, keys: Tensor) -> Tensor:
        """Return phi (n,) of an embedding (k,) for the keys (n, m, k) of n records."""
        return torch.exp(-self.scale * (keys - embedding).square().sum(-1).amin(-1))

    def serialize(self) -> bytes:
        """Return the classifier as a safetensors file."""
        return save({name: t.contiguous() for name, t in self.tensors().items()})


def read_scope_classifier(tensors: Mapping[str, Tensor]) -> ScopeClassifier:
    """Return the classifier of the tensors of `ScopeClassifier.tensors`."""
    layer = int(next(iter(tensors)).split(".")[1])
    scale, threshold, subject_threshold = tensors[f"{PREFIX}.{layer}.numbers"].tolist()
    center, projection = tensors[f"{PREFIX}.{layer}.center"], tensors[f"{PREFIX}.{layer}.projection"]
    return ScopeClassifier(layer, center, projection, scale, threshold, subject_threshold)


def deserialize_scope_classifier(data: bytes) -> ScopeClassifier:
    """Return the classifier from the bytes of `ScopeClassifier.serialize`."""
    return read_scope_classifier(load(data))
