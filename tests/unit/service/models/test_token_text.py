"""Tests of service.models.token_text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.models.token_text import TokenTextCache
from tests.support.tiny_models import tiny, tokenizer

TEXTS = ["The Eiffel Tower is in Paris.", " São Paulo", "\n\n", "日本語 🗼!"]


@pytest.mark.parametrize("text", TEXTS)
def test_token_texts_join_to_the_text(text: str) -> None:
    """The texts of a text's tokens, with the bytes of split characters joined, are the text."""
    token_text = TokenTextCache(tokenizer())
    raw = b""
    for token in tokenizer()(text)["input_ids"]:
        text_of_token = token_text(token)
        raw += (
            bytes.fromhex(text_of_token.removeprefix("bytes:").replace("\\x", ""))
            if text_of_token.startswith("bytes:")
            else text_of_token.encode()
        )
    assert raw.decode() == text


def test_every_token_has_a_distinct_text() -> None:
    """No two tokens of a byte-level vocabulary have the same text, so top log-probabilities have distinct keys."""
    token_text = TokenTextCache(tokenizer())
    assert len({token_text(token) for token in range(len(tokenizer()))}) == len(tokenizer())


def test_a_space_at_the_beginning_is_kept() -> None:
    """A tokenizer that trims the beginning of a text does not trim the text of a single token."""
    words = {"<0xE2>": 0, "▁Rome": 1, "a": 2, "▁a": 3, "e": 4, "<unk>": 5}
    raw = Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    token_text = TokenTextCache(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert token_text(1) == " Rome"
    assert token_text(4) == "e"
    assert token_text(0) == "bytes:\\xe2"


def test_special_tokens_have_text() -> None:
    """Special tokens have a text."""
    model = tiny("gpt2")
    assert model.token_text(0) == "<|endoftext|>"
    assert model.token_text is model.token_text
