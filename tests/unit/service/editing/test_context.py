"""What an editor needs besides the model: service.editing.context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.covariance.collect import load_or_collect_statistics
from service.covariance.corpus import Corpus
from service.editing import context as module
from service.editing.context import (
    REFERENCE_TEXTS,
    EditorContext,
    build_editor_context,
    find_recipe,
    open_editor_context,
    recipe_path,
)
from service.errors import InvalidInput, Misconfigured, PreparationFailed
from service.kit.steps import Progress, Stepper, advance, run_to_completion
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel, load_model
from service.recipes.recipe import Recipe
from tests.support.tiny_models import TEXTS, tiny

RECIPE = Recipe(source="test", rome=RomeParameters(layers=(1,), contexts=4))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    return file


def on_disk(folder: Path) -> Path:
    model = tiny()
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def fail_if_called(*_: Any) -> Stepper[Any]:
    raise AssertionError("made again")


def test_everything_is_made_once_and_read_afterwards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start collects and samples; the second start loads the same contexts and statistics from the
    folder."""
    model, folder = tiny(), tmp_path / "stats"
    first = run_to_completion(build_editor_context(model, folder, corpus, recipe=RECIPE))
    monkeypatch.setattr(module, "sample_contexts", fail_if_called)
    monkeypatch.setattr("service.covariance.collect.collect_statistics", fail_if_called)
    second = run_to_completion(build_editor_context(model, folder, corpus, recipe=RECIPE))
    assert second.contexts == first.contexts
    assert {x: s.digest for x, s in second.statistics.items()} == {
        x: s.digest for x, s in first.statistics.items()
    }
    assert not list(folder.glob("*.part"))


def test_another_model_never_gets_these_contexts(corpus: Path, tmp_path: Path) -> None:
    """Contexts are cached by model, number and seed."""
    folder = tmp_path / "stats"
    one = run_to_completion(build_editor_context(tiny(), folder, corpus, recipe=RECIPE))
    other = run_to_completion(build_editor_context(tiny(seed=1), folder, corpus, recipe=RECIPE))
    assert one.contexts != other.contexts
    run_to_completion(one.get_contexts(4, 1))
    run_to_completion(one.get_contexts(3, 0))
    assert len(list(folder.glob("contexts-*.json"))) == 4
    assert len(list(folder.glob("moment-*.safetensors"))) == 2


def test_missing_statistics_are_collected_on_demand() -> None:
    """Statistics of a layer that the recipe does not name are collected at first use."""
    context = EditorContext(tiny(), RECIPE, Corpus("test", tuple(TEXTS)), None)
    assert list(run_to_completion(context.get_statistics([1]))) == [1]
    cached = context.statistics[1]
    assert sorted(run_to_completion(context.get_statistics([0, 1]))) == [0, 1]
    assert context.statistics[1] is cached
    assert list(context.get_statistics([0, 1])) == []


def test_without_a_folder_nothing_is_written(corpus: Path, tmp_path: Path) -> None:
    """Without a folder everything stays in memory."""
    run_to_completion(build_editor_context(tiny(), None, corpus, recipe=RECIPE))
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_model_without_a_recipe_gets_a_default(corpus: Path) -> None:
    """Without a recipe there is a default with candidate layers; before anything is computed the info has no corpus."""
    context = open_editor_context(tiny(), None, corpus)
    assert context.recipe is not None and len(context.recipe.candidate_layers) > 1
    assert (context.info()["corpus"], context.info()["statistics"]) == (None, {})
    run_to_completion(context.get_corpus())
    assert context.info()["corpus"] == {"source": "the file corpus.txt", "digest": context.corpus.digest}


