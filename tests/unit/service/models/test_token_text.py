"""The spelling of single tokens."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.models.token_text import Spelling
from tests.support.tiny_models import tiny, tokenizer

TEXTS = ["The Eiffel Tower is in Paris.", " São Paulo", "\n\n", "日本語 🗼!"]


@pytest.mark.parametrize("text", TEXTS)
def test_spellings_make_the_text(text: str) -> None:
    """The spellings of a text's tokens, with the bytes of broken characters put together, are the text."""
    spelling = Spelling(tokenizer())
    raw = b""
    for token in tokenizer()(text)["input_ids"]:
        spelled = spelling(token)
        raw += (
            bytes.fromhex(spelled.removeprefix("bytes:").replace("\\x", ""))
            if spelled.startswith("bytes:")
            else spelled.encode()
        )
    assert raw.decode() == text


def test_every_token_has_a_spelling_of_its_own() -> None:
    """No two tokens of a byte-level vocabulary are spelled alike, so that none hides another among the most probable ones."""
    spelling = Spelling(tokenizer())
    assert len({spelling(token) for token in range(len(tokenizer()))}) == len(tokenizer())


def test_a_space_at_the_beginning_is_kept() -> None:
    """A tokenizer that trims the beginning of a text does not trim a token that stands in its middle."""
    words = {"<0xE2>": 0, "▁Rome": 1, "a": 2, "▁a": 3, "e": 4, "<unk>": 5}
    raw = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert spelling(1) == " Rome"
    assert spelling(4) == "e"
    assert spelling(0) == "bytes:\\xe2"


def test_special_tokens_are_spelled() -> None:
    """Also tokens that are never shown have a name."""
    model = tiny("gpt2")
    assert model.spelling(0) == "<|endoftext|>"
    assert model.spelling is model.spelling
