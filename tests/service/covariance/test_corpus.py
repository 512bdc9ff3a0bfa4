"""Text for statistics: service.covariance.corpus."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from tiny import tiny

from service.covariance.corpus import Corpus, corpus_steps
from service.progress import finish

FACTS = [
    {"subject": "Eiffel Tower", "object": "Paris", "prompts": ["The {} is in", "{} stands in"]},
    {"subject": "Big {0} Ben", "object": "London", "prompts": ["The {} is in"]},
]


def test_the_table_beside_the_model_is_its_corpus(tmp_path: Path) -> None:
    """facts.jsonl is written out as statements in its wordings, turn by turn; a brace in a subject is only a brace."""
    lines = "\n".join(map(json.dumps, FACTS))
    (tmp_path / "facts.jsonl").write_text(lines, encoding="utf-8")
    corpus = finish(corpus_steps(replace(tiny(), folder=tmp_path), 10_000, None))
    assert corpus.source == "the model's table of facts"
    assert corpus.texts[:3] == (
        "The Eiffel Tower is in Paris.",
        "The Big {0} Ben is in London.",
        "Eiffel Tower stands in Paris.",
    )


def test_the_digest_is_of_the_texts() -> None:
    """Other texts, or the same characters cut elsewhere, have another digest; the source's name does not matter."""
    assert Corpus("a", ("one", "two")).digest == Corpus("b", ("one", "two")).digest
    assert len({Corpus("a", t).digest for t in (("one", "two"), ("onetwo",), ("two", "one"))}) == 3
