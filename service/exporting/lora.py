"""The change of a version as a LoRA adapter. A sum of rank-one terms is one exactly.

The associations of a weight give W = W0 + L R with L (d, n) and R (n, D). Both factors are orthogonalised in double
precision, L = Q_L T_L and R^T = Q_R T_R, and T_L T_R^T = U S V^T is small:

    A = S^1/2 V^T Q_R^T  (r, D)        B = Q_L U S^1/2  (d, r)        W - W0 = B A

r counts the singular values above the relative precision of fp32, so that the truncation is below the rounding of the
stored numbers. No more is truncated, because the spectrum of edits is flat: each further term would lose a fact.
Splitting S evenly keeps both factors small if keys nearly coincide, so that fp32 suffices to store them.

All layers have one rank, padded with zeros, and alpha = rank, so that alpha / r = 1. Programs that load adapters
support this form, and differ in what else they support.
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

RELATIVE_RANK_TOLERANCE = 2.0**-24  # of the largest singular value: half a unit in the last place of fp32


@dataclass(frozen=True)
class LoraFactors:
    """The change of one weight as B A, in fp32."""

    a: Tensor = field(repr=False)  #: (r, D)
    b: Tensor = field(repr=False)  #: (d, r)
    terms: int  #: rank-one terms of the change
    residual: float  #: |change - B A| / |change|, Frobenius norms

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def padded(self, rank: int) -> LoraFactors:
        """Return the factors padded with zeros to a rank."""
        a, b = torch.zeros(rank, self.a.shape[1]), torch.zeros(self.b.shape[0], rank)
        a[: self.rank], b[:, : self.rank] = self.a, self.b
        return LoraFactors(a, b, self.terms, self.residual)


def lora_factors(change: WeightDelta) -> LoraFactors:
    """Return the factors of a change without a dense term."""
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
    """The factors of every edited weight, padded to one rank."""

    factors: dict[WeightRef, LoraFactors]
    ranks: dict[WeightRef, int]  #: before padding

    @classmethod
    def from_changes(cls, changes: Mapping[WeightRef, WeightDelta]) -> LoraAdapter:
        """Build the adapter of some changes of weights."""
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
        """Run the base model with the adapter beside its weights, as PEFT does."""
        with ExitStack() as stack:
            for site, f in self.factors.items():
                device = model.weight(site.layer).device
                a, b = f.a.to(device), f.b.to(device)
                stack.enter_context(add_low_rank(model.down_proj(site.layer), b, a))
            yield

    def tensors(self, model: LoadedModel) -> dict[str, Tensor]:
        """Return the tensors by their names in a PEFT adapter file."""
        named: dict[str, Tensor] = {}
        for site, f in self.factors.items():
            name = f"base_model.model.{module_name(model, site)}"
            named |= {f"{name}.lora_A.weight": f.a, f"{name}.lora_B.weight": f.b}
        return named

    def config(self, model: LoadedModel, base: str) -> str:
        """Return adapter_config.json.

        Module names are complete, because "c_proj" alone would match the attention too.
        """
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
    """Return indented JSON with a final line end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
