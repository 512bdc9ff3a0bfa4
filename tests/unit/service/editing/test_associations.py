"""The closed-form methods: service.editing.associations."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.covariance.second_moment import KeyStatistics
from service.editing.context_templates import sample_contexts
from service.editing.edit_spec import EditFactors, ValueEditSpec, batch_edit_specs, build_edit_spec
from service.editing.find_factors import find_factors
from service.editing.suffix_batch import DeltaSite
from service.editing.tokenized_contexts import tokenize_contexts
from service.editing.value_optimizer import ValueSearchSpec, optimize_values
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad, tokenize_statement
from service.weights.composition import apply_delta, compose_layer
from service.weights.factors import Association
from tests.support.associations import associations_of
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny

STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")
CONTEXTS = ("In Japan", "The city of Rome is", "Big Ben")


@lru_cache
def statistics(model_type: str) -> dict[int, KeyStatistics]:
    return run_to_completion(
        collect_statistics(tiny(model_type), [0, 1, 2], Corpus("test", tuple(TEXTS)), damping=0.1)
    )


def find_rome_factors(
    model: LoadedModel, contexts: tuple[str, ...] = CONTEXTS, **changes: object
) -> EditFactors:
    parameters = RomeParameters.model_validate({"layers": [1], "steps": 5, "learning_rate": 0.1, **changes})
    kind = model.architecture.model_type
    return run_to_completion(
        find_factors(model, statistics(kind), contexts, STATEMENT, "Rome", parameters, "edit_1")
    )


def find_association(
    model: LoadedModel, contexts: tuple[str, ...] = CONTEXTS, **changes: object
) -> Association:
    """Return the association of an edit at one layer."""
    (association,) = associations_of(find_rome_factors(model, contexts, **changes).updates)
    return association


def key_and_value(model: LoadedModel, layer: int, context: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Return key and value of the subject's last token after a context."""
    prompt = tokenize_statement(model, STATEMENT.with_context(context))
    with (
        capture({0: model.down_proj(layer)}, "input") as k,
        capture({0: model.down_proj(layer)}) as v,
        torch.no_grad(),
    ):
        forward(model, pad([prompt.ids], model))
    at = prompt.last_subject_index
    return k[0].reshape(len(prompt.ids), -1)[at], v[0].reshape(len(prompt.ids), -1)[at]


def apply_factors(model: LoadedModel, factors: EditFactors) -> None:
    """Write the edit into a throw-away model."""
    for a in associations_of(factors.updates):
        weight = model.weight(a.layer)
        weight.data = apply_delta(weight.data, compose_layer([a]), model.architecture.conv1d)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_averaged_key_gives_the_value(model_type: str) -> None:
    """After an r-ROME edit the layer maps the averaged key exactly to v + delta, on every architecture."""
    model = tiny(model_type)
    factors = find_rome_factors(model)
    parameters = RomeParameters(layers=(1,), steps=5, learning_rate=0.1)
    spec = ValueSearchSpec(tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS), parameters)
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1), [spec]))
    keys_and_values = [key_and_value(model, 1, c) for c in ("", *(c + ". " for c in CONTEXTS))]
    key = torch.stack([k for k, _ in keys_and_values]).mean(0)
    (association,) = associations_of(factors.updates)
    torch.testing.assert_close(association.key, key, rtol=1e-4, atol=1e-5)
    bias = keys_and_values[0][1] - _linear(model, keys_and_values[0][0])
    apply_factors(model, factors)
    torch.testing.assert_close(_linear(model, key) + bias, value.initial + value.delta, rtol=1e-3, atol=1e-4)


def _linear(model: LoadedModel, key: torch.Tensor) -> torch.Tensor:
    weight = model.weight(1).data
    return key @ weight if model.architecture.conv1d else weight @ key


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_published_form_is_exact_at_the_bare_prompt(model_type: str) -> None:
    """With compat="meng2022" the edited MLP maps the bare prompt's key to v + delta, as the authors' code does."""
    model = tiny(model_type)
    factors = find_rome_factors(model, compat="meng2022")
    _, before = key_and_value(model, 1)
    delta_norm = factors.delta_norm
    apply_factors(model, factors)
    _, after = key_and_value(model, 1)
    assert float((after - before).norm()) == pytest.approx(delta_norm, rel=1e-3)


def test_the_two_forms_differ() -> None:
    """The symmetric and the published key give different updates for one optimized value."""
    model = tiny()
    ours, theirs = find_rome_factors(model), find_rome_factors(model, compat="meng2022")
    assert ours.losses == theirs.losses
    (our_association,), (their_association,) = associations_of(ours.updates), associations_of(theirs.updates)
    assert not torch.allclose(our_association.value, their_association.value, rtol=1e-3)
    torch.testing.assert_close(our_association.direction, their_association.direction)


