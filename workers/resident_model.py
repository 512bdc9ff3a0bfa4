"""Loads the model that a process serves."""

from __future__ import annotations

import torch

from service.covariance.corpus import fact_sentences
from service.editing.context import RECIPES_FOLDER, find_recipe
from service.errors import Misconfigured
from service.fetching.models_folder import resolve_model
from service.models.loading import LoadedModel, load_model, with_bos
from service.models.predictions import check_predictions
from service.settings import Settings

CHECKED_FACTS = 8  # facts of the model's table on which its predictions are checked
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_served_model(settings: Settings) -> LoadedModel:
    """Return the model of the settings. It prepends the BOS token to every text when its recipe says so."""
    model = load_without_bos(settings)
    recipe = find_recipe(model, settings.data_dir / RECIPES_FOLDER)
    return with_bos(model) if recipe is not None and recipe.prepend_bos else model


def load_without_bos(settings: Settings) -> LoadedModel:
    """Return the model of the settings without regard to its recipe. Raise Misconfigured if it predicts noise."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.dtype not in DTYPES:
        raise Misconfigured(f"unknown dtype {settings.dtype!r}: use {', '.join(DTYPES)}.")
    source = resolve_model(settings.model, settings.models_dir)
    if settings.device_map is not None and "device" in settings.model_fields_set:
        raise Misconfigured("--device and --device-map exclude each other: leave out one of both.")
    model = load_model(
        source, settings.device, DTYPES[settings.dtype], settings.adapter, settings.device_map == "auto"
    )
    sentences = fact_sentences(model)
    check_predictions(model, sentences[:: -(-len(sentences) // CHECKED_FACTS) or 1])
    return model
