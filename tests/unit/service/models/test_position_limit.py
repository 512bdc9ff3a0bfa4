"""Tests of service.models.position_limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from service.engine.decoding import new_sequence
from service.errors import InvalidInput
from service.models.loading import LoadedModel, wrap_model
from service.models.position_limit import DEFAULT_LENGTH, position_limit
from service.models.token_batch import forward, pad
from service.schemas import Sampling
from tests.support.tiny_models import tiny, tokenizer

LONG_FACTORS = {"long_factor": [4.0] * 8, "short_factor": [1.5] * 8, "original_max_position_embeddings": 8}
ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"rope_type": "longrope", "rope_theta": 10000.0} | LONG_FACTORS,
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
SHORT, LONG = [5, 99, 7, 150], [(i * 37) % 300 + 1 for i in range(24)]


@pytest.mark.parametrize(
    ("model_type", "values", "limit"),
    [
        ("gpt2", {"n_positions": 77}, 77),
        ("llama", {"max_position_embeddings": 77}, 77),
        ("mpt", {"max_seq_len": 77}, 77),
        ("bloom", {"seq_length": 77}, 77),
        ("bloom", {}, DEFAULT_LENGTH),
        ("llama", {"max_position_embeddings": 32, "rope_parameters": ROPES["longrope"]}, 8),
        ("llama", {"max_position_embeddings": 32, "rope_parameters": ROPES["dynamic"]}, 32),
        ("llama", {"rope_parameters": ROPES["longrope"] | {"rope_type": "linear", "factor": 2.0}}, 2048),
    ],
)
def test_the_limit_of_a_configuration(model_type: str, values: dict[str, Any], limit: int) -> None:
    """The limit has one name in each family, and is the original length where frequencies depend on the length."""
    assert position_limit(AutoConfig.for_model(model_type, **values)) == limit


def test_the_shortest_layer_decides() -> None:
    """Of parameters for each kind of layer, the shortest original length is the limit."""
    by_kind = {
        "full_attention": ROPES["longrope"],
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = tiny("olmo3").model.config
    config.rope_parameters = by_kind
    assert position_limit(config) == 8


def rotary_model(rope: str) -> LoadedModel:
    """Return a model with the original length 8 in "longrope", and 24 in "dynamic"."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        vocab_size=320,
        max_position_embeddings=32 if rope == "longrope" else 24,
        rope_parameters=dict(ROPES[rope]),
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3)
    return wrap_model(model, tokenizer())


def changed_by(model: LoadedModel, long: list[int]) -> bool:
    """Whether the logits of SHORT depend on another row of its batch."""
    with torch.no_grad():
        alone, beside = forward(model, pad([SHORT], model))[0], forward(model, pad([SHORT, long], model))[0]
    return not torch.allclose(alone, beside[: len(SHORT)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope", ROPES)
def test_up_to_the_limit_no_row_changes_another(rope: str) -> None:
    """A row of the longest allowed length leaves another row's logits as they are; a longer one, which is refused,
    would change them."""
    model = rotary_model(rope)
    limit = model.max_positions
    assert limit == (8 if rope == "longrope" else 24)
    assert not changed_by(model, LONG[:limit])
    assert changed_by(model, (LONG + LONG)[: limit + 1])
    assert not changed_by(model, LONG[:limit])
    with pytest.raises(InvalidInput, match=f"the model has {limit} positions"):
        new_sequence(model, (LONG + LONG)[:limit], Sampling(max_new_tokens=1))


@pytest.mark.parametrize("rope", ROPES)
def test_a_generation_ends_at_the_limit(rope: str) -> None:
    """A sequence never grows beyond the limit."""
    model = rotary_model(rope)
    assert new_sequence(model, SHORT, Sampling(max_new_tokens=100)).max_length == model.max_positions
