"""Log-probabilities of answers and prompts, against the definition: one pass over the whole text, without a cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine import logprobs
from service.engine.decoding import Batch, Row, rows
from service.engine.logprobs import LEAST, columns, measure
from service.models.loading import LoadedModel
from service.models.token_text import Spelling
from service.schemas import SpeechRequest
from tests.support.tiny_models import MODEL_TYPES, tiny

torch.set_num_threads(1)

PROMPTS = ["The Eiffel Tower is located in the city of", "Big Ben", "São Paulo 🗼 lies in"]


def asked(**changes: Any) -> SpeechRequest:
    wishes = {"prompts": PROMPTS, "max_new_tokens": 6, "logprobs": 3, **changes}
    return SpeechRequest(**wishes)


def run(model: LoadedModel, request: SpeechRequest) -> list[Row]:
    made = rows(model, request)
    batch = Batch(model, made)
    while len(batch):
        batch.step()
    return made


def told(row: Row) -> dict[str, Any]:
    assert row.report is not None
    return columns(row.report.before(row.reach))


def distribution(model: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """log p (T, V) of what follows each token of a text."""
    with torch.no_grad():
        return model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def check(model: LoadedModel, row: Row, first: int) -> None:
    """What is told of a row's tokens from that one on is what the definition says."""
    said, expected = told(row), distribution(model, row.ids)
    for i, token in enumerate(row.ids[first:], first):
        if i == 0:
            assert (said["token_logprobs"][0], said["top_logprobs"][0]) == (None, None)
            continue
        there, at = expected[i - 1], i - first
        assert said["tokens"][at] == model.spelling(token)
        assert said["token_logprobs"][at] == pytest.approx(float(there[token]), abs=1e-4)
        best = {model.spelling(int(j)): float(p) for p, j in zip(*there.topk(3), strict=True)}
        best.setdefault(model.spelling(token), float(there[token]))
        assert said["top_logprobs"][at] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answers_tokens_have_the_models_own_probabilities(model_type: str, temperature: float) -> None:
    """Padded rows that decode together, drawn at any temperature and cut, tell the model's distribution at temperature 1."""
    model = tiny(model_type)
    for row in run(model, asked(temperature=temperature, top_p=0.9, seed=3)):
        assert row.said
        assert len(told(row)["tokens"]) == len(row.said)
        check(model, row, len(row.prompt))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bos", [False, True])
def test_an_echoed_prompt_is_measured(model_type: str, bos: bool) -> None:
    """With `echo` the prompt's tokens come first; the first of all has nothing before it and no probability."""
    model = tiny(model_type, bos=bos)
    for row in run(model, asked(echo=True)):
        assert len(told(row)["tokens"]) == len(row.ids)
        check(model, row, 0)


def test_a_prompt_can_be_measured_and_nothing_said() -> None:
    """No token is asked for: the prompt is read, measured and given back, though it fill all positions of the model."""
    model = tiny("gpt2")
    ids = [5 + i % 200 for i in range(model.positions)]
    (row,) = run(model, asked(prompts=None, tokens=[ids], max_new_tokens=0, echo=True))
    assert (row.said, row.finish_reason) == ([], "length")
    check(model, row, 0)
    assert row.text == model.decode(ids).rstrip("\ufffd")


