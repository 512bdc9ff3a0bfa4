"""Facts in prompts and in conversations: service.kit.stated_fact."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.errors import InvalidInput
from service.kit.chat_format import Message
from service.kit.chat_template import render
from service.kit.stated_fact import MAX_MENTIONS, StatedFact, fill_messages, mark_subject
from service.kit.text import RenderedText, Statement, fill_prompt
from tests.support.chat_templates import BOS, EOS, TEMPLATES, message

QUESTION = message("user", "What is the capital of {}?")
ANSWER = message("assistant", "The capital of {} is")
NAME = "Japan"


def stated(template: str, *messages: Message, subject: str = NAME, continued: bool = False) -> StatedFact:
    """Return a fact in a conversation; one that is continued is rendered up to the end of its last message."""
    variables = {
        "messages": list(messages),
        "add_generation_prompt": not continued,
        "bos_token": BOS,
        "eos_token": EOS,
        "tools": None,
    }
    text = render(template, variables)
    if continued:
        text = text[: text.rindex(messages[-1]["content"]) + len(messages[-1]["content"])]
    return StatedFact(subject, text, messages, continued)


@pytest.mark.parametrize("style", TEMPLATES)
def test_the_statement_is_the_conversation_about_the_subject(style: str) -> None:
    """The text is what the template writes about the subject itself, and the span is that of the last mention."""
    messages = [message("system", "Speak of {}."), message("user", "  {} is old. Name the city of {}!\n")]
    statement = stated(TEMPLATES[style], *messages).statement()
    assert isinstance(statement.text, RenderedText)
    assert statement.text == stated(TEMPLATES[style], *fill_messages(messages, NAME)).prompt
    begin, end = statement.span
    assert statement.text[begin:end] == NAME
    assert begin == statement.text.rindex(NAME)
    assert statement.sentence is None


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_context_is_put_before_the_message_of_the_subject(style: str) -> None:
    """A context begins the message with the last mention; the text before it and the subject stay."""
    statement = stated(TEMPLATES[style], message("system", "Of {}."), QUESTION).statement()
    moved = statement.with_context("It rains. ")
    assert isinstance(moved.text, RenderedText)
    assert moved.text[slice(*moved.span)] == NAME
    assert moved.text == statement.text.replace("What is", "It rains. What is")


def test_a_continued_message_is_a_sentence() -> None:
    """The last message, which the model continues, is the sentence of the statement, with the subject's place in it."""
    statement = stated(TEMPLATES["chatml"], QUESTION, ANSWER, continued=True).statement()
    assert statement.sentence == fill_prompt(ANSWER["content"], NAME)
    assert not isinstance(statement.sentence.text, RenderedText)
    assert statement.text.endswith("assistant\nThe capital of Japan is")


def test_another_subject_takes_every_place() -> None:
    """The statement about another subject has it at all mentions."""
    fact = stated(TEMPLATES["chatml"], QUESTION, ANSWER, continued=True)
    other = fact.statement("Peru")
    assert other.text == fact.statement().text.replace(NAME, "Peru")
    assert other.text.count("Peru") == 2 and other.text[slice(*other.span)] == "Peru"


def test_a_prompt_is_filled_as_before() -> None:
    """A fact without messages is its prompt with the subject, without a form of a template."""
    fact = StatedFact(NAME, "The capital of {} is")
    assert fact.statement() == Statement("The capital of Japan is", (15, 20))
    assert not isinstance(fact.statement().text, RenderedText)
    assert fact.wording == "The capital of {} is"


@pytest.mark.parametrize(
    "change", [str.upper, lambda text: text.replace("{}", "it", 1), lambda text: "{}" + text]
)
def test_a_template_that_changes_the_messages_is_refused(change: Callable[[str], str]) -> None:
    """A text in which the message of the subject is another one, or a mention is missing or added, is refused."""
    fact = stated(TEMPLATES["chatml"], QUESTION, ANSWER)
    with pytest.raises(InvalidInput, match="does not keep the messages") as error:
        StatedFact(NAME, change(fact.prompt), fact.messages).statement()
    assert error.value.field == "messages"


