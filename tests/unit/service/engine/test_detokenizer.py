"""Text as it may be shown, piece by piece."""

from __future__ import annotations

import itertools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.engine.detokenizer import UNKNOWN, Detokenizer, first_stop, held_back
from tests.support.tiny_models import tokenizer

TEXT = " São Paulo, 東京 and 🗼 are cities — each one 1️⃣."


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single bytes: every character beyond ASCII is spread over several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama's: a leading space is written as a mark that is stripped from the start of a text."""
    words = ["▁The", "▁city", "▁of", "▁Paris", "▁", "P", "a", "r", "i", "s"]
    vocab = {w: i for i, w in enumerate(words + [f"<0x{b:02X}>" for b in range(256)])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.mark.parametrize("make", [letters, tokenizer])
def test_characters_are_never_split(make: object) -> None:
    """Every piece is whole characters, and the pieces together are the text."""
    coder = make()  # type: ignore[operator]
    voice = Detokenizer(coder, coder.encode("It is said that 東"))
    pieces = [voice.push(i) for i in coder.encode(TEXT)] + [voice.end()]
    assert "".join(pieces) == voice.text == TEXT
    assert not any(UNKNOWN in piece for piece in pieces)


def test_the_first_word_keeps_its_space() -> None:
    """Where decoders strip the space at the start of a text, the first new word still has it, as after its prompt."""
    coder = sentencepiece()
    voice = Detokenizer(coder, [0, 1, 2])
    pieces = [voice.push(3), voice.push(1), *[voice.push(10 + b) for b in "é".encode()], voice.end()]
    assert pieces == [" Paris", " city", "", "é", ""]


def test_a_character_that_is_never_completed_is_left_out() -> None:
    """A text cut inside a character ends with the last whole one."""
    coder = letters()
    voice = Detokenizer(coder, [])
    ids = coder.encode("ab東")
    assert [voice.push(i) for i in ids[:-1]] + [voice.end()] == ["a", "b", "", "", ""]
    assert voice.text == "ab"


def test_bytes_that_are_no_text_show_as_such() -> None:
    """A broken sequence in the middle does not hold back what follows it."""
    coder = letters()
    voice = Detokenizer(coder, [])
    broken = coder.encode("東")[:1] + coder.encode("x")
    assert "".join(voice.push(i) for i in broken) + voice.end() == UNKNOWN + "x"


def by_letters(text: str, stops: list[str]) -> str:
    """The definition: read character by character, and stop when a stop string is complete."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)]
    return text


@pytest.mark.parametrize("seed", range(200))
def test_a_stop_string_never_shows(seed: int) -> None:
    """However the text is cut into tokens, it ends before the stop string, and no piece ran ahead of one."""
    chance = random.Random(seed)
    text = "".join(chance.choices("abé", k=14))
    stops = ["".join(chance.choices("abé", k=chance.randint(1, 4))) for _ in range(chance.randint(1, 3))]
    wanted = by_letters(text, stops)
    coder = letters()
    voice = Detokenizer(coder, [], stops)
    for token in coder.encode(text):
        voice.push(token)
        assert wanted.startswith(voice.text)
        if voice.stopped:
            break
    voice.end()
    assert voice.text == wanted
    assert voice.stopped == (wanted != text)


def test_a_stop_string_across_tokens() -> None:
    """A stop string is found when it begins in one token and ends in another, or stands inside one."""
    coder = tokenizer()
    text = " Paris. The mother tongue of Marie Curie"
    ids = coder.encode(text)
    for begin, end in itertools.combinations(range(1, len(text)), 2):
        if end - begin > 9:
            continue
        stop = text[begin:end]
        voice = Detokenizer(coder, [], [stop])
        for token in ids:
            voice.push(token)
            if voice.stopped:
                break
        assert voice.stopped
        assert voice.text == text[: text.find(stop)]


def test_what_was_held_back_comes_when_nothing_follows() -> None:
    """The beginning of a stop string is given out when the text ends there."""
    coder = tokenizer()
    voice = Detokenizer(coder, [], ["Paris is"])
    shown = "".join(voice.push(i) for i in coder.encode("In Paris"))
    assert shown == "In "
    assert voice.end() == "Paris"


def test_the_stop_that_is_complete_first_counts() -> None:
    """Of two stop strings, the one whose end comes first ends the text, however long the other is."""
    assert first_stop("abcdef", ["abcdef", "cd"]) == 2
    assert first_stop("abcdef", ["cd", "bcd"]) == 1
    assert first_stop("abc", ["x"]) is None


def test_held_back_is_the_longest_possible_beginning() -> None:
    """As much is held back as could become a stop string, and no more."""
    assert held_back("hello a", ["ab", "o ax"]) == 3
    assert held_back("hello", ["xyz"]) == 0
    assert held_back("hello", []) == 0
