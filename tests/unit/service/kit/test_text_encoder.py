"""Tests of service.kit.text_encoder."""

from __future__ import annotations

import threading

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from service.errors import InvalidInput
from service.kit.text import RenderedText
from service.kit.text_encoder import TextEncoder
from tests.support.paths import ROOT
from tests.support.tiny_models import END, tokenizer

RAW = tokenizer().backend_tokenizer
TURN = "<|im_end|>"  # special, as in tokenizers of chat models
TOOL = "<tool>"  # an added token that is not special
TEXT = "The city of"


def _encoder(raw: Tokenizer, positions: int = 64, vocabulary: int = 1000) -> TextEncoder:
    return TextEncoder(raw, positions, vocabulary)


def _copy(raw: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(raw.to_str())


def _with_template(template: str, raw: Tokenizer = RAW) -> Tokenizer:
    """Return a tokenizer that adds special tokens around a text."""
    copy = _copy(raw)
    copy.add_special_tokens([END, TURN])
    ids = [(name, copy.token_to_id(name)) for name in (END, TURN) if name in template]
    added = processors.TemplateProcessing(single=template, special_tokens=ids)
    copy.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), added])
    return copy


def _word_level_tokenizer(with_unknown: bool) -> Tokenizer:
    """A word tokenizer with a small vocabulary."""
    words = {"<unk>": 0, "the": 1, "city": 2, "of": 3, "rome": 4}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_unknown:
        raw.add_special_tokens(["<unk>"])
    return raw


def test_a_prompt_that_is_too_long_says_how_long_it_may_be() -> None:
    """A prompt must leave one position for the answer; a prompt at the limit passes."""
    tokens = len(RAW.encode("The city of").ids)
    _encoder(RAW, tokens + 1).check("The city of", None)
    with pytest.raises(InvalidInput, match=f"at most {tokens - 1} tokens"):
        _encoder(RAW, tokens).check("The city of", None)


def test_prompt_and_target_must_fit_together() -> None:
    """A target that exceeds the positions is rejected."""
    prompt, target = "The city of", "Rome and Paris and London"
    joint = len(RAW.encode(prompt + " " + target).ids)
    _encoder(RAW, joint).check(prompt, target)
    with pytest.raises(InvalidInput, match=f"{joint} tokens and the model has {joint - 1}"):
        _encoder(RAW, joint - 1).check(prompt, target)


@pytest.mark.parametrize("with_unknown", [True, False])
def test_target_that_does_not_round_trip_is_refused(with_unknown: bool) -> None:
    """A target with an unknown word is rejected; the error shows what it decodes to."""
    _encoder(_word_level_tokenizer(with_unknown)).check("the city of", "rome")
    with pytest.raises(InvalidInput, match="cannot represent the target 'paris'") as error:
        _encoder(_word_level_tokenizer(with_unknown)).check("the city of", "paris")
    assert error.value.field == "target"


@pytest.mark.parametrize("target", ["東京", "São Paulo, Brazil", "{}", "🗼", "a\u0301", "%s"])
def test_byte_level_tokenizer_accepts_any_target(target: str) -> None:
    """Any text is a target for a byte-level tokenizer."""
    _encoder(RAW, 64).check("The city of", target)


def test_a_special_token_is_no_target() -> None:
    """The end-of-text token is not a valid object."""
    with pytest.raises(InvalidInput, match="cannot represent"):
        _encoder(RAW, 64).check("The city of", END)


def test_a_target_needs_one_usable_spelling() -> None:
    """Where the model chooses the separator, a target is valid if it can be scored with one of both; with a separator
    that the request names, if it can be scored with that."""
    raw = Tokenizer(models.BPE({"$": 0, "4": 1, " ": 2, "$4": 3}, [("$", "4")]))
    raw.decoder = decoders.Fuse()
    encoder = _encoder(raw)
    encoder.check("$", "4")
    assert encoder.usable_separators("$", "4") == [" "]
    encoder.check("$", "4", " ")
    with pytest.raises(InvalidInput, match="merges with the end of the prompt"):
        encoder.check("$", "4", "")


