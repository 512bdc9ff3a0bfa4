"""The search for the entry of a codebook: service.editing.codebook_entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from service.editing.edit_spec import CodebookSpec, EditFactors, batch_edit_specs, build_edit_spec
from service.editing.find_factors import find_factors
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.errors import InvalidInput
from service.kit.steps import run_to_completion
from service.kit.text import Statement, fill_prompt
from service.methods.parameters import GraceParameters
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.scoring import log_probs_blocking
from service.recipes.recipe import resolve_hparams
from service.schemas import Objective
from service.weights.factors import CodebookEntry
from tests.support.tiny_models import MODEL_TYPES, tiny

STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")


def find(
    model: LoadedModel,
    target: str = "Rome",
    statement: Statement = STATEMENT,
    objective: Objective = "write",
    **asked: Any,
) -> EditFactors:
    hparams = {"layers": [1], "steps": 6, "stop_loss": 0.0} | asked
    parameters = resolve_hparams(None, hparams, model.num_layers, "grace")
    steps = find_factors(model, {}, [], statement, target, parameters, "edit_1", "grace", objective)
    return run_to_completion(steps)


def entry_of(factors: EditFactors) -> CodebookEntry:
    (entry,) = factors.updates
    assert isinstance(entry, CodebookEntry)
    return entry


def split_statement(model: LoadedModel, target: str) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and those of the object."""
    ids, offsets = model.encode(f"{STATEMENT.text} {target}")
    start = next(i for i, (_, end) in enumerate(offsets) if end > len(STATEMENT.text))
    return ids[:start], ids[start:]


def loss_with_value(model: LoadedModel, target: str, value: Tensor) -> Tensor:
    """-mean log p of the object, from one pass of the whole model in which the value replaces the output of layer 1 at
    the last token of the prompt."""
    prompt, object_ = split_statement(model, target)

    def put(output: Tensor) -> Tensor:
        rows = output.view(-1, output.shape[-1])
        rows[len(prompt) - 1] = value
        return output

    with replace_output(model.down_proj(1), put):
        logits = model.model(input_ids=torch.tensor([prompt + object_])).logits[0]
    log_p = logits[len(prompt) - 1 : -1].log_softmax(-1)
    loss: Tensor = -log_p[range(len(object_)), object_].mean()
    return loss


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_key_and_output_are_those_of_the_prompts_last_token(model_type: str) -> None:
    """The key is the down-projection's input after the prompt alone, and the output what it puts out there."""
    model = tiny(model_type)
    entry = entry_of(find(model, steps=1))
    prompt, _ = split_statement(model, "Rome")
    modules = {0: model.down_proj(1)}
    with torch.no_grad(), capture(modules, "input") as keys, capture(modules) as values:
        model.model(input_ids=torch.tensor([prompt]))
    width = model.intermediate_size
    torch.testing.assert_close(entry.key, keys[0].view(-1, width)[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entry.output, values[0].view(len(prompt), -1)[-1], rtol=1e-4, atol=1e-5)
    assert entry.radius == pytest.approx(0.1 * float(entry.key.norm()))


@pytest.mark.parametrize("start", ["warm", "cold"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_value_is_found_by_adam(model_type: str, start: str) -> None:
    """The losses and the value are those of Adam through whole forward passes, from the start that was asked for."""
    model = tiny(model_type)
    factors = find(model, "Rome in", start=start, steps=4, learning_rate=0.05, seed=3)
    entry = entry_of(factors)
    first = entry.output.clone()
    if start == "cold":
        first = torch.rand(len(first), generator=torch.Generator().manual_seed(3))
    value = first.requires_grad_()
    adam = torch.optim.Adam([value], lr=0.05)
    losses = []
    for _ in range(4):
        adam.zero_grad()
        loss = loss_with_value(model, "Rome in", value)
        losses.append(float(loss.detach()))
        loss.backward()
        adam.step()
    assert factors.losses == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(entry.value, value.detach(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_patch_says_the_object(model_type: str) -> None:
    """With the codebook in place the object's score is that of the search, and no weight changes."""
    model = tiny(model_type)
    replica = VersionedModel(model, EmptyLedger())
    entry = entry_of(find(model, steps=12, learning_rate=0.3))
    patch = replica.compose_patch([entry])
    assert patch.weights == {} and patch.nbytes > 0
    expected = -float(loss_with_value(model, "Rome", entry.value).detach())
    with replica.use_patch(patch):
        ((log_p, _),) = log_probs_blocking(model, [(STATEMENT.text, "Rome")])
    assert log_p == pytest.approx(expected, abs=1e-3)
    assert log_p > log_probs_blocking(model, [(STATEMENT.text, "Rome")])[0][0]


def test_a_radius_may_be_a_number() -> None:
    """`radius_unit` absolute is the published form: the radius does not depend on the key."""
    published: dict[str, Any] = {"radius": 1.0, "radius_unit": "absolute", "compat": "hartvigsen2023"}
    entry = entry_of(find(tiny(), steps=1, **published))
    assert (entry.radius, entry.replayed) == (1.0, True)


def test_the_search_stops_at_the_loss_that_is_asked_for() -> None:
    """A loss below `stop_loss` ends the search before the last step; 0 never does."""
    assert len(find(tiny(), steps=5, stop_loss=1e3).losses) == 1
    assert len(find(tiny(), steps=5, stop_loss=0.0).losses) == 5


def test_to_erase_the_loss_is_the_joint_probability() -> None:
    """The first loss of an erasure is the object's probability; its label is not that of an edit that writes it."""
    model = tiny()
    factors = find(model, "in", objective="erase", steps=3)
    ((log_p, _),) = log_probs_blocking(model, [(STATEMENT.text, "in")])
    assert factors.losses[0] == pytest.approx(torch.tensor(log_p).exp().item(), rel=1e-3)
    assert factors.losses[-1] < factors.losses[0]
    written = entry_of(find(model, "in", steps=1)).label
    assert entry_of(factors).label == (-1, *written)


def test_a_prompt_of_one_token_has_an_entry() -> None:
    """The subject may be the whole prompt."""
    factors = find(tiny(), statement=Statement("Rome", (0, 4)), target="in", steps=8, learning_rate=0.3)
    assert factors.losses[-1] < factors.losses[0]


def test_an_edit_is_found_again_bit_for_bit() -> None:
    """The same edit of the same base has the same entry, whatever was found between."""
    first = entry_of(find(tiny()))
    find(tiny(), "in")
    again = entry_of(find(tiny()))
    assert torch.equal(first.key, again.key) and torch.equal(first.value, again.value)


def test_two_layers_are_refused() -> None:
    """A codebook is one layer's."""
    with pytest.raises(InvalidInput, match="one layer"):
        find(tiny(), layers=[0, 1])


def test_fact_forcing_is_refused() -> None:
    """The search has no noise on the subject."""
    model, parameters = tiny(), GraceParameters(layers=(1,))
    noise = torch.zeros(2, model.hidden_size)
    steps = find_factors(model, {}, [], STATEMENT, "in", parameters, "edit", "grace", noise=noise)
    with pytest.raises(InvalidInput, match="fact forcing"):
        run_to_completion(steps)


def test_entries_are_found_one_at_a_time() -> None:
    """Edits of codebooks are batches of one, beside edits of other methods."""
    model = tiny()
    spec = build_edit_spec(model, (), STATEMENT, "in", GraceParameters(layers=(1,)), "edit", "grace")
    assert isinstance(spec, CodebookSpec)
    assert [len(batch) for batch in batch_edit_specs(model, [spec, spec])] == [1, 1]
    assert spec.peak_bytes(model) > 0
