"""Text for statistics: service.covariance.corpus."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from service.covariance import corpus as module
from service.covariance.corpus import Corpus, CorpusSource, fact_sentences, load_corpus
from service.errors import Misconfigured
from service.kit.steps import Progress, run_steps, run_to_completion
from service.models.loading import LoadedModel
from tests.support.tiny_models import tiny

FACTS = [
    {"subject": "Eiffel Tower", "object": "Paris", "prompts": ["The {} is in", "{} stands in"]},
    {"subject": "Big {0} Ben", "object": "London", "prompts": ["The {} is in"]},
]


def test_the_table_beside_the_model_is_its_corpus(tmp_path: Path) -> None:
    """facts.jsonl is written as statements in its wordings; braces in a subject are kept."""
    lines = "\n".join(map(json.dumps, FACTS))
    (tmp_path / "facts.jsonl").write_text(lines, encoding="utf-8")
    corpus = run_to_completion(load_corpus(replace(tiny(), folder=tmp_path), 10_000, None))
    assert corpus.source == "the model's table of facts"
    assert set(corpus.texts) == {
        "The Eiffel Tower is in Paris.",
        "The Big {0} Ben is in London.",
        "Eiffel Tower stands in Paris.",
    }


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"subject": 1, "object": "x", "prompts": ["{}"]}'])
def test_a_broken_table_is_named(line: str, tmp_path: Path) -> None:
    """A table of facts that cannot be read raises Misconfigured with its path and the fields of a row."""
    (tmp_path / "facts.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(Misconfigured, match=r"facts\.jsonl' cannot be read .*`prompts`"):
        fact_sentences(replace(tiny(), folder=tmp_path))


def test_the_digest_is_of_the_texts() -> None:
    """The digest depends on the texts and their boundaries, not on the name of the source."""
    assert Corpus("a", ("one", "two")).digest == Corpus("b", ("one", "two")).digest
    assert len({Corpus("a", t).digest for t in (("one", "two"), ("onetwo",), ("two", "one"))}) == 3


def test_a_folder_is_its_texts_in_order(tmp_path: Path) -> None:
    """The .txt files of a folder are read in the order of their names, one text a line, without empty lines."""
    (tmp_path / "b.txt").write_text("third\n", encoding="utf-8")
    (tmp_path / "a.txt").write_text("first\n\nsecond\n", encoding="utf-8")
    (tmp_path / "c.md").write_text("no text\n", encoding="utf-8")
    corpus = run_to_completion(load_corpus(tiny(), 10_000, tmp_path))
    assert corpus == Corpus(f"the folder {tmp_path.name}", ("first", "second", "third"))


def test_a_corpus_that_cannot_be_says_what_to_give(tmp_path: Path) -> None:
    """A folder without texts, an invalid file and an unreadable data set are rejected with advice."""
    for named, said in (
        (tmp_path, "no .txt file"),
        (tmp_path / "none", "cannot be read"),
        (Path("hub:a/b"), "data"),
    ):
        with pytest.raises(Misconfigured, match=said):
            run_to_completion(load_corpus(tiny(), 100, named))


def test_own_samples_are_made_once(tmp_path: Path) -> None:
    """Samples of the model are cached, and "samples" names them."""
    made: list[str] = []
    steps = load_corpus(tiny(), 100, None, folder=tmp_path)
    one = run_steps(steps, lambda p: made.append(p.phase))
    assert made and one.source == "the model's own samples"
    again: list[str] = []
    named = load_corpus(tiny(), 100, Path("samples"), folder=tmp_path)
    assert run_steps(named, lambda p: again.append(p.phase)) == one
    assert not again


def test_an_interrupted_sampling_continues_with_the_same_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complete batches are stored. A later start continues after them and has the texts of an uninterrupted one; with
    more tokens the texts begin with those of fewer."""
    monkeypatch.setattr(module, "CORPUS_BATCH_SIZE", 2)
    monkeypatch.setattr(module, "SAMPLE_LENGTH", 8)
    model = tiny()
    whole = run_to_completion(load_corpus(model, 48, None))
    interrupted = load_corpus(model, 48, None, folder=tmp_path)
    first = next(p.done for p in interrupted if list(tmp_path.glob("samples-*.json")))
    interrupted.close()
    progress: list[Progress] = []
    resumed = run_steps(load_corpus(model, 48, None, folder=tmp_path), progress.append)
    assert resumed == whole
    assert first > 16 and progress[0].done > 16, "the first batch is not sampled again"
    assert (progress[-1].done, progress[-1].total) == (48, 48)
    fewer = run_to_completion(load_corpus(model, 16, None, folder=tmp_path))
    assert fewer.texts == whole.texts[:2]


def test_a_part_of_the_table_is_a_sample_of_it(tmp_path: Path) -> None:
    """A corpus with few tokens does not consist of the first facts of the table only, and a seed chooses it."""
    facts = [{"subject": f"Place {i}", "object": "Paris", "prompts": ["{} is in"]} for i in range(200)]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
    model = replace(tiny(), folder=tmp_path)
    corpus = run_to_completion(load_corpus(model, 200, None))
    assert corpus == run_to_completion(load_corpus(model, 200, None))
    first = fact_sentences(model)[: len(corpus.texts)]
    assert len(set(corpus.texts) & set(first)) < len(first) / 2


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), (b"\n\n", "no text")]
)
def test_a_corpus_is_checked_before_anything_is_served(
    content: bytes | None, said: str, tmp_path: Path
) -> None:
    """A file that is missing, not UTF-8 or empty is refused at once, without loading the model's samples."""
    file = tmp_path / "corpus.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Misconfigured, match=said):
        CorpusSource(file, 100).check(tiny())


def test_the_default_number_of_tokens_follows_the_keys() -> None:
    """A small model gets the minimum, a wide one four tokens for each dimension of a key."""
    model = tiny()
    assert module.default_tokens(model) == 8000
    wide = SimpleNamespace(intermediate_size=5000)
    assert module.default_tokens(cast(LoadedModel, wide)) == 20_000