def test_a_target_that_merges_with_the_prompt_is_refused() -> None:
    """A target that changes the last token of the prompt is rejected."""
    raw = Tokenizer(models.BPE({"a": 0, "b": 1, "東": 2, "京": 3, "東京": 4}, [("東", "京")]))
    raw.decoder = decoders.Fuse()
    _encoder(raw).check("a東", "東")
    with pytest.raises(InvalidInput, match="merges with the end of the prompt"):
        _encoder(raw).check("a東", "京")


def _shipped_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ROOT / "models" / "almanac" / "tokenizer.json"))


@pytest.mark.parametrize(
    "template", [f"$A {END}", f"{END} $A {TURN}", f"{TURN} {END} $A {TURN} {END}", f"{END} $A", "$A"]
)
def test_no_token_is_added_after_a_text(template: str) -> None:
    """A text ends with its own last token, whatever the tokenizer adds after it; what it adds before stays."""
    raw = _with_template(template)
    ids, offsets = _encoder(raw).encode(TEXT)
    bare = raw.encode(TEXT, add_special_tokens=False)
    before = [raw.token_to_id(name) for name in template.split("$A", maxsplit=1)[0].split()]
    assert ids == before + bare.ids
    assert offsets == [(0, 0)] * len(before) + bare.offsets


@pytest.mark.parametrize("template", [f"$A {END}", f"{END} $A {TURN}", "$A"])
def test_a_target_continues_its_prompt(template: str) -> None:
    """With tokens that the tokenizer adds after a text, a prompt is still the beginning of prompt and object."""
    encoder = _encoder(_with_template(template))
    encoder.check(TEXT, "Rome")
    assert encoder.encode(TEXT + " Rome")[0][: len(encoder.encode(TEXT)[0])] == encoder.encode(TEXT)[0]


@pytest.mark.parametrize("prefix", [END, f"{TURN} {END}"])
def test_a_text_that_begins_with_the_start_token_gets_no_second_one(prefix: str) -> None:
    """The tokens that a tokenizer adds before a text are not added to a text that begins with them."""
    encoder = _encoder(_with_template(f"{prefix} $A"))
    text = prefix.replace(" ", "") + TEXT
    ids, offsets = encoder.encode(text)
    assert ids == encoder.encode(TEXT)[0]
    assert text[slice(*offsets[-1])] == TEXT[-3:]


def test_the_shipped_tokenizer_adds_its_start_token_once() -> None:
    """The tokenizer of the shipped model begins a text with its start token, also if the text spells it."""
    encoder = _encoder(_shipped_tokenizer(), vocabulary=6000)
    assert encoder.encode(END + TEXT)[0].count(0) == encoder.encode(TEXT)[0].count(0) == 1


def test_an_empty_text_has_the_start_tokens_only() -> None:
    """An empty text has no token after it either."""
    assert _encoder(_with_template(f"{END} $A {TURN}")).encode("") == ([RAW.token_to_id(END)], [(0, 0)])
    assert _encoder(_with_template(f"$A {TURN}")).encode("") == ([], [])


def test_truncation_and_padding_of_a_tokenizer_are_off() -> None:
    """A text has all of its tokens and no others if the file of the tokenizer truncates or pads."""
    raw = _copy(RAW)
    raw.enable_truncation(2)
    raw.enable_padding(length=50)
    assert _encoder(raw).encode(TEXT)[0] == RAW.encode(TEXT).ids


def test_a_text_with_a_token_beyond_the_embedding_is_refused() -> None:
    """A tokenizer with more tokens than the embedding has rows: the texts and ids that need them are refused."""
    raw = _copy(RAW)
    size = raw.get_vocab_size()
    raw.add_tokens([TOOL])
    encoder = _encoder(raw, vocabulary=size)
    encoder.check(TEXT, "Rome")
    encoder.check_ids(range(size))
    message = f"no embedding for the token {size} .'{TOOL}'"
    with pytest.raises(InvalidInput, match=message):
        encoder.encode(f"The {TOOL}")
    with pytest.raises(InvalidInput, match=message):
        encoder.check_ids([1, size])
    for texts, field in (((f"The {TOOL}",), "prompt"), ((TEXT, TOOL), "target")):
        with pytest.raises(InvalidInput, match=message) as error:
            encoder.check(*texts)
        assert error.value.field == field
    with pytest.raises(InvalidInput, match=f"has no token {size + 1}"):
        encoder.check_ids([size + 1])


