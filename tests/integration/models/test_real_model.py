"""A public model, SmolLM2-135M-Instruct, as `palimpsest fetch` gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.editing.context import find_recipe
from service.engine.decoding import DecodingBatch, new_sequence
from service.models.loading import load_model
from service.models.predictions import check_predictions
from service.schemas import Sampling

pytestmark = pytest.mark.real


def test_a_public_model_answers(smollm2: Path) -> None:
    """SmolLM2 is loaded from its GGUF file with its tokenizer, its chat template and a recipe, predicts text, and says
    that the capital of France is Paris."""
    model = load_model(smollm2)
    assert (model.name, model.num_layers, model.intermediate_size) == ("smollm2-135m", 30, 1536)
    check_predictions(model, [])
    question = new_sequence(model, "The capital of France is", Sampling(max_new_tokens=2, temperature=0.0))
    batch = DecodingBatch(model, [question])
    while len(batch):
        batch.step()
    assert model.decode(question.output_ids).startswith(" Paris")
    messages = [{"role": "user", "content": "Hi"}]
    assert "<|im_start|>user\nHi<|im_end|>" in model.tokenizer.apply_chat_template(messages, tokenize=False)
    recipe = find_recipe(model)
    assert recipe is not None and recipe.rome.layers
