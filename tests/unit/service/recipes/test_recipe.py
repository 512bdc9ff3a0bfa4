"""Published hyperparameters and what a user changes in them: service.recipes.recipe."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import InvalidInput, Misconfigured
from service.methods.alphaedit import AlphaEditParameters
from service.methods.parameters import RomeParameters
from service.models.architectures import ARCHITECTURES
from service.recipes.published import PUBLISHED, published_recipe
from service.recipes.recipe import Recipe, parse_recipe, resolve_hparams
from service.recipes.strength_schedule import strength_schedule

# The published table: model, shape, layer, steps, rate, weight decay, clamp, KL factor.
PUBLISHED_TABLE = [
    ("gpt2-medium", ("gpt2", 24, 1024, 4096), 8, 20, 0.5, 0.5, 3, 0.0625),
    ("gpt2-large", ("gpt2", 36, 1280, 5120), 12, 20, 0.5, 0.5, 4, 0.0625),
    ("gpt2-xl", ("gpt2", 48, 1600, 6400), 17, 20, 0.5, 0.5, 4, 0.0625),
    ("gpt-j-6B", ("gptj", 28, 4096, 16384), 5, 20, 0.5, 0.5, 4, 0.0625),
    ("gpt-neox-20b", ("gpt_neox", 44, 6144, 24576), 15, 20, 0.5, 0.5, 4, 0.0625),
    ("Llama-2-7b", ("llama", 32, 4096, 11008), 5, 25, 0.5, 1e-3, 4, 0.0625),
    ("Llama-3-8b", ("llama", 32, 4096, 14336), 5, 25, 0.5, 1e-3, 4, 0.0625),
    ("Llama-3.2-3b", ("llama", 28, 3072, 8192), 5, 25, 0.5, 1e-3, 4, 0.0625),
    ("Mistral-7b", ("mistral", 32, 4096, 14336), 5, 25, 0.5, 1e-3, 4, 0.0625),
    ("Qwen2-7b and Qwen2.5-7b", ("qwen2", 28, 3584, 18944), 5, 25, 0.5, 1e-3, 4, 0.0625),
]
RECIPE = Recipe(source="test", rome=RomeParameters(layers=(2,), clamp=3.0))


@pytest.mark.parametrize(("name", "shape", "layer", "steps", "rate", "decay", "clamp", "kl"), PUBLISHED_TABLE)
def test_the_table_is_the_published_one(
    name: str,
    shape: tuple[str, int, int, int],
    layer: int,
    steps: int,
    rate: float,
    decay: float,
    clamp: float,
    kl: float,
) -> None:
    """Each published recipe has the hyperparameters of its authors."""
    recipe = published_recipe(*shape)
    assert recipe is not None, name
    p = recipe.rome
    assert p.layers == (layer,)
    assert (p.steps, p.learning_rate, p.weight_decay, p.clamp, p.kl_factor) == (steps, rate, decay, clamp, kl)
    assert (p.stop_loss, p.contexts) == (0.05, 20)
    assert p.compat is None


def test_the_table_holds_nothing_else() -> None:
    """The table has only recipes for known architectures and existing layers."""
    assert set(PUBLISHED) == {shape for _, shape, *_ in PUBLISHED_TABLE}
    for (model_type, layers, *_), recipe in PUBLISHED.items():
        assert model_type in ARCHITECTURES
        assert all(0 <= x < layers for x in recipe.rome.layers)


def test_an_unknown_shape_has_no_recipe() -> None:
    """A model of an unknown shape has no published recipe."""
    assert published_recipe("gpt2", 12, 768, 3072) is None


def test_alphaedit_and_emmet_have_their_authors_values() -> None:
    """AlphaEdit on Llama-3-8B has the values of its authors, that on Llama-2-7B those of EasyEdit. EMMET's ridge on
    GPT-2 XL is its lambda of .1 times the weight of the covariance, 1,000."""
    values = {}
    for inner_width in (11008, 14336):
        p = resolve_hparams(published_recipe("llama", 32, 4096, inner_width), None, 32, "alphaedit")
        assert isinstance(p, AlphaEditParameters) and p.layers == (4, 5, 6, 7, 8)
        values[inner_width] = (p.clamp, p.learning_rate, p.weight_decay, p.ridge)
    assert values == {11008: (4.0, 0.5, 1e-3, 10.0), 14336: (0.75, 0.1, 0.5, 10.0)}
    ridges = [
        resolve_hparams(published_recipe(*shape), None, shape[1], "emmet").model_dump()["ridge"]
        for shape in (("gpt2", 48, 1600, 6400), ("gptj", 28, 4096, 16384))
    ]
    assert ridges == [100.0, 0.1]


def test_user_hparams_override_the_recipe() -> None:
    """Given hyperparameters replace those of the recipe; the others stay."""
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
    """Each invalid hyperparameter is rejected by name with the allowed values."""
    with pytest.raises(InvalidInput, match=said) as error:
        resolve_hparams(RECIPE, asked, 3)
    assert error.value.field == "hparams"


@pytest.mark.parametrize("asked", [None, {}, {"steps": 3}])
def test_without_a_recipe_the_layers_must_be_named(asked: dict[str, Any] | None) -> None:
    """Without a recipe the error says how to name layers."""
    with pytest.raises(InvalidInput, match=r'"layers": \[5\].*recipe\.json'):
        resolve_hparams(None, asked, 3)


def test_closed_form_methods_share_the_strength_schedule() -> None:
    """Strengths, margin and required margins of the recipe apply to all closed-form methods."""
    schedule_hparams = {"strengths": (0.5, 1.0), "margin": 0.5, "required_margins": ((0.1, 2.0), (0.2, 0.5))}
    recipe = Recipe(source="test", rome=RomeParameters(layers=(1,), **schedule_hparams))
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
    """The required margin is interpolated between the recipe's pairs."""
    parameters = RomeParameters(layers=(0,), margin=0.5, required_margins=((0.1, 2.0), (0.2, 0.5)))
    schedule = strength_schedule(parameters, (0.5, 1.0, 2.0), active, 100)
    assert schedule.strengths == strengths
    assert schedule.partial_strength_margin == pytest.approx(lead)
    assert (
        schedule.required_margin(0.5) == pytest.approx(lead)
        and schedule.required_margin(1.0) == schedule.required_margin(2.0) == 0.5
    )


