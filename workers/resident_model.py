"""The resident model of a process, as its settings say."""

from __future__ import annotations

import torch

from service.editing.context import RECIPES_FOLDER, find_recipe
from service.errors import Misconfigured
from service.models.loading import LoadedModel, load_model, with_bos
from service.settings import Settings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_served_model(settings: Settings) -> LoadedModel:
    """Load it, on its device and in its precision; it reads every text after its start token where its recipe says so."""
    model = load_without_bos(settings)
    recipe = find_recipe(model, settings.data_dir / RECIPES_FOLDER)
    return with_bos(model) if recipe is not None and recipe.prepend_bos else model


def load_without_bos(settings: Settings) -> LoadedModel:
    """As it is before its recipe is read."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.dtype not in DTYPES:
        raise Misconfigured(f"dtype {settings.dtype!r} is not known: use {', '.join(DTYPES)}.")
    return load_model(settings.model, settings.device, DTYPES[settings.dtype])
