"""The resident model of a process, as its settings say."""

from __future__ import annotations

import torch

from service.errors import Misconfigured
from service.models.loading import LoadedModel, load
from service.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resident(settings: Settings) -> LoadedModel:
    """Load it, on its device and in its precision."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.dtype not in DTYPES:
        raise Misconfigured(f"dtype {settings.dtype!r} is not known: use {', '.join(DTYPES)}.")
    return load(settings.model, settings.device, DTYPES[settings.dtype])
