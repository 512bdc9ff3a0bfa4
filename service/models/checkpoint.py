"""Checks of a model's files: a checkpoint that would be loaded as something else than its authors meant is refused.

transformers drops tensors that a model does not use, initializes those that the files lack at random, and lets a
quantised or adapted model take the place of the base model. Each function raises Misconfigured and says what to change.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import cached_file, find_adapter_config_file

from service.errors import Misconfigured

MAX_NAMES = 3  # names of tensors in a message
#: buffers that older releases of transformers saved: causal masks and tables of rotary positions, computed since
SAVED_BUFFERS = re.compile(
    r"(^|\.)(attn|attention|self_attn)\.(bias|masked_bias|causal_mask|scale_attn|embed_positions)$"
    r"|(^|\.)rotary_emb\.inv_freq$"
)
#: tensors that quantisation adds to a weight
QUANTISED_PARTS = re.compile(
    r"(_scale|_scale_inv|_scale_2|\.scales|\.qweight|\.qzeros|\.g_idx|_packed|_zero_point|\.SCB|\.absmax"
    r"|\.quant_map|\.quant_state\.\w+|_blocks|_scales)$"
)
QUANTISATION_KEYS = ("quantization_config", "compression_config")
EXPERT_KEYS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_experts_per_tok",
)
FULL_PRECISION = ("F64", "F32", "F16", "BF16")  # types in safetensors files
ACTIVATION_KEYS = ("hidden_act", "activation_function", "hidden_activation", "activation")
#: configurations of parts that read other inputs than text
MODALITY_KEYS = ("vision_config", "audio_config")


def refuse_adapter(source: str | Path) -> None:
    """Raise Misconfigured for a folder or a hub's model with adapter_config.json."""
    path = find_adapter_config_file(str(source))
    if path is None:
        return
    base = _adapter_base(Path(path))
    raise Misconfigured(
        f"the model {str(source)!r} is an adapter (adapter_config.json): give its base model{base} with --model and this "
        "folder with --adapter."
    )


def _adapter_base(path: Path) -> str:
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" {base!r}" if base else ""


def check_config_values(source: str | Path, values: Mapping[str, Any]) -> None:
    """Raise Misconfigured when config.json describes a quantised model or a mixture of experts."""
    for key in QUANTISATION_KEYS:
        if values.get(key) is not None:
            method = values[key].get("quant_method") if isinstance(values[key], dict) else None
            raise _quantised(source, f"{key} in config.json, method {method or 'unknown'}")
    _refuse_experts(source, values)


def _refuse_experts(source: str | Path, values: Mapping[str, Any]) -> None:
    for part in (values, *(v for v in values.values() if isinstance(v, Mapping))):
        for key in EXPERT_KEYS:
            if isinstance(part.get(key), int) and part[key] > 1:
                raise Misconfigured(
                    f"the model {str(source)!r} is a mixture of experts ({key} in config.json is {part[key]}), and an "
                    "edit changes the one MLP of a layer: give a dense model."
                )


def check_kind(source: str | Path, config: Any) -> None:
    """Raise Misconfigured for a model that is not a dense, causal model of text. The values of `config` include the
    defaults of its type, which config.json may omit."""
    values = config.to_dict()
    if modality := next((key for key in MODALITY_KEYS if values.get(key)), None):
        raise Misconfigured(
            f"the model {str(source)!r} is multimodal ({modality} in config.json), and facts are edited in a model of "
            "text: save its language model alone, and give that."
        )
    if values.get("is_encoder_decoder"):
        raise Misconfigured(
            f"the model {str(source)!r} is an encoder-decoder ({config.model_type}), and edits and traces need a causal "
            "model: give a decoder-only model."
        )
    if values.get("use_bidirectional_attention"):
        raise Misconfigured(
            f"the model {str(source)!r} attends in both directions (use_bidirectional_attention in config.json), and "
            "edits and traces need a causal model: give a model that generates text."
        )
    _refuse_experts(source, values)


def _quantised(source: str | Path, evidence: str) -> Misconfigured:
    return Misconfigured(
        f"the model {str(source)!r} is quantised ({evidence}), and Palimpsest edits full-precision weights: give the "
        "unquantised model."
    )


def check_functions(source: str | Path, config: Any) -> None:
    """Raise Misconfigured when the configuration names an activation or a rotary embedding that is not known."""
    for key in ACTIVATION_KEYS:
        name = getattr(config, key, None)
        if isinstance(name, str) and name not in ACT2FN:
            raise _unknown(source, key, name, ACT2FN)
    for name in _rope_types(getattr(config, "rope_parameters", None)):
        if name != "default" and name not in ROPE_INIT_FUNCTIONS:
            raise _unknown(source, "rope_type", name, ("default", *ROPE_INIT_FUNCTIONS))


def _rope_types(parameters: Any) -> Iterator[str]:
    """Yield the types of rotary parameters; some models have parameters for each kind of layer."""
    if isinstance(parameters, Mapping):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)


def _unknown(source: str | Path, key: str, name: str, known: Iterable[str]) -> Misconfigured:
    return Misconfigured(
        f"the model {str(source)!r} has an unknown {key} {name!r} in config.json: correct it, or give a model with one "
        f"of {', '.join(sorted(known))}."
    )


def check_tensors(source: str | Path, report: Mapping[str, Any]) -> None:
    """Raise Misconfigured unless the files hold exactly the tensors of the model. `report` is the loading information
    of transformers, which counts neither tied weights nor buffers that are computed."""
    unused = sorted(n for n in report["unexpected_keys"] if not SAVED_BUFFERS.search(n))
    if quantised := [name for name in unused if QUANTISED_PARTS.search(name)]:
        raise _quantised(source, f"its files have {_some(quantised)}")
    if missing := sorted(report["missing_keys"]):
        raise _unfit(source, f"its weights lack {_some(missing)}")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise _unfit(
            source, f"{name} has the shape {tuple(stored)} and config.json asks for {tuple(expected)}"
        )
    if unused:
        raise _unfit(source, f"its files have tensors that the model does not use: {_some(unused)}")


def check_stored_types(source: str | Path) -> None:
    """Raise Misconfigured when a loaded file stores tensors in a type of quantised weights."""
    config = cached_file(str(source), "config.json")  # in the same folder as the weights, also those of a hub
    for path in sorted(Path(str(config)).parent.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118, the file itself is not iterable
                stored = file.get_slice(name).get_dtype()
                if stored not in FULL_PRECISION and not SAVED_BUFFERS.search(name):
                    raise _quantised(source, f"{name} is stored as {stored}")


def _some(names: list[str]) -> str:
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _unfit(source: str | Path, reason: str) -> Misconfigured:
    return Misconfigured(
        f"the model {str(source)!r} cannot be loaded: {reason}. Its weights and config.json do not belong together: "
        "give both from one model."
    )