def test_measuring_is_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many places are widened at a time changes nothing."""
    logits, tokens = torch.randn(7, 11), torch.arange(7)
    whole = measure(logits, tokens, 4)
    monkeypatch.setattr(logprobs, "CHUNK", 3)
    assert measure(logits, tokens, 4) == whole
    assert [len(one.best) for one in measure(logits, tokens, 50)] == [11] * 7


def test_what_cannot_be_is_a_number_too() -> None:
    """A token of probability 0 has a logarithm that JSON can say."""
    (found,) = measure(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), 2)
    assert found == (LEAST, [(0, 0.0), (1, LEAST)])


def test_to_ask_for_probabilities_changes_nothing_that_is_said() -> None:
    """The same request says the same whether it and its company tell their log-probabilities or not."""
    model = tiny("gpt2")
    plain = run(model, asked(logprobs=None, temperature=1.0, seed=4))
    for changes in ({"logprobs": 0}, {"logprobs": 5, "echo": True}):
        assert [r.said for r in run(model, asked(temperature=1.0, seed=4, **changes))] == [
            r.said for r in plain
        ]


def test_a_row_that_is_read_anew_is_measured_once() -> None:
    """Rows that lost their cache are read anew with what they have said, and tell every token once."""
    model = tiny("gpt2")
    made = rows(model, asked(echo=True))
    batch = Batch(model, made)
    batch.step()
    batch.step()
    for single in batch.split():
        while len(single):
            single.step()
    for row in made:
        check(model, row, 0)
        assert len(told(row)["tokens"]) == len(row.ids)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 319), min_size=1, max_size=20),
    st.lists(st.sampled_from(["a", "e", " ", "in", "\ufffd"]), max_size=2),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_offsets_lead_to_the_tokens(ids: list[int], stop: list[str], echo: bool, seed: int) -> None:
    """Whatever is said: pieces make the text, lines told piece by piece are all lines, offsets never fall, and a token that
    is text stands where its offset says."""
    model = tiny("gpt2")
    request = asked(prompts=None, tokens=[ids], echo=echo, stop=stop, temperature=2.0, seed=seed)
    (row,) = rows(model, request)
    batch, text, lines = Batch(model, [row]), "", []
    while len(batch):
        for said in batch.step():
            text += said.piece
            lines += row.report.news(row.reach)  # type: ignore[union-attr]
    assert text == row.text
    assert columns(lines) == told(row)
    assert all(a.at <= b.at for a, b in itertools.pairwise(lines))
    for line in lines:
        shown = not line.token.startswith("bytes:") and line.token != "<|endoftext|>"
        end = min(line.at + len(line.token), len(text))  # a stop string may have cut the last one
        if shown:
            assert text[line.at : end] == line.token[: end - line.at]


@pytest.mark.parametrize("trims", [False, True])
def test_offsets_of_a_text_are_those_of_its_tokens(trims: bool) -> None:
    """In an echoed text each token begins where the one before it ends, whether or not the tokenizer counts spaces."""
    model = tiny("gpt2")
    encode = model.encode

    def trimmed(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets = encode(text)
        cut = [(b - len(text[a:b].lstrip()), b) for a, b in offsets]
        return ids, cut if trims else offsets

    object.__setattr__(model, "encode", trimmed)
    for row, prompt in zip(run(model, asked(echo=True, max_new_tokens=1)), PROMPTS, strict=True):
        lines = told(row)
        for token, at in list(zip(lines["tokens"], lines["text_offset"], strict=True))[: len(row.prompt)]:
            if not token.startswith("bytes:"):
                assert prompt[at : at + len(token)] == token


def test_choices_are_answers_of_their_own() -> None:
    """Several answers to a prompt, or to prompts that are alike, are drawn apart; the first is what one alone would be."""
    model = tiny("gpt2")
    wish = {"temperature": 1.0, "seed": 7, "logprobs": None, "max_new_tokens": 10, "apart": True}
    three = [r.said for r in run(model, asked(prompts=PROMPTS[:1], choices=3, **wish))]
    assert len({tuple(said) for said in three}) == 3
    assert three[:1] == [r.said for r in run(model, asked(prompts=PROMPTS[:1], **wish))]
    assert three == [r.said for r in run(model, asked(prompts=PROMPTS[:1] * 3, **wish))]
    (alike,) = {tuple(r.said) for r in run(model, asked(prompts=PROMPTS[:1] * 3, **wish | {"apart": False}))}
    assert list(alike) == three[0]  # what `/generate` promises: a prompt in a list is as it is alone


def test_a_token_that_the_model_lacks_is_refused() -> None:
    """An id beyond the embeddings never reaches the device."""
    from service.errors import InvalidInput

    with pytest.raises(InvalidInput, match="no token 320"):
        rows(tiny("gpt2"), asked(prompts=None, tokens=[[320]]))


def test_spelled_alike_is_told_once() -> None:
    """Of two tokens with one spelling the more probable is told; the token that was said is always there."""

    class Alike(Spelling):
        def __init__(self) -> None:
            pass

        def __call__(self, token: int) -> str:
            return "xxy"[token]

    report = logprobs.Report(Alike(), 2)
    report.take(2, 0, logprobs.Measured(-3.0, [(1, -0.1), (0, -2.5)]))
    assert report.before(1)[0].best == {"x": -0.1, "y": -3.0}
