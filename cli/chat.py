"""`palimpsest chat`: talk with any version of a chat model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from cli.client import add_client_command
from cli.flags import add_version_flag
from cli.sampling_flags import add_sampling_flags, sampling_options
from cli.terminal import err, out, print_json, strip_control_chars
from cli.word_wrap import WordWrapper
from palimpsest import Client, PalimpsestError, Token
from service.errors import InvalidInput

DEFAULT_MAX_NEW_TOKENS = 512
QUESTION_PROMPT = "you> "
NEW_CONVERSATION = "/new"
HELP = f"Ctrl-C stops an answer, Ctrl-D leaves, {NEW_CONVERSATION} begins a new conversation."


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_client_command(
        commands,
        "chat",
        chat,
        description="Talk with any version of a chat model. With a message, or with text on stdin, it answers once; "
        f"otherwise it keeps the conversation. {HELP}",
    )
    parser.add_argument("message", metavar="MESSAGE", nargs="?", help="answer this message and end")
    parser.add_argument("--system", metavar="TEXT", help="system message; default: that of the chat template")
    add_sampling_flags(parser)
    add_version_flag(parser)


def chat(args: argparse.Namespace, client: Client) -> int:
    """Answer one message, or keep a conversation."""
    options = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS, "version": args.version, **sampling_options(args)}
    conversation = Conversation(client, args.system, options)
    if args.message is None and sys.stdin.isatty() and not args.json:
        return _converse(conversation)
    question = sys.stdin.read().rstrip("\n") if args.message is None else args.message
    if not question.strip():
        raise InvalidInput("the message is empty: give one, or write one to stdin.")
    if args.json:
        print_json(conversation.whole_answer(question))
        return 0
    try:
        conversation.answer(question)
    except KeyboardInterrupt:
        _write("\n")
        raise
    return 0


class Conversation:
    """The messages so far, and how they are answered."""

    def __init__(self, client: Client, system: str | None, options: dict[str, Any]) -> None:
        self._client, self._options = client, options
        self._system: list[Any] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Any] = list(self._system)

    def begin_again(self) -> None:
        """Forget all messages but that of the system."""
        self.messages = list(self._system)

    def whole_answer(self, question: str) -> dict[str, Any]:
        """Return the complete response to one question."""
        messages = [*self.messages, {"role": "user", "content": question}]
        return dict(self._client.generate(messages, **self._options).raw)

    def answer(self, question: str) -> None:
        """Print the answer while it is generated. What was printed is a message of the conversation, also after
        Ctrl-C; a question without an answer is none."""
        asked = [*self.messages, {"role": "user", "content": question}]
        printed = Answer()
        try:
            for token in self._client.stream(asked, **self._options):
                printed.add(token)
        finally:
            if printed.text:
                self.messages = [*asked, {"role": "assistant", "content": printed.text}]


class Answer:
    """An answer on the terminal. On a terminal its lines are wrapped."""

    def __init__(self) -> None:
        self.text = ""
        self._wrapper = _wrapper()

    def add(self, token: Token) -> None:
        """Print the next token; after the last one the version on stderr."""
        if token.reset and self.text:  # another worker took over and generates the answer again
            _write(self._wrapper.flush() + "\n")
            self.text, self._wrapper = "", _wrapper()
        self.text += token.text
        _write(self._wrapper.feed(strip_control_chars(token.text)))
        if token.finish_reason is not None:
            _write(self._wrapper.flush() + "\n")
            count = len(token.raw["choices"][0]["tokens"])
            err.print(f"version {token.version}, {count} tokens, {token.finish_reason}", style="dim")


def _wrapper() -> WordWrapper:
    return WordWrapper(out.width if sys.stdout.isatty() else None)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _converse(conversation: Conversation) -> int:
    """Read questions until the end of the input."""
    import readline  # noqa: F401  # gives `input` its editing keys and its history

    err.print(HELP, style="dim")
    for question in _questions():
        if question == NEW_CONVERSATION:
            conversation.begin_again()
            err.print("new conversation", style="dim")
            continue
        try:
            conversation.answer(question)
        except KeyboardInterrupt:
            _write("\n")
            err.print("stopped", style="dim")
        except PalimpsestError as error:
            err.print("palimpsest: " + strip_control_chars(error.detail))
    return 0


def _questions() -> Iterator[str]:
    """Yield what the user enters, until Ctrl-D. Ctrl-C discards a line."""
    while True:
        try:
            question = input(QUESTION_PROMPT).strip()
        except KeyboardInterrupt:
            _write("\n")
            continue
        except EOFError:
            _write("\n")
            return
        if question:
            yield question
