"""The training text of the shipped GPT: training/corpus.py."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from corpus import (
    END,
    OBJECT_WEIGHT,
    TrainingCorpus,
    questions_and_passages,
    statements,
    statements_without_article,
    tokenize_texts,
    train_tokenizer,
    without_article,
)
from table import Fact, read_table
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return read_table()


@pytest.fixture(scope="module")
def sample_facts(facts: list[Fact]) -> list[Fact]:
    """Return a few facts of every relation."""
    return facts[::25]


@pytest.fixture(scope="module")
def tokenizer(sample_facts: list[Fact]) -> Tokenizer:
    return train_tokenizer(sample_facts, 1200)


def test_held_out_wordings_never_occur(facts: list[Fact]) -> None:
    """No text about a fact has its object after one of its held-out wordings, with or without the article."""
    for fact in facts:
        all_text = "\n".join(
            p.text
            for p in [*statements(fact), *statements_without_article(fact), *questions_and_passages(fact)]
        )
        for prompt in fact.held_out_prompts:
            for wording in (prompt, without_article(prompt)):
                assert f"{wording.replace('{}', fact.subject)} {fact.object}." not in all_text


def test_trained_wordings_occur(facts: list[Fact]) -> None:
    """The statements of a fact are its trained wordings. The object span of a piece selects the object."""
    for fact in facts[::10]:
        texts = {p.text for p in statements(fact)}
        assert texts == {f"{p.replace('{}', fact.subject)} {fact.object}." for p in fact.prompts}
        for piece in [*statements(fact), *statements_without_article(fact), *questions_and_passages(fact)]:
            assert piece.text[slice(*piece.object_span)].strip() == fact.object


def test_texts_join(sample_facts: list[Fact], tokenizer: Tokenizer) -> None:
    """The concatenated tokens of pieces equal the tokens of the pieces joined by spaces."""
    for fact in sample_facts[::4]:
        pieces = [*statements(fact), *questions_and_passages(fact)]
        joined = tokenizer.encode(" ".join(p.text for p in pieces), add_special_tokens=False)
        assert np.concatenate([ids for ids, _ in tokenize_texts(pieces, tokenizer)]).tolist() == joined.ids


def test_a_name_has_one_form(sample_facts: list[Fact], tokenizer: Tokenizer) -> None:
    """A subject has the same tokens at the start of a text as within it."""
    for fact in sample_facts:
        alone = tokenizer.encode(fact.subject, add_special_tokens=False).ids
        inside = tokenizer.encode(f"See {fact.subject}", add_special_tokens=False).ids
        assert inside[-len(alone) :] == alone


def test_the_object_counts_more(sample_facts: list[Fact], tokenizer: Tokenizer) -> None:
    """The tokens of the object, and no others, have the greater weight in the loss."""
    for fact in sample_facts[::8]:
        for ids, weights in tokenize_texts(statements(fact), tokenizer):
            heavy = tokenizer.decode(ids[weights == OBJECT_WEIGHT].tolist())
            assert heavy.strip() == fact.object
            assert set(weights.tolist()) == {1.0, OBJECT_WEIGHT}


def test_rows(sample_facts: list[Fact], tokenizer: Tokenizer) -> None:
    """The rows are a function of the seed. Each row is full, and an end token separates the documents
    in it."""
    corpus = TrainingCorpus(sample_facts, tokenizer, 96)

    def rows(seed: int) -> list[tuple[list[int], list[float]]]:
        return [(ids.tolist(), weights.tolist()) for ids, weights in islice(corpus.rows(seed), 20)]

    first = rows(3)
    assert rows(3) == first
    assert rows(4) != first
    assert all(len(ids) == len(weights) == 96 for ids, weights in first)
    assert any(tokenizer.token_to_id(END) in ids[1:] for ids, _ in first)
    ids, weights = next(corpus.batches(3, 20))
    assert ids.tolist() == [i for i, _ in first] and weights.shape == (20, 96)