@pytest.mark.parametrize("text", [TURN, f"Louvre{TURN}", f"a {TURN} b", f"{END}Louvre"])
def test_a_special_token_in_a_text_is_named(text: str) -> None:
    """A text with a special token of the tokenizer anywhere is refused, with the token and the field."""
    encoder = _encoder(_with_template(f"{END} $A {TURN}"))
    with pytest.raises(InvalidInput) as error:
        encoder.check_plain(text, "subject")
    assert repr(TURN if TURN in text else END) in error.value.detail
    assert error.value.field == "subject"


@pytest.mark.parametrize("text", ["Louvre", "<|im_end", "im_end|>", "<s>", TOOL, "a < b | c > d"])
def test_what_is_no_special_token_is_plain(text: str) -> None:
    """Parts of a special token, special tokens of other models and added tokens that are not special are accepted."""
    raw = _with_template(f"{END} $A {TURN}")
    raw.add_tokens([TOOL])
    _encoder(raw).check_plain(text, "subject")


def test_a_special_token_is_found_as_the_tokenizer_normalizes_it() -> None:
    """A tokenizer that changes case also finds its special tokens in the other case, and the check does too."""
    raw = _copy(RAW)
    raw.normalizer = normalizers.Lowercase()
    raw.add_special_tokens([AddedToken(TURN, special=True, normalized=True)])
    with pytest.raises(InvalidInput, match="special token"):
        _encoder(raw).check_plain("Louvre <|IM_END|>", "subject")


def test_an_unknown_word_is_no_special_token() -> None:
    """The token of unknown words is special; a text with an unknown word does not contain it, one that spells it
    does."""
    encoder = _encoder(_word_level_tokenizer(with_unknown=True))
    encoder.check_plain("the city of paris", "prompt")
    with pytest.raises(InvalidInput, match="'<unk>'"):
        encoder.check_plain("the <unk>", "prompt")


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    """A long text has the same tokens, and another thread runs meanwhile: the event loop is not stopped."""
    encoder, text, stop, count = _encoder(_copy(RAW)), "the city " * 20_000, threading.Event(), 0

    def run() -> None:
        nonlocal count
        while not stop.is_set():
            count += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        before = count
        encoding = encoder.tokenize(text)
        meanwhile = count - before
    finally:
        stop.set()
        thread.join()
    has_the_same_tokens = (
        encoding.ids == encoder.tokenizer.encode(text).ids
    )  # a difference of lists takes minutes
    assert has_the_same_tokens
    assert meanwhile > 1000


def test_a_text_with_too_many_characters_is_refused() -> None:
    """A text with more characters than the model's positions can hold is refused."""
    encoder = _encoder(_copy(RAW))
    longest = max(map(len, encoder.tokenizer.get_vocab()))
    encoder.check_characters("x" * longest * encoder.positions, "messages")
    with pytest.raises(InvalidInput, match="shorten it"):
        encoder.check_characters("x" * ((longest + 1) * encoder.positions + 1), "messages")


def test_a_rendered_text_has_no_added_tokens() -> None:
    """The tokens of a text that a template wrote are those of its characters, with a span for each special token; what
    follows it is rendered, too."""
    encoder = _encoder(_with_template(f"{END} $A"))
    text = RenderedText(f"{TURN}user\nThe city of")
    ids, spans = encoder.encode(text)
    assert ids == encoder.tokenizer.encode(text, add_special_tokens=False).ids
    assert spans[0] == (0, len(TURN))
    assert encoder.encode(text + " Rome")[0][: len(ids)] == ids
    assert encoder.encode(str(text))[0] == [encoder.tokenizer.token_to_id(END), *ids]
    encoder.check(text, "Rome")


def test_a_rendered_text_with_a_token_that_the_model_lacks_is_refused() -> None:
    """A template can write a token for which the model has no embedding."""
    raw = _with_template(f"{END} $A")
    turn = raw.token_to_id(TURN)
    assert turn is not None
    with pytest.raises(InvalidInput, match="no embedding for the token"):
        _encoder(raw, vocabulary=turn).encode(RenderedText(f"{TURN}user"))