def test_every_mention_of_a_subject_is_its_place() -> None:
    """Mentions in the subject's spelling become `{}`; longer words and other spellings stay."""
    said = [message("user", "Japan, japan, the Japanese and Japan's sea"), message("assistant", "Yes.")]
    marked = [m["content"] for m in mark_subject(said, NAME)]
    assert marked == ["{}, japan, the Japanese and {}'s sea", "Yes."]
    assert mark_subject([message("user", "日本の首都は")], "日本")[0]["content"] == "{}の首都は"


def test_a_placeholder_leaves_the_other_mentions() -> None:
    """Where a message has `{}`, that is the subject, and names are words as in a prompt."""
    said = [message("user", "Japan is like {}.")]
    assert mark_subject(said, NAME) == said


def test_a_subject_without_a_mention_is_refused() -> None:
    """Messages that do not have the subject, or have it inside a longer word only, are refused with what to change."""
    with pytest.raises(InvalidInput, match="does not occur in the messages: spell it") as error:
        mark_subject([message("user", "The Japanese capital")], NAME)
    assert error.value.field == "subject"


@pytest.mark.parametrize("mention", ["{} ", "Japan "])
def test_the_number_of_mentions_is_limited(mention: str) -> None:
    """A conversation may mention its subject so many times and no more."""
    mark_subject([message("user", mention * MAX_MENTIONS)], NAME)
    with pytest.raises(InvalidInput, match=f"{MAX_MENTIONS + 1} times") as error:
        mark_subject([message("user", mention * (MAX_MENTIONS + 1))], NAME)
    assert error.value.field == "messages"


def test_the_key_is_that_of_the_messages() -> None:
    """The key of a conversation does not depend on the text of its template, and depends on roles, contents and where
    it ends; a prompt with the same text is another fact."""
    fact = stated(TEMPLATES["chatml"], QUESTION)
    assert fact.key == stated(TEMPLATES["llama"], QUESTION).key
    others = [
        stated(TEMPLATES["chatml"], QUESTION, subject="Peru"),
        stated(TEMPLATES["chatml"], message("system", QUESTION["content"])),
        stated(TEMPLATES["chatml"], QUESTION, ANSWER),
        stated(TEMPLATES["chatml"], QUESTION, ANSWER, continued=True),
        StatedFact(NAME, fact.prompt),
    ]
    assert len({fact.key, *(other.key for other in others)}) == 1 + len(others)


def test_a_fact_is_read_from_its_fields() -> None:
    """A stored request and an entry of the ledger say the fact again, also one from before there were messages."""
    fact = stated(TEMPLATES["chatml"], QUESTION, ANSWER, continued=True)
    fields = {
        "subject": NAME,
        "prompt": fact.prompt,
        "messages": [QUESTION, ANSWER],
        "continue_final_message": True,
    }
    assert StatedFact.from_fields(fields).statement() == fact.statement()
    assert StatedFact.from_fields(fields).key == fact.key
    assert StatedFact.from_fields({"subject": "a", "prompt": "{} is"}) == StatedFact("a", "{} is")
    assert fact.wording == ANSWER["content"]


def test_what_the_caller_wrote_is_named_by_its_field() -> None:
    """The written texts of a conversation are its contents, and that of a prompt is the prompt, with the subject filled
    in; the template's own text is in neither."""
    fact = stated(TEMPLATES["chatml"], QUESTION, ANSWER)
    assert fact.written_texts == {
        "messages.0.content": "What is the capital of Japan?",
        "messages.1.content": "The capital of Japan is",
    }
    assert StatedFact(NAME, "{} is").written_texts == {"prompt": "Japan is"}


def test_a_stored_text_with_many_mentions_is_refused() -> None:
    """A text from elsewhere, such as an imported file, cannot have more mentions than a request."""
    said = message("user", "{}" * (MAX_MENTIONS + 1))
    with pytest.raises(InvalidInput, match="mention the subject"):
        stated(TEMPLATES["chatml"], said).statement()
