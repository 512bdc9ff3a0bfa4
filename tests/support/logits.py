"""Logits of an edited model, from the service and from peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from service.engine.versioned_model import VersionedModel
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from tests.support.tiny_models import TEXTS


def padded_texts(model: LoadedModel) -> Any:
    return pad([model.encode(t)[0][: model.max_positions] for t in TEXTS], model)


def logits(model: Any, base: LoadedModel) -> torch.Tensor:
    batch = padded_texts(base)
    with torch.no_grad():
        out = model(input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions)
    values: torch.Tensor = out.logits[batch.mask.bool()]
    return values


def served_logits(replica: VersionedModel, version: int) -> torch.Tensor:
    """Return the logits of the service at a version."""
    batch = padded_texts(replica.base)
    with replica.use_patch(replica.patch(version)) as model, torch.no_grad():
        return forward(model, batch)[batch.mask.bool()]


def load_with_peft(model: Any, folder: Path) -> Any:
    """Return the model with the adapter. peft warns about missing and unexpected modules, and warnings are errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated name of transformers
        return peft.PeftModel.from_pretrained(model, folder).eval()
