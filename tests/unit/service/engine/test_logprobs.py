"""Log-probabilities of outputs and prompts, compared with one forward pass over the whole text without a
cache: service.engine.logprobs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine import logprobs
from service.engine.decoding import DecodingBatch, DecodingSequence, new_sequences
from service.engine.logprobs import MIN_LOGPROB, TokenLogprob, measure_logprobs, to_openai
from service.models.loading import LoadedModel
from service.models.token_text import TokenTextCache
from service.schemas import WorkerGenerateRequest
from tests.support.tiny_models import MODEL_TYPES, tiny

torch.set_num_threads(1)

PROMPTS = ["The Eiffel Tower is located in the city of", "Big Ben", "São Paulo 🗼 lies in"]


def logprob_request(**changes: Any) -> WorkerGenerateRequest:
    fields = {"prompts": PROMPTS, "max_new_tokens": 6, "logprobs": 3, **changes}
    return WorkerGenerateRequest(**fields)


def decode_all(model: LoadedModel, request: WorkerGenerateRequest) -> list[DecodingSequence]:
    sequences = new_sequences(model, request)
    batch = DecodingBatch(model, sequences)
    while len(batch):
        batch.step()
    return sequences


def reported_logprobs(sequence: DecodingSequence) -> dict[str, Any]:
    assert sequence.logprob_recorder is not None
    return to_openai(sequence.logprob_recorder.until(sequence.emitted_chars))


def distribution(model: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return log p (T, V) of the token after each position of a text."""
    with torch.no_grad():
        log_p: torch.Tensor = model.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return log_p


def check_against_definition(model: LoadedModel, sequence: DecodingSequence, first: int) -> None:
    """Compare the log-probabilities of a sequence's tokens, from index `first` on, with the definition."""
    reported, expected = reported_logprobs(sequence), distribution(model, sequence.token_ids)
    for i, token in enumerate(sequence.token_ids[first:], first):
        if i == 0:
            assert (reported["token_logprobs"][0], reported["top_logprobs"][0]) == (None, None)
            continue
        log_p, position = expected[i - 1], i - first
        assert reported["tokens"][position] == model.token_text(token)
        assert reported["token_logprobs"][position] == pytest.approx(float(log_p[token]), abs=1e-4)
        best = {model.token_text(int(j)): float(p) for p, j in zip(*log_p.topk(3), strict=True)}
        best.setdefault(model.token_text(token), float(log_p[token]))
        assert reported["top_logprobs"][position] == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_output_logprobs_are_the_models_own(model_type: str, temperature: float) -> None:
    """Log-probabilities in a padded batch are those of the model at temperature 1, for any temperature and
    top_p."""
    model = tiny(model_type)
    for sequence in decode_all(model, logprob_request(temperature=temperature, top_p=0.9, seed=3)):
        assert sequence.output_ids
        assert len(reported_logprobs(sequence)["tokens"]) == len(sequence.output_ids)
        check_against_definition(model, sequence, len(sequence.prompt_ids))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("bos", [False, True])
def test_echoed_prompt_has_logprobs(model_type: str, bos: bool) -> None:
    """With `echo` the prompt's tokens come first; the first token of the text has no log-probability."""
    model = tiny(model_type, bos=bos)
    for sequence in decode_all(model, logprob_request(echo=True)):
        assert len(reported_logprobs(sequence)["tokens"]) == len(sequence.token_ids)
        check_against_definition(model, sequence, 0)


def test_max_new_tokens_zero_scores_the_prompt() -> None:
    """With max_new_tokens=0 the prompt is scored and returned, also if it fills all positions of the
    model."""
    model = tiny("gpt2")
    ids = [5 + i % 200 for i in range(model.max_positions)]
    (sequence,) = decode_all(model, logprob_request(prompts=None, tokens=[ids], max_new_tokens=0, echo=True))
    assert (sequence.output_ids, sequence.finish_reason) == ([], "length")
    check_against_definition(model, sequence, 0)
    assert sequence.text == model.decode(ids).rstrip("\ufffd")


