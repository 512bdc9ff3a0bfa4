"""The description of a resident model that GET /models returns."""

from __future__ import annotations

from typing import Any

import torch

from service.datasets.fact_table import find_facts_file
from service.editing.context import EditorContext
from service.models.chat import describe_chat_template
from service.models.loading import LoadedModel, WeightRef


def model_info(model: LoadedModel, context: EditorContext) -> dict[str, Any]:
    """Return the shapes, device, recipe and methods of a model as JSON."""
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "architecture": model.architecture.model_type,
        "layers": model.num_layers,
        "positions": model.max_positions,
        "width": model.hidden_size,
        "inner_width": model.intermediate_size,
        "weights": weight_shapes(model),
        "vocabulary": model.vocabulary_size,
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "dtype": str(model.weight(0).dtype).removeprefix("torch."),
        "device": device_kind(model.device),
        "chat": describe_chat_template(model.tokenizer),
        "facts": find_facts_file(model.path) is not None,
        **context.info(),
    }


def weight_shapes(model: LoadedModel) -> dict[str, list[int]]:
    """Return the editable weights of a layer, with the shapes of their changes, (out, in)."""
    parts = [site.part for site in model.editable_weights if site.layer == 0]
    shapes = {part: list(model.parameter(WeightRef(0, part)).shape) for part in parts}
    return {part: shape[::-1] if model.architecture.conv1d else shape for part, shape in shapes.items()}


def device_kind(device: torch.device) -> str:
    """Return the kind of a device. Devices of one kind hold identical bytes at one version."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def tokenizer_json(model: LoadedModel) -> str:
    """Return the tokenizer as JSON, which the torch-free API reads."""
    return str(model.tokenizer.backend_tokenizer.to_str())