@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_edit_makes_the_object_more_probable(model_type: str, layers: list[int]) -> None:
    """With one layer or several, the edited model gives the new object a higher probability than the base model."""
    from service.models.scoring import log_probs_blocking

    model = tiny(model_type)
    prompt_and_target = [(STATEMENT.text, "Rome")]
    before = log_probs_blocking(model, prompt_and_target)[0][0]
    factors = find_rome_factors(
        model, (), layers=layers, steps=25, clamp=100.0, weight_decay=0, kl_factor=0, learning_rate=0.1
    )
    assert [a.layer for a in factors.updates] == layers
    apply_factors(model, factors)
    assert (
        log_probs_blocking(model, prompt_and_target)[0][0] > before + 0.005
    )  # in a random model the subject has little effect


def test_finding_changes_nothing() -> None:
    """Computing the factors of an edit changes no weight."""
    model = tiny()
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    find_rome_factors(model, layers=[0, 1, 2])
    assert all(torch.equal(t, before[n]) for n, t in model.model.state_dict().items())
    assert not any(m._forward_hooks for m in model.model.modules())


def test_finding_is_reproducible() -> None:
    """The same request on the same base model gives the same factors, bit for bit."""
    one, two = find_association(tiny()), find_association(tiny())
    assert torch.equal(one.value, two.value)
    assert torch.equal(one.direction, two.direction)


def test_conv1d_and_linear_twins_agree() -> None:
    """The same matrix stored as Conv1D and as Linear gets the same change."""
    a = find_association(tiny())
    base = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    change = compose_layer([a])
    assert torch.equal(
        apply_delta(base, change, conv1d=True), apply_delta(base.T.contiguous(), change, conv1d=False).T
    )


def test_contexts_are_seeded_and_belong_to_the_model() -> None:
    """The same seed gives the same contexts; another seed or another model gives others."""
    one = run_to_completion(sample_contexts(tiny(), 8, 0))
    assert one == run_to_completion(sample_contexts(tiny(), 8, 0))
    assert one != run_to_completion(sample_contexts(tiny(), 8, 1))
    assert one != run_to_completion(sample_contexts(tiny(seed=5), 8, 0))
    assert len(one) == 8
    assert not any(c.endswith((".", " ")) for c in one)


def test_braces_in_contexts_subject_and_object_are_only_characters() -> None:
    """Braces in prompts, objects and contexts are not interpreted as format fields."""
    model = tiny()
    statement = fill_prompt("The {} of {0.__class__} is".replace("{0", "{ 0"), "Tower {x} %s")
    parameters = RomeParameters(layers=(1,), steps=2)
    contexts = ["{.__class__}", "{} {}"]
    factors = run_to_completion(
        find_factors(model, statistics("gpt2"), contexts, statement, "R{o}me", parameters)
    )
    (association,) = associations_of(factors.updates)
    assert association.value.isfinite().all()


def test_direction_is_scale_free() -> None:
    """The update does not depend on the scale or the sign of the direction."""
    from dataclasses import replace

    a = find_association(tiny())
    for scale in (-1.0, 7.0):
        other = replace(a, direction=a.direction * scale)
        torch.testing.assert_close(other.rank_one().dense(), a.rank_one().dense(), rtol=1e-6, atol=1e-8)


def test_the_direction_is_adjusted_by_the_second_moment() -> None:
    """The direction is C^-1 k*, not k*."""
    a = find_association(tiny())
    expected = statistics("gpt2")[1].solve(a.key).float()
    torch.testing.assert_close(a.direction, expected)
    assert torch.nn.functional.cosine_similarity(a.direction, a.key, dim=0) < 0.999


def test_anchored_to_its_own_the_change_is_delta() -> None:
    """With anchor="own" the change of value is delta, multiplied by `strength`."""
    model = tiny()
    factors, twice = (
        find_rome_factors(model, anchor="own"),
        find_rome_factors(model, anchor="own", strength=2.0),
    )
    (once_found,), (twice_found,) = associations_of(factors.updates), associations_of(twice.updates)
    assert float(once_found.value.norm()) == pytest.approx(factors.delta_norm, rel=1e-5)
    torch.testing.assert_close(twice_found.value, 2 * once_found.value)
    assert torch.equal(twice_found.key, once_found.key)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "llama"])
