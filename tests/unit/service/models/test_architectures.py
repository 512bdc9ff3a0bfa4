"""Tests of service.models.architectures against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.pytorch_utils import Conv1D

from service.errors import Misconfigured
from service.models.architectures import ARCHITECTURES, architecture_of
from service.models.hooks import capture
from service.models.loading import LoadedModel, WeightRef
from service.models.token_batch import forward, pad
from tests.support.tiny_models import MODEL_TYPES, tiny

TEXT = "The Eiffel Tower is located in the city of"


def layer_activations(model: LoadedModel, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input and output of a layer's down-projection, and the block's output."""
    ids = model.encode(TEXT)[0]
    named = {"down": model.down_proj(layer), "block": model.block(layer)}
    with capture(named, "input") as given, capture(named) as got, torch.no_grad():
        forward(model, pad([ids], model))
    flat = (given["down"], got["down"], got["block"])
    return tuple(t.reshape(len(ids), -1) for t in flat)  # type: ignore[return-value]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_path_of_a_row_exists(model_type: str) -> None:
    """Each row names existing modules, and the counts and widths agree with the configuration."""
    model = tiny(model_type, layers=2)
    assert (model.num_layers, model.hidden_size, model.intermediate_size, model.max_positions) == (
        2,
        16,
        40,
        64,
    )
    norm = model.model.get_submodule(model.architecture.final_norm)
    assert norm.weight.shape == (16,)
    assert model.lm_head is model.model.get_output_embeddings()
    assert model.embedding is model.model.get_input_embeddings()
    named = dict(model.model.named_parameters())
    assert len(model.editable_weights) == 2 * (1 + len(model.architecture.attention_projections))
    for site in model.editable_weights:
        assert named[model.parameter_name(site)] is model.parameter(site)
    for layer in range(2):
        assert model.parameter(WeightRef(layer)) is model.weight(layer)
        assert isinstance(model.attention(layer), nn.Module)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_orientation_is_that_of_the_module(model_type: str) -> None:
    """`conv1d` is set exactly where the module is a Conv1D; orientation is never inferred from shapes."""
    model = tiny(model_type)
    module = model.down_proj(0)
    assert isinstance(module, Conv1D if model.architecture.conv1d else nn.Linear)
    wide = (40, 16) if model.architecture.conv1d else (16, 40)
    assert tuple(model.weight(0).shape) == wide


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_edited_weight_is_the_down_projection(model_type: str) -> None:
    """The key times the weight, in the row's orientation, is the MLP's output up to the bias."""
    model = tiny(model_type)
    key, value, _ = layer_activations(model, 1)
    weight = model.weight(1).data
    bias = getattr(model.down_proj(1), "bias", None)
    product = key @ (weight if model.architecture.conv1d else weight.T)
    torch.testing.assert_close(product if bias is None else product + bias, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_changing_the_weight_changes_the_layer_and_nothing_before(model_type: str) -> None:
    """Changing the weight of one layer leaves its key unchanged and moves the residual by exactly the change of
    value."""
    model = tiny(model_type)
    key, value, block = layer_activations(model, 1)
    first = layer_activations(model, 0)
    model.weight(1).data = model.weight(1).data * 1.5
    key_after, value_after, block_after = layer_activations(model, 1)
    assert torch.equal(key, key_after)
    assert not torch.allclose(value, value_after)
    torch.testing.assert_close(block_after - block, value_after - value, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(first, layer_activations(model, 0), strict=True))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parallel_flag_matches_the_block(model_type: str) -> None:
    """The MLP of a parallel block does not read its attention's output; that of a serial block does."""
    model = tiny(model_type)
    key, _, _ = layer_activations(model, 1)
    for parameter in model.attention(1).parameters():
        parameter.data = parameter.data * 1.5
    assert torch.equal(layer_activations(model, 1)[0], key) == model.architecture.parallel


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_attention_module_gives_what_it_adds_to_the_residual(model_type: str) -> None:
    """Block input, attention output and MLP output, both after their projections, sum to the block's output."""
    model = tiny(model_type)
    ids = model.encode(TEXT)[0]
    modules = {
        "attention": model.attention(1),
        "mlp": model.down_proj(1),
        "before": model.block(0),
        "after": model.block(1),
    }
    with capture(modules) as seen, torch.no_grad():
        forward(model, pad([ids], model))
    parts = {name: t.reshape(len(ids), -1) for name, t in seen.items()}
    total = parts["before"] + parts["attention"] + parts["mlp"]
    torch.testing.assert_close(total, parts["after"], rtol=1e-4, atol=1e-4)


def test_rows_are_chosen_by_model_type() -> None:
    """`architecture_of` looks up `model_type`; the error for an unknown type lists the supported types."""
    assert all(architecture_of(CONFIG_MAPPING[name]()).model_type == name for name in ARCHITECTURES)
    with pytest.raises(Misconfigured, match=r"'bert'.*gpt2, gpt_bigcode"):
        architecture_of(CONFIG_MAPPING["bert"]())


@pytest.mark.parametrize(
    ("model_type", "values", "expected"),
    [
        ("gpt_neox", {"use_parallel_residual": False}, {"parallel": False}),
        ("stablelm", {"use_parallel_residual": True}, {"parallel": True}),
        ("falcon", {}, {"parallel": True, "positions_from_mask": False}),
        ("falcon", {"alibi": True, "parallel_attn": False}, {"parallel": False, "positions_from_mask": True}),
        ("opt", {}, {"final_norm": "model.decoder.final_layer_norm", "block_norm": ""}),
        ("opt", {"do_layer_norm_before": False}, {"final_norm": "", "block_norm": "final_layer_norm"}),
    ],
)
def test_a_row_follows_the_configuration(
    model_type: str, values: dict[str, Any], expected: dict[str, Any]
) -> None:
    """What a configuration can change about the blocks of a type is in the row that it gets."""
    row = architecture_of(AutoConfig.for_model(model_type, **values))
    assert {name: getattr(row, name) for name in expected} == expected


def test_capped_attention_scores_are_computed() -> None:
    """The cap of Gemma 2's attention scores, which fused attention does not have, changes the logits."""
    model = tiny("gemma2")
    ids = torch.tensor([model.encode(TEXT)[0]])
    capped = model.model(ids).logits
    for module in model.model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    assert not torch.allclose(capped, model.model(ids).logits, rtol=1e-3)
