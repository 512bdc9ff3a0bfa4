"""A version's change as a LoRA adapter: a sum of rank-one terms *is* one.

Of the associations of a weight, W = W0 + L R with L (d, n) and R (n, D). Both factors are orthogonalised in double precision, L = Q_L T_L and
R^T = Q_R T_R, and T_L T_R^T = U S V^T is small:

    A = S^1/2 V^T Q_R^T  (r, D)        B = Q_L U S^1/2  (d, r)        W - W0 = B A

r counts the singular values that single precision can tell from nothing beside the largest: what is left out is below the rounding
of the numbers that are stored. Nothing more is ever cut off, for the spectrum of edits is flat: a term less is a fact less. Splitting S
evenly keeps the numbers of both factors small also where keys nearly coincide, so that storing them in single precision costs nothing.

The portable form has one rank for all layers, padded with zeros, and alpha = rank, so that the factor alpha / r is one; the
programs that read adapters differ in what else they understand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from service.models.hooks import add_low_rank
from service.models.loading import LoadedModel, WeightRef
from service.weights.composition import WeightDelta
from service.weights.factors import LowRank
from service.weights.solve import single_threaded

RELATIVE_RANK_TOLERANCE = 2.0**-24  # of the largest: half a unit in the last place of single precision


@dataclass(frozen=True)
class LoraFactors:
    """The change of one weight as B A, in single precision."""

    a: Tensor = field(repr=False)  #: (r, D)
    b: Tensor = field(repr=False)  #: (d, r)
    terms: int  #: rank-one terms that it was made of
    residual: float  #: |change - B A| / |change|, Frobenius norms

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def padded(self, rank: int) -> LoraFactors:
        """The same with zeros up to a rank."""
        a, b = torch.zeros(rank, self.a.shape[1]), torch.zeros(self.b.shape[0], rank)
        a[: self.rank], b[:, : self.rank] = self.a, self.b
        return LoraFactors(a, b, self.terms, self.residual)


def lora_factors(change: WeightDelta) -> LoraFactors:
    """The factors of a change that is a sum of rank-one terms alone."""
    assert change.dense_term is None
    left = torch.cat([low.left for low in change.low_rank_terms], 1)
    right = torch.cat([low.right.double() for low in change.low_rank_terms])
    with single_threaded():
        q_left, t_left = torch.linalg.qr(left)
        q_right, t_right = torch.linalg.qr(right.T)
        u, s, vt = torch.linalg.svd(t_left @ t_right.T, full_matrices=False)
    rank = max(1, int((s > s[0] * RELATIVE_RANK_TOLERANCE).sum()))
    root = s[:rank].sqrt()
    a = (root[:, None] * (vt[:rank] @ q_right.T)).float().contiguous()
    b = (q_left @ (u[:, :rank] * root)).float().contiguous()
    error_norm = LowRank(torch.cat([left, -b.double()], 1), torch.cat([right, a.double()])).norm()
    change_norm = float(s.norm())
    return LoraFactors(a, b, left.shape[1], error_norm / change_norm if change_norm else 0.0)


@dataclass(frozen=True)
class LoraAdapter:
    """The factors of every edited weight, in one rank."""

    factors: dict[WeightRef, LoraFactors]
    ranks: dict[WeightRef, int]  #: before they were padded

    @classmethod
    def from_changes(cls, changes: Mapping[WeightRef, WeightDelta]) -> LoraAdapter:
        lora_factors_by_site = {site: lora_factors(change) for site, change in sorted(changes.items())}
        rank = max(f.rank for f in lora_factors_by_site.values())
        return cls(
            {site: f.padded(rank) for site, f in lora_factors_by_site.items()},
            {s: f.rank for s, f in lora_factors_by_site.items()},
        )

    @property
    def rank(self) -> int:
        return next(iter(self.factors.values())).rank

    @contextmanager
    def attached_to(self, model: LoadedModel) -> Iterator[None]:
        """The base model with the adapter beside its weights, as a library of adapters runs it."""
        with ExitStack() as stack:
            for site, f in self.factors.items():
                a, b = f.a.to(model.device), f.b.to(model.device)
                stack.enter_context(add_low_rank(model.down_proj(site.layer), b, a))
            yield

    def tensors(self, model: LoadedModel) -> dict[str, Tensor]:
        """By the names under which peft looks for them."""
        named: dict[str, Tensor] = {}
        for site, f in self.factors.items():
            name = f"base_model.model.{module_name(model, site)}"
            named |= {f"{name}.lora_A.weight": f.a, f"{name}.lora_B.weight": f.b}
        return named

    def config(self, model: LoadedModel, base: str) -> str:
        """adapter_config.json. Full names of modules: "c_proj" alone would be the attention's, too."""
        return pretty_json(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "inference_mode": True,
                "r": self.rank,
                "lora_alpha": self.rank,
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": model.architecture.conv1d,
                "target_modules": [module_name(model, site) for site in self.factors],
                "rank_pattern": {},
                "alpha_pattern": {},
                "modules_to_save": None,
                "use_rslora": False,
                "use_dora": False,
                "init_lora_weights": True,
            }
        )


def module_name(model: LoadedModel, site: WeightRef) -> str:
    return model.parameter_name(site).removesuffix(".weight")


def pretty_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """JSON as a person reads it, the same every time."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
