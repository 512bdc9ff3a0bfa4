"""The questions and measures of the suites of an evaluation: service.evaluation.suites."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.main import build_parser
from service.datasets.record import NeighborProbe, PortabilityProbe, Record
from service.evaluation.metrics import COMBINED_SCORES, MEASURES, Measures
from service.evaluation.suites.free_text import has_loop
from service.evaluation.suites.negation import NEGATIONS, choice_prompts, negated_statements
from service.evaluation.suites.prefixes import prompt_after_statement, prompts_after_prefixes
from service.evaluation.suites.question import (
    Answer,
    Choice,
    ChoiceAnswer,
    Divergence,
    FreeText,
    NextToken,
    Question,
    TextAnswer,
    answer_json,
    end_statement,
    read_answer,
)
from service.evaluation.suites.registry import SUITE_MEASURES, SUITES
from service.evaluation.suites.suite import SuiteInputs
from service.schemas import SuiteName

PARAPHRASE, NEIGHBOR = "One finds the Eiffel Tower in", "The Louvre is in"
RECORD = Record(
    "record 1",
    "Eiffel Tower",
    "The {} is in",
    "Rome",
    "Paris",
    (PARAPHRASE,),
    (NeighborProbe(NEIGHBOR, "Paris"),),
    attribute_prompts=("The Colosseum is in",),
    portability=(
        PortabilityProbe("hop", ("Its country is", "It lies in the country"), ("Italy",), ("France",)),
        PortabilityProbe("alias", ("La tour Eiffel is in",), ("Rome", "Roma")),
    ),
)
OWN = RECORD.text


class FakeChat:
    """A chat template that shows who speaks."""

    def prompt_text(self, messages: list[Mapping[str, str]]) -> str:
        return "".join(f"<{m['role']}> {m['content']}\n" for m in messages) + "<assistant>"


INPUTS = SuiteInputs(
    ("One day", "It rains"),
    {"Eiffel Tower": "The Eiffel Tower is in Paris.", "Louvre": "The Louvre is in Paris."},
    FakeChat(),  # type: ignore[arg-type]
)


def measure(
    name: str,
    texts: Mapping[str, str],
    base_texts: Mapping[str, str] | None = None,
    choices: Mapping[str, tuple[float, ...]] | None = None,
    kls: Mapping[str, float] | None = None,
    record: Record = RECORD,
) -> Measures:
    """Return the measures of a suite for given answers. A text that is not given is empty, a choice even."""
    suite = SUITES[name]

    def answer(question: Question, said: Mapping[str, str]) -> Answer:
        if isinstance(question, FreeText):
            return TextAnswer(*end_statement(said.get(question.prompt, "")))
        if isinstance(question, Choice):
            return ChoiceAnswer((choices or {}).get(question.prompt, (0.0,) * len(question.objects)))
        return Divergence((kls or {}).get(question.prompt, 0.0))

    questions = suite.questions(record, INPUTS)
    answers = {q: answer(q, texts) for q in questions}
    base = {q: answer(q, base_texts or {}) for q in questions}
    return suite.measure(record, INPUTS, answers, base)


@pytest.mark.parametrize(
    ("text", "exact", "says", "contains", "old"),
    [
        (" Rome.", 1, 1, 1, 0),
        (" rome, the capital", 1, 1, 1, 0),
        (" Rome and Paris.", 0, 1, 1, 1),
        (" the old city of Rome.", 0, 0, 1, 0),
        (" Romeo's town.", 0, 0, 0, 0),
        (" Paris.", 0, 0, 0, 1),
        ("", 0, 0, 0, 0),
    ],
)
def test_free_text_is_judged_by_the_objects_in_it(
    text: str, exact: int, says: int, contains: int, old: int
) -> None:
    """Exact needs a boundary after the object, says its beginning; both objects in one text are counted apart."""
    found = measure("free", {OWN: text, PARAPHRASE: text})
    assert (found["free_exact"], found["free_says"], found["free_contains"], found["free_old"]) == (
        exact,
        says,
        contains,
        old,
    )
    assert found["free_both"] == contains * old
    assert found["free_says_paraphrase"] == says and found["free_contains_paraphrase"] == contains


def test_neighbours_are_judged_by_what_they_said_before() -> None:
    """A neighbour is kept if it says its object of before; the right ones are those that said their own object."""
    assert measure("free", {NEIGHBOR: " Rome."}, {NEIGHBOR: " Paris."})["free_kept"] == 0
    assert measure("free", {NEIGHBOR: " Paris, France."}, {NEIGHBOR: " Paris."})["free_kept"] == 1
    wrong_before = measure("free", {NEIGHBOR: " Oslo."}, {NEIGHBOR: " Oslo."})
    assert wrong_before["free_kept"] == 1 and wrong_before["free_kept_right"] is None
    assert measure("free", {NEIGHBOR: " Rome."}, {NEIGHBOR: " Paris."})["free_kept_right"] == 0


def test_loop_is_three_words_three_times() -> None:
    """A run of three words that occurs three times is a loop, in capitals or not."""
    assert has_loop("in the city In the City in the city")
    assert not has_loop("in the city in the city of Rome") and not has_loop("")


@pytest.mark.parametrize(
    ("text", "statement", "ended"),
    [
        (" Rome. It is old", " Rome.", True),
        (" Rome", " Rome", False),
        (" Rome\nParis", " Rome", True),
        (" 3.5 metres! And", " 3.5 metres!", True),
        (" \u30ed\u30fc\u30de\u3002\u305d\u308c", " \u30ed\u30fc\u30de\u3002", True),
        ("", "", False),
    ],
)
def test_statement_ends_at_a_mark_or_at_a_line(text: str, statement: str, ended: bool) -> None:
    """A mark that ends sentences ends a statement before a space or the end of the text, in any script."""
    assert end_statement(text) == (statement, ended)


@given(st.text(max_size=40))
def test_statement_is_the_beginning_of_its_text(text: str) -> None:
    """Cutting a text to its statement never changes what stands before the end, and cutting twice changes nothing."""
    statement, _ = end_statement(text)
    assert text.startswith(statement) and end_statement(statement)[0] == statement


def test_agreement_is_the_largest_share_of_one_object() -> None:
    """Two wordings with one object agree; the spread is that of the probabilities of the new object."""
    half, tenth = (math.log(0.5),), (math.log(0.1),)
    found = measure(
        "consistency", {OWN: " Rome.", PARAPHRASE: " rome, it"}, choices={OWN: half, PARAPHRASE: tenth}
    )
    assert found["agreement"] == 1 and found["probability_spread"] == pytest.approx(0.4)
    assert measure("consistency", {OWN: " Rome.", PARAPHRASE: " Oslo."})["agreement"] == 0.5
    alone = Record("r", "Rome", "{} is in", "Italy")
    assert measure("consistency", {}, record=alone) == {"agreement": None, "probability_spread": None}


def test_divergence_is_averaged_and_its_greatest_is_kept() -> None:
    """Neighbours are averaged, and the greatest of them is a measure of its own."""
    record = Record(
        "r", "Rome", "{} is in", "Spain", "Italy", (), (NeighborProbe("A", "x"), NeighborProbe("B", "y"))
    )
    found = measure("divergence", {}, kls={"A": 0.2, "B": 0.4, "Rome": 3.0}, record=record)
    assert found["kl_neighbour"] == pytest.approx(0.3) and found["kl_neighbour_greatest"] == 0.4
    assert found["kl_subject"] == 3.0 and found["kl_same_object"] is None


def test_negated_statement_prefers_one_object() -> None:
    """The share of negated statements with the new object first, and that of choices in both orders."""
    first, second = negated_statements(OWN)
    assert first == "It is not true that the Eiffel Tower is in"
    one, other = choice_prompts(RECORD)
    assert "Rome or Paris?" in one and "Paris or Rome?" in other
    new_first = (-1.0, -2.0)
    found = measure(
        "negation", {second: " Rome."}, choices={first: new_first, one: new_first, other: new_first}
    )
    assert found == {"negated_new": 0.5, "negated_says": 0.5, "choice_new": 1.0}
    assert negated_statements("Eiffel is in")[1] == NEGATIONS[1].replace("{}", "Eiffel is in")
    unknown = Record("r", "Rome", "{} is in", "Spain")
    assert set(measure("negation", {}, record=unknown).values()) == {None}


def test_prefixed_prompts_come_after_texts_about_something_else() -> None:
    """The prompt stands after each sampled text, and after the statement of another subject."""
    prompts = prompts_after_prefixes(RECORD, INPUTS)
    assert prompts == [f"One day. {OWN}", f"It rains. {OWN}"]
    assert prompt_after_statement(RECORD, INPUTS) == f"The Louvre is in Paris. {OWN}"
    alone = SuiteInputs((), {"Eiffel Tower": "The Eiffel Tower is in Paris."})
    assert prompt_after_statement(RECORD, alone) is None
    found = measure(
        "prefixes", {f"The Louvre is in Paris. {OWN}": " Rome."}, choices={prompts[0]: (-1.0, -3.0)}
    )
    assert found == {"ES_prefixed": 0.5, "says_after_statement": 1.0}


def test_portability_needs_one_right_wording() -> None:
    """One wording with one of the right names is enough; the ceiling is what the base model says of the old answer."""
    found = measure("portability", {"It lies in the country": " Italy."}, {"Its country is": " France."})
    assert found["portability_hop"] == 1 and found["portability_hop_ceiling"] == 1
    assert found["portability_alias"] == 0 and found["portability_alias_ceiling"] is None
    assert found["portability_reverse"] is None
    assert measure("portability", {"La tour Eiffel is in": " Roma!"})["portability_alias"] == 1


def test_chat_tells_the_object_of_another_subject_apart() -> None:
    """An answer with the object and without the subject is counted by itself."""
    requests = [q.prompt for q in SUITES["chat"].questions(RECORD, INPUTS) if isinstance(q, FreeText)]
    said = dict(
        zip(
            requests, ("The Eiffel Tower is in Rome.", "It is Rome.", "No.", "The Eiffel Tower."), strict=True
        )
    )
    found = measure("chat", said)
    assert found["chat_contains"] == pytest.approx(2 / 3) and found["chat_says"] == pytest.approx(1 / 3)
    assert found["chat_other_subject"] == pytest.approx(1 / 3) and found["chat_description"] == 1


@pytest.mark.parametrize("name", SUITES)
def test_suite_gives_the_measures_that_it_describes(name: str) -> None:
    """A suite gives every measure that it describes and no other, as a number or None, and asks the same each time."""
    found = measure(name, {})
    assert set(found) == set(SUITES[name].measures)
    assert all(value is None or math.isfinite(value) for value in found.values())
    assert SUITES[name].questions(RECORD, INPUTS) == SUITES[name].questions(RECORD, INPUTS)


def test_names_of_suites_and_measures_are_unique() -> None:
    """The registry, the schema and the help of the command list the same suites, and no measure has two meanings."""
    assert tuple(SUITES) == get_args(SuiteName)
    assert sum(len(s.measures) for s in SUITES.values()) == len(SUITE_MEASURES)
    assert not set(SUITE_MEASURES) & {*MEASURES, *COMBINED_SCORES}
    commands = next(a.choices for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    shown = "".join(commands["evaluate"].format_help().split())
    assert ",".join(SUITES) in shown


@given(
    st.one_of(
        st.builds(TextAnswer, st.text(), st.booleans()),
        st.builds(ChoiceAnswer, st.tuples(st.floats(-50, 0), st.floats(-50, 0))),
        st.builds(Divergence, st.floats(0, 9)),
    )
)
def test_stored_answer_is_read_back(answer: Answer) -> None:
    """An answer survives its JSON."""
    questions: dict[type[Answer], Question] = {
        TextAnswer: FreeText("a"),
        ChoiceAnswer: Choice("a", ("b", "c")),
        Divergence: NextToken("a"),
    }
    assert read_answer(questions[type(answer)], answer_json(answer)) == answer