def test_a_key_of_the_bare_prompt_and_the_bare_subject(model_type: str) -> None:
    """With bare_keys and bare_weight=1 the key is the mean of the subject's key in its prompt and alone."""
    model = tiny(model_type)
    in_prompt, _ = key_and_value(model, 1)
    ids, _ = model.encode("Eiffel Tower")
    with capture({0: model.down_proj(1)}, "input") as seen, torch.no_grad():
        forward(model, pad([ids], model))
    alone = seen[0].reshape(len(ids), -1)[-1]
    key = find_association(model, bare_keys=True, bare_weight=1.0).key
    torch.testing.assert_close(key, (in_prompt + alone) / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 1.0])
def test_the_weight_of_the_bare_prompt(weight: float | None) -> None:
    """The text without a context has weight `bare_weight` in the mean key, and an equal weight when it is left out."""
    model = tiny()
    keys = [key_and_value(model, 1, c)[0] for c in ("", *(c + ". " for c in CONTEXTS))]
    share = 1 / len(keys) if weight is None else weight
    expected = share * keys[0] + (1 - share) * torch.stack(keys[1:]).mean(0)
    torch.testing.assert_close(
        find_association(model, bare_weight=weight).key, expected, rtol=1e-4, atol=1e-5
    )


def test_edits_are_batched_by_layer_and_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits with one delta site share a batch up to the compute budget of a step, in their order."""
    model = tiny()

    def wanted(edit: str, *layers: int) -> ValueEditSpec:
        parameters = RomeParameters(layers=layers)
        spec = build_edit_spec(model, CONTEXTS, STATEMENT, "Rome", parameters, edit)
        assert isinstance(spec, ValueEditSpec)
        return spec

    edits = [
        wanted("a", 1),
        wanted("b", 1),
        wanted("c", 1),
        wanted("d", 0),
        wanted("e", 0, 1),
        wanted("f", 1),
    ]
    budget = 2 * edits[0].flops_per_step(model)

    def found() -> list[list[str]]:
        return [[e.edit for e in batch] for batch in batch_edit_specs(model, edits)]

    monkeypatch.setattr("service.editing.edit_spec.group_budget", lambda _model: budget)
    assert found() == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]
    monkeypatch.undo()
    assert found() == [[e.edit] for e in edits]


def test_flops_per_step_match_the_counter() -> None:
    """The estimated FLOPs of a step are within a third of those that torch counts."""
    model = tiny(width=64, inner=256, layers=8)
    spec = build_edit_spec(model, CONTEXTS, STATEMENT, "Rome", RomeParameters(layers=(1,)))
    assert isinstance(spec, ValueEditSpec)
    counts: list[int] = []
    for steps in (4, 8):
        parameters = RomeParameters(layers=(1,), steps=steps, stop_loss=0)
        with FlopCounterMode(display=False) as counter:
            run_to_completion(
                optimize_values(model, spec.delta_site, [ValueSearchSpec(spec.tokenized, parameters)])
            )
        counts.append(counter.get_total_flops())
    assert spec.flops_per_step(model) == pytest.approx((counts[1] - counts[0]) / 4, rel=0.34)


@pytest.mark.parametrize("layers", [(1,), (0, 1)])
def test_keys_are_those_of_the_noised_subject(layers: tuple[int, ...]) -> None:
    """With noise (fact forcing) the key of the lowest layer is that of the noised subject, also with bare keys."""
    model = tiny(dtype=torch.float64)
    bare = {"bare_keys": True} if len(layers) == 1 else {}
    parameters = RomeParameters.model_validate({"layers": layers, "steps": 2, "contexts": 0, **bare})
    prompt_tokens = tokenize_statement(model, STATEMENT)
    begin, end = prompt_tokens.subject
    noise = torch.randn(end - begin, model.hidden_size, generator=torch.Generator().manual_seed(0))
    steps = find_factors(model, statistics("gpt2"), [], STATEMENT, "Rome", parameters, noise=noise)
    first = associations_of(run_to_completion(steps).updates)[0]
    alone = tokenize_statement(model, fill_prompt("{}", "Eiffel Tower"))

    def disturb(embedded: torch.Tensor) -> torch.Tensor:
        embedded[0, embedded.shape[1] - (end - begin) :] += noise
        return embedded

    keys = []
    for text in (prompt_tokens, alone) if bare else (prompt_tokens,):
        with (
            capture({0: model.down_proj(layers[0])}, "input") as seen,
            replace_output(model.embedding, disturb),
        ):
            forward(model, pad([text.ids_through_subject], model))
        keys.append(seen[0].reshape(len(text.ids_through_subject), -1)[-1])
    torch.testing.assert_close(first.key.double(), torch.stack(keys).mean(0), rtol=1e-4, atol=1e-5)
