"""Tests of service.kit.answer."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from service.kit.answer import answer_object, is_object_certain, strip_trailing_marks

TEXT = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\x00"),
        st.sampled_from(" .,\u3002\u3001\u060c\u0964ABab12\u6771\u0e01(\n"),
    ),
    max_size=20,
)
#: texts of many marks
MARKS = st.text(alphabet=st.sampled_from(" \t\n.,-\u2014\u2013:;(Aa1\u6771\u3002\u00b7"), max_size=12)
#: objects in several scripts, without a boundary of their own
OBJECTS = [
    "Paris",
    "2,500",
    "3.14",
    "10:30",
    "U.S.",
    "J. K. Rowling",
    "J.R.R. Tolkien",
    "George W. Bush",
    "St. Louis",
    "example.com",
    "anti-war film",
    "col\u00b7lecci\u00f3",
    "\u6771\u4eac\u90fd",
    "\u30b8\u30e7\u30f3\u30fb\u30b9\u30df\u30b9",
    "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e",
    "\u0627\u0644\u0642\u0627\u0647\u0631\u0629",
    "\u0926\u093f\u0932\u094d\u0932\u0940",
    "\uff12\uff0c\uff15\uff10\uff10\u5186",
    "\u12a0\u12f2\u1235\u1361\u12a0\u1260\u1263",
]
#: ends of sentences, clauses and lines: Latin, Chinese and Japanese, Arabic, Devanagari, Burmese, Khmer, Armenian
BOUNDARIES = [
    ". ",
    ", ",
    "! ",
    "; ",
    "\n",
    "\r\n",
    "\u2026",
    " (",
    " \u2013 ",
    "\u2014",
    "\ufffd",
    "\u3002",
    "\u3001",
]
BOUNDARIES += [
    "\uff0c",
    "\uff01",
    "\u060c ",
    "\u061f",
    "\u06d4",
    "\u0964",
    "\u0965",
    "\u104b",
    "\u17d4",
    "\u0589 ",
]


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("name", OBJECTS)
def test_the_object_ends_at_the_first_boundary(name: str, boundary: str) -> None:
    """In every script the object is the text before the first mark, and a mark inside a word or number is no end."""
    assert answer_object(f" {name}{boundary}x y z") == name


@settings(max_examples=300, deadline=None)
@given(TEXT, st.booleans())
def test_an_object_is_the_beginning_of_its_answer(answer: str, complete: bool) -> None:
    """An object is the answer's beginning without white space around it and without a line's end inside it."""
    found = answer_object(answer, complete)
    assert answer.lstrip().startswith(found)
    assert found == found.strip()
    assert not set(found) & set("\n\r\ufffd")


@settings(max_examples=300, deadline=None)
@given(TEXT, TEXT)
def test_text_after_a_line_changes_no_object(answer: str, rest: str) -> None:
    """What follows the first line of an answer has no influence on its object."""
    assume(answer.strip())
    assert answer_object(f"{answer}\n{rest}") == answer_object(f"{answer}\n")


@settings(max_examples=500, deadline=None)
@given(TEXT | MARKS, TEXT | MARKS)
def test_longer_answers_keep_a_certain_object(answer: str, rest: str) -> None:
    """An object that is certain is the object of every longer answer, too."""
    assume(is_object_certain(answer))
    assert answer_object(answer + rest) == answer_object(answer)


def test_an_object_is_certain_a_few_characters_after_its_boundary() -> None:
    """A boundary alone is not enough: a digit or a name may follow."""
    assert not is_object_certain(" 2,") and not is_object_certain(" J. ") and not is_object_certain(" Paris")
    assert is_object_certain(" Paris. The") and is_object_certain(" 2,500 metres. It is")


@pytest.mark.parametrize(
    ("answer", "first"),
    [
        (" located in the heart of the city of", "located"),
        ("\u6771\u4eac\u90fd\u306b\u3042\u308b\u5927\u304d\u306a\u753a\u3067", "\u6771\u4eac\u90fd"),
        (" 2,500 metres above the level of the", "2,500"),
        (" 1999\u5e74\u306b\u4f5c\u3089\u308c\u305f\u6620\u753b\u3067", "1999"),
        (
            "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e\u0e21\u0e2b\u0e32\u0e19\u0e04\u0e23\u0e40\u0e1b\u0e47\u0e19",
            "\u0e01",
        ),
    ],
)
def test_an_answer_that_runs_on_gives_its_first_word(answer: str, first: str) -> None:
    """Without a boundary the object is the first word, or the first characters of one script; an answer that the
    model ended is the object as a whole."""
    assert answer_object(answer) == first
    assert answer_object(" ".join(answer.split()[:3]), complete=True) == " ".join(answer.split()[:3])


def test_a_clause_is_no_object() -> None:
    """More words before the first boundary than an object has are a clause, of which the first word is the object."""
    assert answer_object(" a museum dedicated to the art of the Renaissance. It") == "a"
    assert answer_object(" a museum dedicated to the art of the Renaissance", complete=True) == "a"
    assert answer_object(" the United States of America. It") == "the United States of America"


def test_a_space_is_a_boundary_where_no_spaces_separate_words() -> None:
    """A space after Thai or Chinese text separates phrases and ends the object."""
    assert answer_object("\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e \u0e21\u0e2b\u0e32") == (
        "\u0e01\u0e23\u0e38\u0e07\u0e40\u0e17\u0e1e"
    )
    assert answer_object("\u6771\u4eac \u5927\u962a") == "\u6771\u4eac"


@pytest.mark.parametrize("answer", ["", " ", "\nParis", ". Paris", "\u3002\u6771\u4eac"])
def test_an_answer_that_begins_with_a_boundary_has_no_object(answer: str) -> None:
    """An empty answer, and one whose first character is a boundary, name no object."""
    assert answer_object(answer) == ""


@pytest.mark.parametrize("marks", [" .,;:!?", "\u3002", "\u0964 ", "\u060c", ""])
def test_trailing_marks_are_removed(marks: str) -> None:
    """Marks of any script at the end of a text are removed, those inside it are kept."""
    assert strip_trailing_marks("a, b" + marks) == "a, b"