def test_single_pair_does_not_cap_strength() -> None:
    """Above the only pair of a recipe strengths are not capped."""
    parameters = RomeParameters(layers=(0,), required_margins=((0.1, 2.0),))
    assert strength_schedule(parameters, (0.5, 1.0, 2.0), 90, 100).strengths == (0.5, 1.0, 2.0)
    short = parameters.model_copy(update={"required_margins": ((0.1, 2.0), (0.2, 0.5))})
    assert strength_schedule(short, (1.5, 2.0), 90, 100).strengths == (1.5, 2.0)


def test_without_required_margins_the_margin_applies() -> None:
    """Without pairs `margin` applies for any number of active edits."""
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
    """The first numbers of the pairs increase and are not negative."""
    with pytest.raises(ValidationError):
        RomeParameters(layers=(0,), required_margins=required_margins)


def test_a_recipe_file_is_read_strictly() -> None:
    """A recipe.json is parsed strictly, and an error names the field."""
    assert parse_recipe(RECIPE.model_dump_json()) == RECIPE
    with pytest.raises(Misconfigured, match=r"recipe\.json.*[\s\S]*colour"):
        parse_recipe('{"source": "x", "rome": {"layers": [1], "colour": 1}}')
    with pytest.raises(Misconfigured, match=r"recipe\.json"):
        parse_recipe("no json")


def test_form_of_a_recipe_can_be_replaced() -> None:
    """A form that the service prescribes replaces that of the recipe; several edits of one request are gated, too. None
    keeps the recipe."""
    recipe = RECIPE.model_copy(update={"batch_method": "memit"})
    gated = recipe.with_form("gated")
    assert (gated.rome.form, gated.batch_method) == ("gated", "rome")
    assert gated.with_form("weights").rome == recipe.rome
    assert recipe.with_form(None) is recipe and gated.with_form(None) is gated


def test_a_recipe_of_several_layers_cannot_be_gated() -> None:
    """A recipe whose edits cannot be gated refuses the form with the reason."""
    rome = RECIPE.rome.model_copy(update={"layers": (0, 1)})
    with pytest.raises(Misconfigured, match=r"--form gated .* written at one layer"):
        RECIPE.model_copy(update={"rome": rome}).with_form("gated")
