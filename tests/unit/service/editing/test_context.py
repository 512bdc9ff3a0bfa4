"""What an editor needs besides the model: service.editing.context."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from service.covariance.corpus import Corpus
from service.editing import context as module
from service.editing.context import REFERENCE, Toolkit, prepare_steps, recipe_of
from service.errors import InvalidInput, Misconfigured
from service.kit.steps import Steps, finish
from service.models.loading import LoadedModel, load
from service.recipes.recipe import Recipe, RomeParameters
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


def refuse(*_: Any) -> Steps[Any]:
    raise AssertionError("made again")
    yield


def test_everything_is_made_once_and_read_afterwards(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start collects and samples; the second reads the same contexts and statistics from the folder."""
    model, folder = tiny(), tmp_path / "stats"
    first = finish(prepare_steps(model, folder, corpus, recipe=RECIPE))
    monkeypatch.setattr(module, "contexts_steps", refuse)
    monkeypatch.setattr("service.covariance.collect.collect_steps", refuse)
    second = finish(prepare_steps(model, folder, corpus, recipe=RECIPE))
    assert second.contexts == first.contexts
    assert {x: s.digest for x, s in second.statistics.items()} == {
        x: s.digest for x, s in first.statistics.items()
    }
    assert not list(folder.glob("*.part"))


def test_another_model_never_gets_these_contexts(corpus: Path, tmp_path: Path) -> None:
    """Contexts belong to the model, their number and their seed: each has a file of its own."""
    folder = tmp_path / "stats"
    one = finish(prepare_steps(tiny(), folder, corpus, recipe=RECIPE))
    other = finish(prepare_steps(tiny(seed=1), folder, corpus, recipe=RECIPE))
    assert one.contexts != other.contexts
    finish(one.contexts_steps(4, 1))
    finish(one.contexts_steps(3, 0))
    assert len(list(folder.glob("contexts-*.json"))) == 4
    assert len(list(folder.glob("moment-*.safetensors"))) == 2


def test_statistics_not_yet_at_hand_are_made_when_needed() -> None:
    """A layer that the recipe does not name is collected at its first use, and only then."""
    kit = Toolkit(tiny(), RECIPE, Corpus("test", tuple(TEXTS)), None)
    assert list(finish(kit.statistics_steps([1]))) == [1]
    kept = kit.statistics[1]
    assert sorted(finish(kit.statistics_steps([0, 1]))) == [0, 1]
    assert kit.statistics[1] is kept
    assert list(kit.statistics_steps([0, 1])) == []


def test_without_a_folder_nothing_is_written(corpus: Path, tmp_path: Path) -> None:
    """Without a folder, everything stays in memory."""
    finish(prepare_steps(tiny(), None, corpus, recipe=RECIPE))
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_model_without_a_recipe_is_prepared_as_far_as_it_can(corpus: Path) -> None:
    """Without a recipe there is a corpus and nothing else; the info says so."""
    kit = finish(prepare_steps(tiny(), None, corpus))
    assert kit.recipe is None
    assert kit.info() == {
        "recipe": None,
        "corpus": {"source": "the file corpus.txt", "digest": kit.corpus.digest},
        "statistics": {},
    }


def test_the_info_says_what_was_made(corpus: Path) -> None:
    """Recipe, corpus and statistics are named with their digests, as JSON."""
    kit = finish(prepare_steps(tiny(), None, corpus, recipe=RECIPE))
    info = json.loads(json.dumps(kit.info()))
    assert info["recipe"]["rome"]["layers"] == [1]
    assert info["statistics"]["1"] == {"tokens": kit.statistics[1].count, "digest": kit.statistics[1].digest}


def test_a_recipe_beside_the_model_comes_first(tmp_path: Path) -> None:
    """recipe.json in the model's folder is the model's recipe."""
    model = load(on_disk(tmp_path))
    assert recipe_of(model) is None
    (tmp_path / "recipe.json").write_text(RECIPE.model_dump_json(), encoding="utf-8")
    assert recipe_of(model) == RECIPE
    (tmp_path / "recipe.json").write_text("{", encoding="utf-8")
    with pytest.raises(Misconfigured, match=r"recipe\.json"):
        recipe_of(model)


def test_a_published_shape_needs_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a published shape has the published recipe, whatever it is called."""
    monkeypatch.setattr(LoadedModel, "layers", 48)
    monkeypatch.setattr(LoadedModel, "width", 1600)
    found = recipe_of(tiny())
    assert found is not None and found.rome.layers == (17,)


def test_a_recipe_for_another_model_is_refused(corpus: Path) -> None:
    """A recipe with a layer that the model does not have is refused at the start."""
    wrong = Recipe(source="test", rome=RomeParameters(layers=(7,), contexts=0))
    with pytest.raises(InvalidInput, match="layers 0 to 2"):
        finish(prepare_steps(tiny(), None, corpus, recipe=wrong))


@pytest.mark.parametrize("count", [1, 3, REFERENCE, 2 * REFERENCE - 1, 500])
def test_the_reference_is_spread_over_the_corpus(count: int) -> None:
    """At most so many texts, from the beginning to near the end of the corpus."""
    texts = tuple(f"text {i}" for i in range(count))
    chosen = Toolkit(tiny(), None, Corpus("test", texts), None).reference
    assert len(chosen) == min(count, REFERENCE)
    assert chosen[0] == texts[0]
    assert len(set(chosen)) == len(chosen)
    assert texts.index(chosen[-1]) >= count // 2 - 1


def test_a_write_cut_short_leaves_no_broken_contexts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that dies while it writes is followed by one that works."""
    kit = Toolkit(tiny(), RECIPE, Corpus("test", tuple(TEXTS)), tmp_path)
    write = Path.write_text

    def dies(self: Path, data: str, **more: Any) -> int:
        write(self, data[:5], **more)
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", dies)
        with pytest.raises(OSError, match="full"):
            finish(kit.contexts_steps(4, 0))
    fresh = Toolkit(tiny(), RECIPE, Corpus("test", tuple(TEXTS)), tmp_path)
    assert len(finish(fresh.contexts_steps(4, 0))) == 4


def test_two_workers_may_make_the_same_contexts_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two workers on one folder the slower one finds the faster one's file there, and no fault in that."""
    slow, fast = (Toolkit(tiny(), None, Corpus("test", tuple(TEXTS)), tmp_path) for _ in range(2))
    write = Path.write_text

    def overtaken(self: Path, data: str, **more: Any) -> int:
        written = write(self, data, **more)
        monkeypatch.setattr(Path, "write_text", write)
        finish(fast.contexts_steps(4, 0))
        return written

    monkeypatch.setattr(Path, "write_text", overtaken)
    assert finish(slow.contexts_steps(4, 0)) == fast.contexts[4, 0]
    assert len(list(tmp_path.iterdir())) == 1
