"""Tests of service.models.block_runner."""

from __future__ import annotations

import pytest
import torch

from service.models.block_runner import BlockRunner
from tests.support.tiny_models import MODEL_TYPES, tiny

IDS = torch.tensor([[5, 99, 7, 150, 3, 12]])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_running_block_by_block_gives_the_model_logits(model_type: str) -> None:
    """Running the blocks one by one and then the head gives the model's logits."""
    model = tiny(model_type)
    blocks = BlockRunner(model)
    inputs = blocks.capture_block_inputs(IDS, 0)
    hidden = inputs.hidden
    for layer in range(model.num_layers):
        hidden, past = blocks.run(inputs, layer, hidden, None)
        assert past[0].shape[-2] == past[1].shape[-2] == 6
    whole = model.model(IDS, use_cache=False).logits
    assert torch.allclose(blocks.logits(hidden[0]), whole[0], atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("start", [1, 3, 5])
def test_running_a_suffix_on_past_keys_and_values(model_type: str, start: int) -> None:
    """Block inputs of later positions continue from the keys and values of earlier positions, for any number of
    rows."""
    model = tiny(model_type)
    blocks = BlockRunner(model)
    whole, rest = blocks.capture_block_inputs(IDS, 0), blocks.capture_block_inputs(IDS[:, start:], start)
    hidden, late = whole.hidden, rest.hidden.expand(4, -1, -1)
    for layer in range(model.num_layers):
        hidden, (keys, values) = blocks.run(whole, layer, hidden, None)
        past = keys[:, :, :start].expand(4, -1, -1, -1), values[:, :, :start].expand(4, -1, -1, -1)
        late, _ = blocks.run(rest, layer, late, past)
    assert torch.allclose(late, hidden[:, start:].expand(4, -1, -1), atol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("start", [0, 2])
def test_kv_only_run_then_last_positions(model_type: str, start: int) -> None:
    """`run_kv_only` returns the keys and values of the whole block, and its last positions can be run with them."""
    model = tiny(model_type)
    blocks, layer = BlockRunner(model), 1
    whole, kv_only, end = (
        blocks.capture_block_inputs(IDS, 0),
        blocks.capture_block_inputs(IDS[:, start:4], start),
        blocks.capture_block_inputs(IDS[:, 4:], 4),
    )
    hidden = whole.hidden.expand(3, -1, -1)
    out, (keys, values) = blocks.run(whole, layer, hidden, None)
    past = keys[:, :, :start], values[:, :, :start]
    extended_past = blocks.run_kv_only(kv_only, layer, hidden[:, start:4], past)
    for mine, all_of_them in zip(extended_past, (keys, values), strict=True):
        assert torch.allclose(mine, all_of_them[:, :, :4], atol=1e-6)
    last, _ = blocks.run(end, layer, hidden[:, 4:], extended_past)
    assert torch.allclose(last, out[:, 4:], atol=1e-5)


def test_blocks_are_restored_between_calls() -> None:
    """After a call, also after an error, the model's own blocks are restored."""
    model = tiny()
    before = model.model(IDS).logits
    blocks = BlockRunner(model)
    blocks.capture_block_inputs(IDS, 0)
    with pytest.raises(IndexError):
        blocks.capture_block_inputs(IDS + 1000, 0)
    blocks.logits(torch.zeros(1, model.hidden_size))
    assert all("forward" not in block.__dict__ for block in model.blocks)
    assert torch.equal(model.model(IDS).logits, before)
