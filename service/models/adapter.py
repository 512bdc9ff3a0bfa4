"""Merges a LoRA adapter, as PEFT writes them, into the weights of its base model: W + scale B A."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from service.errors import Misconfigured

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
#: ways to initialise the factors that leave the base weights as they are
NEUTRAL_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
#: forms of adapters that are more than W + scale B A
OTHER_FORMS = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)


class AdapterConfig(BaseModel):
    """The values of adapter_config.json that merging needs."""

    model_config = ConfigDict(extra="allow", frozen=True)

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    bias: str = "none"
    init_lora_weights: bool | str | None = True

    def rank(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """Return the value of the first pattern that matches the end of a module's name, as PEFT finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Add an adapter to the weights of a model, computed in fp64. Raise Misconfigured for an adapter that does not fit
    or that is more than a sum of B A."""
    config = _read_config(folder)
    factors = _read_factors(folder)
    modules = dict(model.named_modules())
    tied = _tied_weights(model)
    for name, pair in factors.items():
        layer = modules.get(name)
        if not isinstance(layer, (nn.Linear, Conv1D)):
            raise _unusable(
                folder, f"it changes {name}, which the base model does not have as a linear layer"
            )
        if layer.weight.data_ptr() in tied:
            raise _unusable(folder, f"it changes {name}, whose weight is also the token embedding")
        if set(pair) != {"A", "B"}:
            raise _unusable(folder, f"{name} has only one of lora_A and lora_B")
        _add(layer, pair["A"], pair["B"], config, name, folder)


def _add(
    layer: nn.Linear | Conv1D, a: Tensor, b: Tensor, config: AdapterConfig, name: str, folder: Path
) -> None:
    weight: Tensor = layer.weight
    stored = weight.T if isinstance(layer, Conv1D) else weight  # (out, in)
    if a.ndim != 2 or b.ndim != 2 or (b.shape[0], a.shape[1]) != stored.shape:
        shapes = f"{tuple(b.shape)} and {tuple(a.shape)}, and the weight is {tuple(stored.shape)}"
        raise _unusable(folder, f"the factors of {name} are {shapes}: it belongs to another base model")
    if not a.shape[0] == b.shape[1] == config.rank(name):
        raise _unusable(
            folder, f"the rank of {name} is {a.shape[0]} and {CONFIG_FILE} says {config.rank(name)}"
        )
    with torch.no_grad():
        stored.copy_(stored.double() + config.scale(name) * (b.double() @ a.double()))


def _tied_weights(model: Any) -> set[int]:
    return {model.get_input_embeddings().weight.data_ptr()}


def _read_config(folder: Path) -> AdapterConfig:
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config = AdapterConfig.model_validate(values)
    except OSError as error:
        raise Misconfigured(
            f"the adapter {str(folder)!r} has no readable {CONFIG_FILE}: give the folder of a LoRA adapter with --adapter."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        raise _unusable(
            folder, f"{CONFIG_FILE}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from error
    except ValueError as error:
        raise _unusable(folder, f"{CONFIG_FILE} is not JSON ({error})") from error
    if config.peft_type != "LORA":
        raise _unusable(folder, f"it is of the type {config.peft_type}, and LORA is merged")
    for key in OTHER_FORMS:
        if values.get(key):
            raise _unusable(folder, f"{key} in {CONFIG_FILE} is more than a low-rank change of linear layers")
    if config.bias != "none":
        raise _unusable(folder, f"it changes biases (bias in {CONFIG_FILE} is {config.bias!r})")
    if config.init_lora_weights not in NEUTRAL_INITS:
        raise _unusable(
            folder, f"its base weights were changed too (init_lora_weights is {config.init_lora_weights!r})"
        )
    return config


def _read_factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the factors A and B of each module."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise _unusable(folder, f"it has no {WEIGHTS_FILE}; pickles are not read")
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        match = NAME.fullmatch(name)
        if match is None:
            raise _unusable(folder, f"{WEIGHTS_FILE} has {name}, which is no factor of a linear layer")
        factors.setdefault(match["module"], {})[match["factor"]] = tensor
    return factors


def _unusable(folder: Path, reason: str) -> Misconfigured:
    return Misconfigured(
        f"the adapter {str(folder)!r} cannot be merged: {reason}. Merge it with the program that made it, and give the merged "
        "model with --model."
    )