def test_chunk_size_does_not_change_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunk size does not change the log-probabilities."""
    logits, tokens = torch.randn(7, 11), torch.arange(7)
    whole = measure_logprobs(logits, tokens, 4)
    monkeypatch.setattr(logprobs, "CHUNK", 3)
    assert measure_logprobs(logits, tokens, 4) == whole
    assert [len(one.top_logprobs) for one in measure_logprobs(logits, tokens, 50)] == [11] * 7


def test_zero_probability_has_a_finite_logprob() -> None:
    """A token of probability 0 has the finite log-probability MIN_LOGPROB."""
    (measurement,) = measure_logprobs(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]), 2)
    assert measurement == (MIN_LOGPROB, [(0, 0.0), (1, MIN_LOGPROB)])


def test_requesting_logprobs_does_not_change_the_output() -> None:
    """The tokens of a request do not depend on whether log-probabilities are requested."""
    model = tiny("gpt2")
    plain = decode_all(model, logprob_request(logprobs=None, temperature=1.0, seed=4))
    for changes in ({"logprobs": 0}, {"logprobs": 5, "echo": True}):
        assert [
            r.output_ids for r in decode_all(model, logprob_request(temperature=1.0, seed=4, **changes))
        ] == [r.output_ids for r in plain]


def test_sequence_prefilled_again_is_measured_once() -> None:
    """Sequences that are prefilled again after the loss of their cache report each token once."""
    model = tiny("gpt2")
    sequences = new_sequences(model, logprob_request(echo=True))
    batch = DecodingBatch(model, sequences)
    batch.step()
    batch.step()
    for single in batch.split():
        while len(single):
            single.step()
    for sequence in sequences:
        check_against_definition(model, sequence, 0)
        assert len(reported_logprobs(sequence)["tokens"]) == len(sequence.token_ids)


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 319), min_size=1, max_size=20),
    st.lists(st.sampled_from(["a", "e", " ", "in", "\ufffd"]), max_size=2),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_offsets_lead_to_the_tokens(ids: list[int], stop: list[str], echo: bool, seed: int) -> None:
    """For any output, the pieces concatenate to the text, the streamed log-probabilities equal the final
    ones, offsets never decrease, and each text token is at its offset."""
    model = tiny("gpt2")
    request = logprob_request(prompts=None, tokens=[ids], echo=echo, stop=stop, temperature=2.0, seed=seed)
    (sequence,) = new_sequences(model, request)
    recorder = sequence.logprob_recorder
    assert recorder is not None
    lines: list[TokenLogprob] = []
    batch, text = DecodingBatch(model, [sequence]), ""
    while len(batch):
        for output in batch.step():
            text += output.text
            lines += recorder.unsent(sequence.emitted_chars)
    assert text == sequence.text
    assert to_openai(lines) == reported_logprobs(sequence)
    assert all(a.text_offset <= b.text_offset for a, b in itertools.pairwise(lines))
    for line in lines:
        shown = not line.token.startswith("bytes:") and line.token != "<|endoftext|>"
        end = min(line.text_offset + len(line.token), len(text))  # a stop string may have cut the last token
        if shown:
            assert text[line.text_offset : end] == line.token[: end - line.text_offset]


@pytest.mark.parametrize("trims", [False, True])
def test_offsets_of_a_text_are_those_of_its_tokens(trims: bool) -> None:
    """In an echoed text each token is at its offset, whether or not the tokenizer's offsets include
    spaces."""
    model = tiny("gpt2")
    encode = model.encode

    def trimmed(text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, offsets = encode(text)
        cut = [(b - len(text[a:b].lstrip()), b) for a, b in offsets]
        return ids, cut if trims else offsets

    object.__setattr__(model, "encode", trimmed)
    for sequence, prompt in zip(
        decode_all(model, logprob_request(echo=True, max_new_tokens=1)), PROMPTS, strict=True
    ):
        lines = reported_logprobs(sequence)
        for token, at in list(zip(lines["tokens"], lines["text_offset"], strict=True))[
            : len(sequence.prompt_ids)
        ]:
            if not token.startswith("bytes:"):
                assert prompt[at : at + len(token)] == token


def test_choices_have_independent_seeds() -> None:
    """With independent seeds the choices of one prompt, or of equal prompts, differ. The first is that of a
    request for one choice."""
    model = tiny("gpt2")
    fields = {
        "temperature": 1.0,
        "seed": 7,
        "logprobs": None,
        "max_new_tokens": 10,
        "independent_seeds": True,
    }
    three = [r.output_ids for r in decode_all(model, logprob_request(prompts=PROMPTS[:1], n=3, **fields))]
    assert len({tuple(said) for said in three}) == 3
    assert three[:1] == [
        r.output_ids for r in decode_all(model, logprob_request(prompts=PROMPTS[:1], **fields))
    ]
    assert three == [
        r.output_ids for r in decode_all(model, logprob_request(prompts=PROMPTS[:1] * 3, **fields))
    ]
    (alike,) = {
        tuple(r.output_ids)
        for r in decode_all(
            model, logprob_request(prompts=PROMPTS[:1] * 3, **fields | {"independent_seeds": False})
        )
    }
    assert list(alike) == three[0]  # without it, a prompt in a list has the tokens that it has alone


def test_token_id_beyond_the_vocabulary_is_rejected() -> None:
    """A token id outside the vocabulary raises InvalidInput."""
    from service.errors import InvalidInput

    with pytest.raises(InvalidInput, match="no token 320"):
        new_sequences(tiny("gpt2"), logprob_request(prompts=None, tokens=[[320]]))


def test_tokens_of_one_spelling_are_reported_once() -> None:
    """Of two tokens with the same text the more probable one is reported; the sampled token is always
    reported."""

    class Alike(TokenTextCache):
        def __init__(self) -> None:
            pass

        def __call__(self, token: int) -> str:
            return "xxy"[token]

    report = logprobs.LogprobRecorder(Alike(), 2)
    report.record(2, 0, logprobs.TokenMeasurement(-3.0, [(1, -0.1), (0, -2.5)]))
    assert report.until(1)[0].top_logprobs == {"x": -0.1, "y": -3.0}
