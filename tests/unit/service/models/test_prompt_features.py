"""Features of texts: service.models.prompt_features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.prompt_features import FeatureReader, reader_of
from tests.support.tiny_models import ALL_MODELS, tiny

TEXT = "The Eiffel Tower is located in the city of"
OTHER_TEXTS = ("Big Ben can be found in London.", "In which country is Mount Fuji?")


def feature_by_definition(model: LoadedModel, layer: int, ids: list[int]) -> Tensor:
    """The mean of the block's outputs, each divided by its root mean square, from a pass of the whole model."""
    with torch.no_grad(), capture({0: model.block(layer)}) as states:
        model.model(input_ids=torch.tensor([ids]), use_cache=False)
    rows = [h / (sum(float(x) ** 2 for x in h) / len(h)) ** 0.5 for h in states[0][0]]
    mean: Tensor = sum(rows, torch.zeros_like(rows[0])) / len(rows)
    return mean


@pytest.mark.parametrize("name", ALL_MODELS)
def test_feature_is_the_mean_of_scaled_hidden_states(name: str) -> None:
    """The feature is that of the definition, on every architecture."""
    model = tiny(name)
    ids = model.encode(TEXT)[0]
    torch.testing.assert_close(
        FeatureReader(model, 1).read(ids), feature_by_definition(model, 1, ids), rtol=1e-4, atol=1e-5
    )


def test_feature_is_that_of_the_base_model_while_patches_are_in_place() -> None:
    """Weights that are exchanged and hooks that are installed do not change a feature, to the bit."""
    model = replace(tiny("gpt2", seed=3), name="patched")
    ids = model.encode(TEXT)[0]
    before = FeatureReader(model, 1).read(ids)
    reader, weight = FeatureReader(model, 1), model.weight(0)
    original = weight.data
    weight.data = original + 1
    try:
        with replace_output(model.down_proj(1), lambda output: output + 5):
            changed = reader.read(ids)
    finally:
        weight.data = original
    assert torch.equal(changed, before)


def test_readers_share_the_storage_of_the_weights() -> None:
    """A reader needs no memory for weights, and writing into a parameter through it would write into the model."""
    model = tiny("llama", seed=4)
    reader = FeatureReader(model, 0)
    mine = {p.data_ptr() for p in model.model.parameters()}
    assert {p.data_ptr() for p in reader._base.model.parameters()} == mine


def test_training_features_are_nearly_those_of_decisions() -> None:
    """A feature from a padded batch differs from that of the text alone by rounding at most."""
    model = tiny("gpt_neox", seed=5)
    texts = [model.encode(t)[0] for t in (TEXT, *OTHER_TEXTS)]
    reader = FeatureReader(model, 1)
    alone = torch.stack([reader.read(ids) for ids in texts])
    torch.testing.assert_close(reader.read_batch(texts), alone, rtol=1e-4, atol=1e-5)


def test_long_text_is_read_as_far_as_the_model_reads() -> None:
    """A text beyond the positions has the feature of its beginning."""
    model = tiny("gpt2", seed=6, positions=16)
    ids = [i % 300 + 1 for i in range(40)]
    reader = FeatureReader(model, 0)
    assert torch.equal(reader.read(ids), reader.read(ids[:16]))


def test_a_model_has_one_reader_of_a_layer() -> None:
    """All routers of a model share its readers, and so the features that were read."""
    model = tiny("gpt2", seed=7)
    assert reader_of(model, 1) is reader_of(model, 1)
    assert reader_of(model, 1) is not reader_of(model, 0)
