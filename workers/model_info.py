"""What a worker says of its resident model: the info of GET /models."""

from __future__ import annotations

from typing import Any

import torch

from service.datasets.fact_table import find_facts_file
from service.editing.context import EditorContext
from service.models.loading import LoadedModel, WeightRef


def model_info(model: LoadedModel, context: EditorContext) -> dict[str, Any]:
    """Shape, place and tools of a model, as plain JSON."""
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "architecture": model.architecture.model_type,
        "layers": model.num_layers,
        "positions": model.max_positions,
        "width": model.hidden_size,
        "inner_width": model.intermediate_size,
        "weights": weight_shapes(model),
        "vocabulary": int(model.model.config.vocab_size),
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "dtype": str(model.weight(0).dtype).removeprefix("torch."),
        "device": device_kind(model.device),
        "facts": find_facts_file(model.folder) is not None,
        **context.info(),
    }


def weight_shapes(model: LoadedModel) -> dict[str, list[int]]:
    """The weights of a layer that edits may change, with the shapes of their changes: (out, in)."""
    parts = [site.part for site in model.editable_weights if site.layer == 0]
    shapes = {part: list(model.parameter(WeightRef(0, part)).shape) for part in parts}
    return {part: shape[::-1] if model.architecture.conv1d else shape for part, shape in shapes.items()}


def device_kind(device: torch.device) -> str:
    """Devices of one kind hold identical bytes at one version."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tokenizer_json(model: LoadedModel) -> str:
    """The tokenizer as the torch-free side reads it."""
    return str(model.tokenizer.backend_tokenizer.to_str())
