"""Published hyperparameters and what a user changes in them: service.recipes.recipe."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import InvalidInput, Misconfigured
from service.methods.parameters import RomeParameters
from service.models.architectures import ARCHITECTURES
from service.recipes.published import PUBLISHED, published_recipe
from service.recipes.recipe import Recipe, parse_recipe, resolve_hparams
from service.recipes.strength_schedule import strength_schedule

# The published table: model, shape, layer, steps, rate, weight decay, clamp, KL factor.
PUBLISHED_TABLE = [
    ("gpt2-medium", ("gpt2", 24, 1024), 8, 20, 0.5, 0.5, 3, 0.0625),
    ("gpt2-large", ("gpt2", 36, 1280), 12, 20, 0.5, 0.5, 4, 0.0625),
    ("gpt2-xl", ("gpt2", 48, 1600), 17, 20, 0.5, 0.5, 4, 0.0625),
    ("gpt-j-6B", ("gptj", 28, 4096), 5, 20, 0.5, 0.5, 4, 0.0625),
    ("gpt-neox-20b", ("gpt_neox", 44, 6144), 15, 20, 0.5, 0.5, 4, 0.0625),
    ("Llama-2-7b and Llama-3-8b", ("llama", 32, 4096), 5, 25, 0.5, 1e-3, 4, 0.0625),
    ("Llama-3.2-3b", ("llama", 28, 3072), 5, 25, 0.5, 1e-3, 4, 0.0625),
    ("Mistral-7b", ("mistral", 32, 4096), 5, 25, 0.5, 1e-3, 4, 0.0625),
    ("Qwen2-7b and Qwen2.5-7b", ("qwen2", 28, 3584), 5, 25, 0.5, 1e-3, 4, 0.0625),
]
RECIPE = Recipe(source="test", rome=RomeParameters(layers=(2,), clamp=3.0))


@pytest.mark.parametrize(("name", "shape", "layer", "steps", "rate", "decay", "clamp", "kl"), PUBLISHED_TABLE)
def test_the_table_is_the_published_one(
    name: str,
    shape: tuple[str, int, int],
    layer: int,
    steps: int,
    rate: float,
    decay: float,
    clamp: float,
    kl: float,
) -> None:
    """Value by value, each model has the hyperparameters that its authors published."""
    recipe = published_recipe(*shape)
    assert recipe is not None, name
    p = recipe.rome
    assert p.layers == (layer,)
    assert (p.steps, p.learning_rate, p.weight_decay, p.clamp, p.kl_factor) == (steps, rate, decay, clamp, kl)
    assert (p.stop_loss, p.contexts) == (0.05, 20)
    assert p.compat is None


def test_the_table_holds_nothing_else() -> None:
    """Every recipe is in the published table, for an architecture that we know and a layer that exists."""
    assert set(PUBLISHED) == {shape for _, shape, *_ in PUBLISHED_TABLE}
    for (model_type, layers, _), recipe in PUBLISHED.items():
        assert model_type in ARCHITECTURES
        assert all(0 <= x < layers for x in recipe.rome.layers)


def test_an_unknown_shape_has_no_recipe() -> None:
    """Nothing is guessed for a model that nobody published."""
    assert published_recipe("gpt2", 12, 768) is None


def test_user_hparams_override_the_recipe() -> None:
    """The user's values replace the recipe's, one by one; the rest stays as it was."""
    chosen = resolve_hparams(RECIPE, {"steps": 7, "layers": [0, 1]}, 3)
    assert chosen == RomeParameters(layers=(0, 1), steps=7, clamp=3.0)
    assert resolve_hparams(RECIPE, None, 3) == RECIPE.rome
    assert resolve_hparams(None, {"layers": [1]}, 3) == RomeParameters(layers=(1,))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"layer": 3}, r"hparams\.layer: .*Known: layers, steps, learning_rate"),
        ({"steps": 0}, r"hparams\.steps: .*greater than or equal to 1"),
        ({"steps": "many"}, r"hparams\.steps"),
        ({"learning_rate": -1}, r"hparams\.learning_rate"),
        ({"learning_rate": float("nan")}, r"hparams\.learning_rate"),
        ({"weight_decay": float("inf")}, r"hparams\.weight_decay"),
        ({"clamp": 0}, r"hparams\.clamp"),
        ({"compat": "rome"}, r"hparams\.compat: .*meng2022"),
        ({"layers": []}, r"hparams\.layers"),
        ({"layers": [3]}, "different layers from 0 to 2"),
        ({"layers": [-1]}, "different layers from 0 to 2"),
        ({"layers": [1, 1]}, "different layers from 0 to 2"),
    ],
)
def test_an_error_names_what_to_change(asked: dict[str, Any], said: str) -> None:
    """Each value that cannot be is refused by its name, with what is known or allowed."""
    with pytest.raises(InvalidInput, match=said) as error:
        resolve_hparams(RECIPE, asked, 3)
    assert error.value.field == "hparams"


@pytest.mark.parametrize("asked", [None, {}, {"steps": 3}])
def test_without_a_recipe_the_layers_must_be_named(asked: dict[str, Any] | None) -> None:
    """A model that nobody tuned has no layer of its own: the answer says how to name one."""
    with pytest.raises(InvalidInput, match=r'"layers": \[5\].*recipe\.json'):
        resolve_hparams(None, asked, 3)


def test_closed_form_methods_share_the_strength_schedule() -> None:
    """Strengths, margin and the leads at which edits are strong enough come from the recipe together."""
    schedule_hparams = {"strengths": (0.5, 1.0), "margin": 0.5, "required_margins": ((0.1, 2.0), (0.2, 0.5))}
    recipe = Recipe(source="test", rome=RomeParameters(layers=(1,), **schedule_hparams))  # type: ignore[arg-type]
    for method in ("rome", "r-rome", "memit", "emmet", "alphaedit"):
        chosen = resolve_hparams(recipe, None, 3, method).model_dump()
        assert {name: chosen[name] for name in schedule_hparams} == schedule_hparams


@pytest.mark.parametrize(
    ("active", "strengths", "lead"),
    [
        (9, (1.0, 2.0), 0.5),  # below the first pair: full strength, and from there on the margin is enough
        (10, (0.5, 1.0, 2.0), 2.0),
        (15, (0.5, 1.0, 2.0), 1.25),  # halfway between two pairs
        (20, (0.5, 1.0, 2.0), 0.5),
        (90, (0.5, 1.0), 0.5),  # past the last: the lead of the last, and no more than full strength
    ],
)
def test_required_margin_falls_as_a_layer_fills(
    active: int, strengths: tuple[float, ...], lead: float
) -> None:
    """An edit climbs from the weakest strength once there are many, to a lead on the line through the recipe's pairs."""
    parameters = RomeParameters(layers=(0,), margin=0.5, required_margins=((0.1, 2.0), (0.2, 0.5)))
    schedule = strength_schedule(parameters, (0.5, 1.0, 2.0), active, 100)
    assert (schedule.strengths, schedule.partial_strength_margin) == (strengths, pytest.approx(lead))
    assert (
        schedule.required_margin(0.5) == pytest.approx(lead)
        and schedule.required_margin(1.0) == schedule.required_margin(2.0) == 0.5
    )