def test_in_the_background_several_wait_for_one_collection(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs that need statistics, and one that needs only the corpus, wait for the same collection, which the steps
    of the queue carry out once."""
    collections: list[list[int]] = []
    collect = load_or_collect_statistics

    def counted(model: LoadedModel, layers: list[int], *rest: Any) -> Stepper[Any]:
        collections.append(list(layers))
        return collect(model, layers, *rest)

    monkeypatch.setattr(module, "load_or_collect_statistics", counted)
    context = open_editor_context(tiny(), None, corpus, recipe=RECIPE)
    context.prepare_in_background()
    waiting = [context.get_statistics([1]), context.get_statistics([1]), context.get_corpus()]
    for steps in waiting:
        outcome = advance(steps)
        assert isinstance(outcome, Progress) and outcome.waiting
    while context.queue.pending:
        context.queue.step()
    for steps in waiting:
        run_to_completion(steps)
    assert collections == [[1]]


def test_a_failed_collection_fails_who_waits_and_the_next_tries_again(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a collection reaches those that wait for it. A later need collects again."""
    context = open_editor_context(tiny(), None, corpus, recipe=RECIPE)
    with monkeypatch.context() as broken:
        broken.setattr(module, "load_or_collect_statistics", fail_if_called)
        with pytest.raises(PreparationFailed):
            run_to_completion(context.get_statistics([1]))
    assert list(run_to_completion(context.get_statistics([1]))) == [1]


def test_the_recipe_of_the_first_edit_is_found_until_another_is_tuned(tmp_path: Path) -> None:
    """A provisional recipe is used by other workers and the next start, and a tuned one replaces it."""
    model, folder = tiny(), tmp_path / "statistics"
    one, other = (EditorContext(model, None, Corpus("test", tuple(TEXTS)), folder) for _ in range(2))
    one.keep_provisional_recipe(RECIPE)
    assert other.read_provisional_recipe() == RECIPE == other.recipe
    recipes = tmp_path / module.RECIPES_FOLDER
    assert find_recipe(model, recipes) == RECIPE
    tuned = RECIPE.model_copy(update={"source": "tuned"})
    recipe_path(model, recipes).write_text(tuned.model_dump_json(), encoding="utf-8")
    assert find_recipe(model, recipes) == tuned


def test_the_info_says_what_was_made(corpus: Path) -> None:
    """The info lists recipe, corpus and statistics with their digests as JSON."""
    context = run_to_completion(build_editor_context(tiny(), None, corpus, recipe=RECIPE))
    info = json.loads(json.dumps(context.info()))
    assert info["recipe"]["rome"]["layers"] == [1]
    assert info["statistics"]["1"] == {
        "tokens": context.statistics[1].count,
        "digest": context.statistics[1].digest,
    }


def test_a_recipe_beside_the_model_comes_first(tmp_path: Path) -> None:
    """recipe.json in the model's folder takes precedence over the published recipe."""
    model = load_model(on_disk(tmp_path))
    assert find_recipe(model) is None
    (tmp_path / "recipe.json").write_text(RECIPE.model_dump_json(), encoding="utf-8")
    assert find_recipe(model) == RECIPE
    (tmp_path / "recipe.json").write_text("{", encoding="utf-8")
    with pytest.raises(Misconfigured, match=r"recipe\.json"):
        find_recipe(model)


def test_a_published_shape_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a published shape has the published recipe, whatever its name is."""
    monkeypatch.setattr(LoadedModel, "num_layers", 48)
    monkeypatch.setattr(LoadedModel, "hidden_size", 1600)
    monkeypatch.setattr(LoadedModel, "intermediate_size", 6400)
    recipe = find_recipe(tiny())
    assert recipe is not None and recipe.rome.layers == (17,)


def test_a_recipe_for_another_model_is_refused(corpus: Path) -> None:
    """A recipe with a layer that the model does not have is rejected at the start."""
    wrong = Recipe(source="test", rome=RomeParameters(layers=(7,), contexts=0))
    with pytest.raises(InvalidInput, match="layers 0 to 2"):
        run_to_completion(build_editor_context(tiny(), None, corpus, recipe=wrong))


@pytest.mark.parametrize("count", [1, 3, REFERENCE_TEXTS, 2 * REFERENCE_TEXTS - 1, 500])
def test_the_reference_is_spread_over_the_corpus(count: int) -> None:
    """The reference texts are evenly spaced over the corpus."""
    texts = tuple(f"text {i}" for i in range(count))
    chosen = EditorContext(tiny(), None, Corpus("test", texts), None).reference_texts
    assert len(chosen) == min(count, REFERENCE_TEXTS)
    assert chosen[0] == texts[0]
    assert len(set(chosen)) == len(chosen)
    assert texts.index(chosen[-1]) >= count // 2 - 1
