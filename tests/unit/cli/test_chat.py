"""`palimpsest chat`, tested against a fake service."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from cli.main import main
from tests.support.fake_http_service import FakeService, sse_stream

Captured = pytest.CaptureFixture[str]
Enter = Callable[..., None]


def answer(text: str, version: int = 1) -> str:
    return sse_stream(
        ("token", {"index": 0, "text": text[:2], "version": version}),
        ("token", {"index": 0, "text": text[2:], "version": version}),
        ("end", {"version": version, "choices": [{"text": text, "tokens": [5, 6], "finish_reason": "stop"}]}),
    )


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Enter:
    """A function that says what a user enters: lines, or the error of a key. Then the input ends."""

    def set_input(*lines: str | type[BaseException]) -> None:
        rest = [*lines, EOFError]

        def read(prompt: str) -> str:
            line = rest.pop(0)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    return set_input


def sent(fake: FakeService) -> list[Any]:
    return [body["messages"] for _, body in fake.requests]


def test_one_message_is_answered_once(fake: FakeService, capsys: Captured) -> None:
    """The answer is written to stdout without control characters, and the version to stderr."""
    fake.responses = {"POST /generate": answer("Oslo\x1b[31m.")}
    assert main(["chat", "Where?", "--system", "Be brief.", "--version", "3", "--seed", "4"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Oslo[31m.\n"
    assert "version 1, 2 tokens, stop" in shown.err
    asked = {"max_new_tokens": 512, "version": 3, "seed": 4, "stream": True}
    messages = [{"role": "system", "content": "Be brief."}, user("Where?")]
    assert fake.requests == [("POST /generate", asked | {"messages": messages})]


def test_a_message_can_be_piped(fake: FakeService, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text on stdin is one message with all its lines; no text is an error."""
    fake.responses = {"POST /generate": answer("Yes.")}
    monkeypatch.setattr(sys, "stdin", io.StringIO("One\ntwo?\n"))
    assert main(["chat"]) == 0
    assert sent(fake) == [[user("One\ntwo?")]]
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    assert main(["chat"]) == 1
    assert "the message is empty" in capsys.readouterr().err


def test_json_is_the_response(fake: FakeService, capsys: Captured) -> None:
    """With --json the output is the response of the service on one line."""
    response = {"text": "Oslo.", "tokens": [1], "finish_reason": "stop", "version": 2}
    fake.responses = {"POST /generate": response}
    assert main(["chat", "Where?", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == response


def test_a_conversation_has_its_history(fake: FakeService, enter: Enter, capsys: Captured) -> None:
    """Each question is sent with the questions and answers before it, until Ctrl-D; empty lines are skipped."""
    fake.responses = {"POST /generate": [answer("Oslo."), answer("Norway.")]}
    enter("Where?", "  ", "Which country?")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out == "Oslo.\nNorway.\n\n"
    assert sent(fake) == [[user("Where?")], [user("Where?"), assistant("Oslo."), user("Which country?")]]


def test_a_conversation_can_begin_again(fake: FakeService, enter: Enter) -> None:
    """`/new` forgets all messages but that of the system."""
    fake.responses = {"POST /generate": [answer("Oslo."), answer("Hi.")]}
    enter("Where?", "/new", "Hello")
    assert main(["chat", "--system", "S"]) == 0
    assert sent(fake)[1] == [{"role": "system", "content": "S"}, user("Hello")]


def test_ctrl_c_stops_an_answer(
    fake: FakeService, enter: Enter, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said until Ctrl-C is the answer in the history, and the conversation goes on. At a question Ctrl-C
    discards the line."""
    fake.responses = {"POST /generate": [answer("Oslo."), answer("Norway.")]}
    written = sys.stdout.write
    interrupts = ["Os"]

    def write(text: str) -> int:
        count = written(text)
        if text in interrupts:
            interrupts.clear()
            raise KeyboardInterrupt
        return count

    enter(KeyboardInterrupt, "Where?", "And?")
    monkeypatch.setattr(sys.stdout, "write", write)
    assert main(["chat"]) == 0
    assert sent(fake)[1] == [user("Where?"), assistant("Os"), user("And?")]
    assert "stopped" in capsys.readouterr().err


def test_a_failed_question_is_forgotten(fake: FakeService, enter: Enter, capsys: Captured) -> None:
    """An error is shown, its question is not part of the conversation, and the next one is answered."""
    problem = FakeService.problem(422, "the conversation has 99 tokens")
    fake.responses = {"POST /generate": [problem, answer("Hi.")]}
    enter("a " * 99, "Hello")
    assert main(["chat"]) == 0
    assert "99 tokens" in capsys.readouterr().err
    assert sent(fake)[1] == [user("Hello")]


def test_an_answer_that_begins_anew_is_shown_anew(fake: FakeService, enter: Enter, capsys: Captured) -> None:
    """After a `reset` event the answer is printed again on a new line, and only that is the answer."""
    said = [("token", {"index": 0, "text": "Os", "version": 0}), ("reset", {})]
    end = ("end", {"choices": [{"text": "Oslo", "tokens": [1], "finish_reason": "stop"}], "version": 0})
    again = sse_stream(*said, ("token", {"index": 0, "text": "Oslo", "version": 0}), end)
    fake.responses = {"POST /generate": [again, answer("Hi.")]}
    enter("Where?", "And?")
    assert main(["chat"]) == 0
    assert capsys.readouterr().out.startswith("Os\nOslo\n")
    assert sent(fake)[1][1] == assistant("Oslo")