def test_single_pair_does_not_cap_strength() -> None:
    """Past the only pair of a recipe edits are raised as at it; strengths that all lie beyond full strength are tried all the same."""
    parameters = RomeParameters(layers=(0,), required_margins=((0.1, 2.0),))
    assert strength_schedule(parameters, (0.5, 1.0, 2.0), 90, 100).strengths == (0.5, 1.0, 2.0)
    short = parameters.model_copy(update={"required_margins": ((0.1, 2.0), (0.2, 0.5))})
    assert strength_schedule(short, (1.5, 2.0), 90, 100).strengths == (1.5, 2.0)


def test_without_required_margins_the_margin_applies() -> None:
    """A recipe that says nothing of many edits tries its strengths in turn, whatever is active; a lead below the margin is none."""
    plain = RomeParameters(layers=(0,), margin=0.25)
    assert strength_schedule(plain, (0.5, 1.0), 10**6, 100).required_margin(0.5) == 0.25
    assert (
        strength_schedule(
            plain.model_copy(update={"required_margins": ((0.0, 0.1),)}), (0.5, 1.0), 5, 100
        ).required_margin(0.5)
        == 0.25
    )


@pytest.mark.parametrize(
    "required_margins", [((0.2, 1.0), (0.1, 2.0)), ((0.1, 1.0), (0.1, 2.0)), ((-0.1, 1.0),)]
)
def test_required_margins_must_increase(required_margins: tuple[tuple[float, float], ...]) -> None:
    """Pairs of fullness and lead rise in fullness, which is no less than nothing."""
    with pytest.raises(ValidationError):
        RomeParameters(layers=(0,), required_margins=required_margins)


def test_a_recipe_file_is_read_strictly() -> None:
    """A recipe.json comes back as it was written; a slip in it is named and nothing is ignored."""
    assert parse_recipe(RECIPE.model_dump_json()) == RECIPE
    with pytest.raises(Misconfigured, match=r"recipe\.json.*[\s\S]*colour"):
        parse_recipe('{"source": "x", "rome": {"layers": [1], "colour": 1}}')
    with pytest.raises(Misconfigured, match=r"recipe\.json"):
        parse_recipe("no json")
