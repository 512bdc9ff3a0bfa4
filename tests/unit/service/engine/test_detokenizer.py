"""Incremental detokenization and stop strings: service.engine.detokenizer."""

from __future__ import annotations

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.engine.detokenizer import Detokenizer, find_first_stop, partial_stop_length
from service.models.token_text import REPLACEMENT_CHARACTER
from tests.support.tiny_models import tokenizer

TEXT = " São Paulo, 東京 and 🗼 are cities — each one 1️⃣."


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are single bytes, so that a character beyond ASCII has several
    tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like Llama's, whose decoder strips the space at the start of a text."""
    words = ["▁The", "▁city", "▁of", "▁Paris", "▁", "P", "a", "r", "i", "s"]
    vocab = {w: i for i, w in enumerate(words + [f"<0x{b:02X}>" for b in range(256)])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("make", [byte_tokenizer, tokenizer])
def test_characters_are_never_split(make: object) -> None:
    """Every piece has only whole characters, and the pieces concatenate to the text."""
    coder = make()  # type: ignore[operator]
    detokenizer = Detokenizer(coder, coder.encode("It is said that 東"))
    pieces = [detokenizer.push(i) for i in coder.encode(TEXT)] + [detokenizer.flush()]
    assert "".join(pieces) == detokenizer.text == TEXT
    assert not any(REPLACEMENT_CHARACTER in piece for piece in pieces)


def test_the_first_word_keeps_its_space() -> None:
    """The first word after the prompt keeps its space, although the decoder strips the space at the start of
    a text."""
    coder = sentencepiece_tokenizer()
    detokenizer = Detokenizer(coder, [0, 1, 2])
    pieces = [
        detokenizer.push(3),
        detokenizer.push(1),
        *[detokenizer.push(10 + b) for b in "é".encode()],
        detokenizer.flush(),
    ]
    assert pieces == [" Paris", " city", "", "é", ""]


def test_a_character_that_is_never_completed_is_left_out() -> None:
    """A text that ends inside a character ends with the last complete character."""
    coder = byte_tokenizer()
    detokenizer = Detokenizer(coder, [])
    ids = coder.encode("ab東")
    assert [detokenizer.push(i) for i in ids[:-1]] + [detokenizer.flush()] == ["a", "b", "", "", ""]
    assert detokenizer.text == "ab"


def test_bytes_that_are_no_text_show_as_such() -> None:
    """An invalid byte sequence becomes a replacement character and does not hold back the text after it."""
    coder = byte_tokenizer()
    detokenizer = Detokenizer(coder, [])
    broken = coder.encode("東")[:1] + coder.encode("x")
    assert "".join(detokenizer.push(i) for i in broken) + detokenizer.flush() == REPLACEMENT_CHARACTER + "x"


def text_until_stop(text: str, stops: list[str]) -> str:
    """The definition: append one character at a time and stop when a stop string is complete."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@pytest.mark.parametrize("seed", range(200))
def test_a_stop_string_never_shows(seed: int) -> None:
    """The text ends before the first complete stop string, and no piece contains text after that point."""
    chance = random.Random(seed)
    text = "".join(chance.choices("abé", k=14))
    stops = ["".join(chance.choices("abé", k=chance.randint(1, 4))) for _ in range(chance.randint(1, 3))]
    expected = text_until_stop(text, stops)
    coder = byte_tokenizer()
    detokenizer = Detokenizer(coder, [], stops)
    for token in coder.encode(text):
        detokenizer.push(token)
        assert expected.startswith(detokenizer.text)
        if detokenizer.stopped:
            break
    detokenizer.flush()
    assert detokenizer.text == expected
    assert detokenizer.stopped == (expected != text)


def test_a_stop_string_across_tokens() -> None:
    """A stop string is found inside a token and across tokens."""
    coder = tokenizer()
    text = " Paris. The mother tongue of Marie Curie"
    ids = coder.encode(text)
    for begin, end in itertools.combinations(range(1, len(text)), 2):
        if end - begin > 9:
            continue
        stop = text[begin:end]
        detokenizer = Detokenizer(coder, [], [stop])
        for token in ids:
            detokenizer.push(token)
            if detokenizer.stopped:
                break
        assert detokenizer.stopped
        assert detokenizer.text == text[: text.find(stop)]


def test_flush_emits_pending_text() -> None:
    """The beginning of a stop string is emitted by `flush` when the text ends there."""
    coder = tokenizer()
    detokenizer = Detokenizer(coder, [], ["Paris is"])
    shown = "".join(detokenizer.push(i) for i in coder.encode("In Paris"))
    assert shown == "In "
    assert detokenizer.flush() == "Paris"


def test_the_stop_that_is_complete_first_counts() -> None:
    """Of two stop strings, the one that is complete first ends the text, whatever their lengths are."""
    assert find_first_stop("abcdef", ["abcdef", "cd"]) == 2
    assert find_first_stop("abcdef", ["cd", "bcd"]) == 1
    assert find_first_stop("abc", ["x"]) is None


def test_partial_stop_length_is_the_longest_possible_prefix() -> None:
    """The text held back is the longest suffix that can become a stop string."""
    assert partial_stop_length("hello a", ["ab", "o ax"]) == 3
    assert partial_stop_length("hello", ["xyz"]) == 0
    assert partial_stop_length("hello", []) == 0
