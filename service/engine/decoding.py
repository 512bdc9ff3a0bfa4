"""Batched decoding, one token for each sequence per step. Independent of versions, jobs and channels.

A batch is padded on the left, with positions that count real tokens, so that every architecture computes the same for a
padded sequence as for the sequence alone. Keys and values are cached (`kv_cache`). The inputs of the next step stay on
the device, so that a step waits for the device once, to read the sampled tokens. Finished sequences leave the batch;
another batch can be merged between two steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from service.engine import sampler
from service.engine.detokenizer import Detokenizer
from service.engine.kv_cache import BatchKVCache
from service.engine.logprobs import LogprobRecorder, TokenMeasurement, measure_logprobs
from service.errors import InvalidInput
from service.kit.text import RenderedText
from service.models.loading import LoadedModel
from service.models.prompt_routing import PromptRoute
from service.models.token_batch import pad
from service.schemas import Sampling, WorkerGenerateRequest

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False)
class DecodingSequence:
    """One prompt and its output. `output_ids` are the generated tokens, without the end-of-text token."""

    prompt_ids: list[int]
    sampling_params: Sampling
    max_new_tokens: int  #: most tokens to generate
    detokenizer: Detokenizer
    uniforms: list[float]  #: one for each token to generate; empty at temperature 0
    echo: str = ""  #: emitted before the output: the prompt, if requested
    logprob_recorder: LogprobRecorder | None = None  #: log-probabilities of its tokens, if requested
    end_ids: frozenset[int] = (
        frozenset()
    )  #: tokens that end it, beside those that end every text of the model
    output_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    echo_emitted: bool = False  #: whether the echo has been emitted
    caller: str = ""  #: of the call that it belongs to
    route: PromptRoute | None = (
        None  #: what is read with the prompt; it stays the same when a cache is rebuilt
    )

    @property
    def read_ids(self) -> list[int]:
        """The prompt as the model reads it."""
        return self.prompt_ids if self.route is None else self.route.insert(self.prompt_ids)

    @property
    def token_ids(self) -> list[int]:
        return self.read_ids + self.output_ids

    @property
    def statement_length(self) -> int:
        """The number of tokens that are read with the prompt."""
        return 0 if self.route is None else len(self.route.statement_ids)

    @property
    def max_length(self) -> int:
        """The positions that the sequence uses at its full length."""
        return self.statement_length + len(self.prompt_ids) + self.max_new_tokens

    @property
    def length(self) -> int:
        return self.statement_length + len(self.prompt_ids) + len(self.output_ids)

    def choose_route(self, model: LoadedModel) -> None:
        """Route the prompt by the version in place, before its first token. Raise InvalidInput if the prompt does not
        fit the model's positions together with the statement that is read with it."""
        self.route = model.routing.route(self.prompt_ids)
        if self.route is None:
            return
        left = model.max_positions - self.statement_length - len(self.prompt_ids)
        if left < min(1, self.max_new_tokens):
            raise InvalidInput(
                f"the prompt has {len(self.prompt_ids)} tokens, the statement of {self.route.edit}, which is read with it, "
                f"has {self.statement_length}, and the model has {model.max_positions} positions: shorten the prompt by "
                f"{min(1, self.max_new_tokens) - left} tokens.",
                "prompt",
            )
        self.max_new_tokens = min(self.max_new_tokens, left)

    @property
    def text(self) -> str:
        """The text emitted so far."""
        return (self.echo if self.echo_emitted else "") + self.detokenizer.text

    @property
    def emitted_chars(self) -> float:
        """Tokens that begin before this character are in the text. The last tokens may have no character of their
        own."""
        is_complete = self.finish_reason is not None and not self.detokenizer.stopped
        return math.inf if is_complete else len(self.text)

    @property
    def next_uniform(self) -> float:
        """The uniform number that samples the next token. A retried step uses the same number."""
        return self.uniforms[len(self.output_ids)] if self.uniforms else 0.0

    def append_token(
        self, token: int, eos_ids: frozenset[int], measurement: TokenMeasurement | None = None
    ) -> str:
        """Append a token and return the text that can be emitted now."""
        prefix = "" if self.echo_emitted else self.echo
        self.echo_emitted = True
        return prefix + self._append(token, eos_ids, measurement)

    def _append(self, token: int, eos_ids: frozenset[int], measurement: TokenMeasurement | None) -> str:
        if self.max_new_tokens == 0:  # only the prompt was requested
            return self.finish("length")
        if token in eos_ids or token in self.end_ids:
            return self.finish("stop")
        if self.logprob_recorder is not None and measurement is not None:
            self.logprob_recorder.record(
                token, len(self.echo) + self.detokenizer.start_offset(token), measurement
            )
        self.output_ids.append(token)
        text = self.detokenizer.push(token)
        if self.detokenizer.stopped:
            return text + self.finish("stop")
        if len(self.output_ids) >= self.max_new_tokens:
            return text + self.finish("length")
        return text

    def finish(self, reason: FinishReason) -> str:
        """Finish the sequence and return the text that was held back, which may complete a stop string."""
        remaining_text = self.detokenizer.flush()
        self.finish_reason = "stop" if reason == "length" and self.detokenizer.stopped else reason
        return remaining_text


def new_sequence(
    model: LoadedModel, prompt: str | Sequence[int], sampling_params: Sampling, choice: int = 0
) -> DecodingSequence:
    """Return a sequence for a prompt, routed by the version in place. Raises InvalidInput when the prompt does not fit
    the model's positions or vocabulary."""
    ids = model.encode(prompt)[0] if isinstance(prompt, str) else list(prompt)
    max_new_tokens = min(sampling_params.max_new_tokens, model.max_positions - len(ids))
    if not ids or max_new_tokens < min(1, sampling_params.max_new_tokens):
        raise InvalidInput(
            f"the prompt has {len(ids)} tokens and the model has {model.max_positions} positions: give it 1 to "
            f"{model.max_positions - 1} tokens.",
            "prompt",
        )
    if max(ids) >= model.vocabulary_size:
        model.text_encoder.check_ids(ids)
    detokenizer = Detokenizer(model.tokenizer, ids, sampling_params.stop)
    seed = sampler.choice_seed(sampling_params.seed, choice)
    uniforms = sampler.uniforms(seed, max_new_tokens) if sampling_params.temperature > 0 else []
    sequence = DecodingSequence(ids, sampling_params, max_new_tokens, detokenizer, uniforms)
    if isinstance(prompt, RenderedText) and model.chat_format is not None:
        sequence.end_ids = frozenset(model.chat_format.end_token_ids)
    sequence.choose_route(model)
    return sequence


def new_sequences(model: LoadedModel, request: WorkerGenerateRequest) -> list[DecodingSequence]:
    """Return a sequence for each requested choice; the choices of one prompt are adjacent."""
    prompts = [p for p in request.prompts_or_ids() for _ in range(request.n)]
    sequences = [
        _choice_sequence(model, p, request, i if request.independent_seeds else 0)
        for i, p in enumerate(prompts)
    ]
    for sequence in sequences:
        sequence.end_ids = frozenset(request.end_token_ids)
    return sequences


def _choice_sequence(
    model: LoadedModel, prompt: str | Sequence[int], request: WorkerGenerateRequest, choice: int
) -> DecodingSequence:
    sequence, prompt_offsets = new_sequence(model, prompt, request, choice), list[tuple[int, int]]()
    if request.echo:
        sequence.echo, starts = _prompt_text_and_offsets(model, prompt)
        prompt_offsets = list(zip(sequence.prompt_ids, starts, strict=True))
    if request.logprobs is not None:
        sequence.logprob_recorder = LogprobRecorder(model.token_text, request.logprobs, prompt_offsets)
    return sequence


def _prompt_text_and_offsets(model: LoadedModel, prompt: str | Sequence[int]) -> tuple[str, list[int]]:
    """Return a prompt as text, and the character at which each of its tokens begins."""
    starts: list[int] = []
    if isinstance(prompt, str):
        end = 0
        for start, after in model.encode(prompt)[1]:
            # a token begins where the previous one ends, even if the tokenizer reports it after its space, or inside a
            # character that it shares with the previous one
            starts.append(max(min(start, end), starts[-1] if starts else 0))
            end = max(end, after)
        return prompt, starts
    detokenizer = Detokenizer(model.tokenizer, [])
    for token in prompt:
        starts.append(detokenizer.start_offset(token))
        detokenizer.push(token)
    detokenizer.flush()
    return detokenizer.text, starts


def eos_token_ids(model: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text, of the generation configuration, the configuration and the tokenizer."""
    sources = (getattr(model.model, "generation_config", None), model.model.config, model.tokenizer)
    token_ids: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        token_ids.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(token_ids)


@dataclass(frozen=True)
class TokenOutput:
    """The text that one step emitted for one sequence."""

    sequence: DecodingSequence
    text: str


class DecodingInputs:
    """The inputs of a step, on the model's device. From one step to the next nothing is copied from the host."""

    def __init__(self, model: LoadedModel, sequences: Sequence[DecodingSequence], prefilled: bool) -> None:
        """Take all tokens of the sequences, or the last ones where the others have been prefilled."""
        lengths = [r.length for r in sequences]
        self._width, self._equal_lengths = max(lengths), len(set(lengths)) == 1
        ids = [
            r.token_ids[-1:] if prefilled else [0] * (self._width - r.length) + r.token_ids for r in sequences
        ]
        self.ids = sampler.to_device_async(ids, torch.long, model.device)
        self.sampler = sampler.Sampler([r.sampling_params for r in sequences], model.device)
        self._lengths = sampler.to_device_async(lengths, torch.long, model.device)[:, None]
        self._window = getattr(model.model.config, "sliding_window", None)
        self._positions_from_mask = model.architecture.positions_from_mask
        self._dtype: torch.dtype = model.model.dtype

    @property
    def positions(self) -> Tensor:
        """(B, n): the position in its sequence of each of `ids`."""
        return (self._lengths - self._width + self._columns()).clamp(min=0)

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, n, T), to be added to the attention scores; None when every sequence has a token in every column.

        It is (B, T), the columns that hold tokens, for a model that computes positions from it, and with a sliding
        window shorter than the batch, which transformers adds.
        """
        if self._equal_lengths:
            return None
        columns = torch.arange(self._width, device=self.ids.device)
        visible = columns >= self._width - self._lengths
        if self._positions_from_mask:
            return visible.long()
        if self._window is not None and self._width > self._window:
            return visible
        visible = visible[:, None, None] & (columns <= self._columns()[:, None])
        return torch.zeros_like(visible, dtype=self._dtype).masked_fill(
            ~visible, torch.finfo(self._dtype).min
        )

    def _columns(self) -> Tensor:
        """(n,): the columns of `ids` among the T columns of the batch."""
        return torch.arange(self._width - self.ids.shape[1], self._width, device=self.ids.device)

    def advance(self, tokens: Tensor) -> None:
        """Set the tokens (B,) as the inputs of the next step."""
        self.ids, self._lengths, self._width = tokens[:, None], self._lengths + 1, self._width + 1


class DecodingBatch:
    """Sequences that decode together."""

    def __init__(self, model: LoadedModel, sequences: Iterable[DecodingSequence]) -> None:
        self.model = model
        self.sequences = list(sequences)
        self._eos_ids = eos_token_ids(model)
        self._cache: BatchKVCache | None = None  # of all tokens but the last of each sequence
        self._next_inputs: DecodingInputs | None = None  # of the next step, while the sequences stay the same

    def __len__(self) -> int:
        return len(self.sequences)

    @torch.inference_mode()
    def step(self) -> list[TokenOutput]:
        """Sample one token for every sequence. Finished sequences leave the batch."""
        self.drop_finished()
        if not self.sequences:
            return []
        sampled = self._decode()
        outputs = [
            TokenOutput(r, self._append_token(r, *d)) for r, d in zip(self.sequences, sampled, strict=True)
        ]
        self.drop_finished()
        return outputs

    @torch.inference_mode()
    def drop_finished(self) -> None:
        """Remove finished sequences. The last sequences take their places."""
        count = len(self.sequences)
        kept_count = sum(r.finish_reason is None for r in self.sequences)
        if kept_count == count:
            return
        holes = [i for i in range(kept_count) if self.sequences[i].finish_reason is not None]
        movers = [i for i in range(kept_count, count) if self.sequences[i].finish_reason is None]
        for hole, mover in zip(holes, movers, strict=True):
            self.sequences[hole] = self.sequences[mover]
        self.sequences, self._next_inputs = self.sequences[:kept_count], None
        if not kept_count:
            self._cache = None
        elif self._cache is not None:
            width = max(r.length for r in self.sequences) - 1
            self._update_cache(lambda cache: cache.compact(kept_count, holes, movers, width))

    @torch.inference_mode()
    def merge(self, other: DecodingBatch) -> None:
        """Add the sequences of another batch of the same model that has been stepped."""
        if not other.sequences:
            return
        if not self.sequences:
            self._cache = other._cache
        elif self._cache is None or other._cache is None:
            self._cache = None  # prefilled again at the next step
        else:
            theirs = other._cache
            self._update_cache(lambda cache: cache.merge(theirs))
        self.sequences, self._next_inputs = self.sequences + other.sequences, None
        other.sequences, other._cache, other._next_inputs = [], None, None

    def split(self) -> list[DecodingBatch]:
        """Return a batch for each sequence, without a cache, to retry a failed step."""
        batches = [DecodingBatch(self.model, [r]) for r in self.sequences]
        self.sequences, self._cache, self._next_inputs = [], None, None
        return batches

    def _update_cache(self, change: Callable[[BatchKVCache], None]) -> None:
        """Change the cache with the sequences. Without memory for that, all sequences are prefilled again at the next
        step."""
        assert self._cache is not None
        try:
            change(self._cache)
        except RuntimeError:
            log.exception("cache lost", extra={"rows": len(self.sequences)})
            self._cache = None

    def _decode(self) -> list[tuple[int, TokenMeasurement | None]]:
        """Return a token for each sequence, and its measurement if requested. The cache then holds all tokens but
        these."""
        cache, inputs = self._cache, self._next_inputs
        self._cache = self._next_inputs = None  # a failed pass leaves no partly written cache
        if cache is None:
            cache = BatchKVCache()
        uniforms = sampler.to_device_async(
            [r.next_uniform for r in self.sequences], torch.float64, self.model.device
        )
        if inputs is None:
            inputs = DecodingInputs(self.model, self.sequences, len(cache) > 0)
        unmeasured = [
            i
            for i, r in enumerate(self.sequences)
            if r.logprob_recorder is not None and r.logprob_recorder.unmeasured_prompt
        ]
        all_logits = self.model.model(
            input_ids=inputs.ids,
            attention_mask=inputs.mask,
            position_ids=inputs.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if unmeasured else 1,  # 0 keeps all
        ).logits
        logits = all_logits[:, -1]
        tokens = inputs.sampler(logits, uniforms)
        inputs.advance(tokens)
        token_ids: list[int] = tokens.tolist()
        for i in unmeasured:
            self._measure_prompt(self.sequences[i], all_logits[i])
        measurements = self._measure_tokens(logits, tokens)
        self._cache, self._next_inputs = cache, inputs
        return list(zip(token_ids, measurements, strict=True))

    def _measure_tokens(self, logits: Tensor, tokens: Tensor) -> list[TokenMeasurement | None]:
        """Return the measurements of the tokens (B,) for the sequences that report log-probabilities."""
        measurements: list[TokenMeasurement | None] = [None] * len(self.sequences)
        if top_by_row := {
            i: r.logprob_recorder.top for i, r in enumerate(self.sequences) if r.logprob_recorder is not None
        }:
            rows = sampler.to_device_async(list(top_by_row), torch.long, self.model.device)
            # A sequence without a valid token ends, but its index must be valid here.
            drawn = tokens[rows].clamp(min=0)
            measured = measure_logprobs(logits[rows], drawn, max(top_by_row.values()))
            for i, measurement in zip(top_by_row, measured, strict=True):
                measurements[i] = measurement
        return measurements

    def _measure_prompt(self, sequence: DecodingSequence, logits: Tensor) -> None:
        """Record the log-probabilities of a prompt, from the logits (T, V) of all columns, which end with its
        tokens."""
        assert sequence.logprob_recorder is not None
        prompt = sampler.to_device_async(
            sequence.logprob_recorder.unmeasured_prompt, torch.long, self.model.device
        )
        begin = len(logits) - sequence.length + sequence.statement_length
        prompt_logits = logits[begin : begin + len(prompt) - 1]
        sequence.logprob_recorder.record_prompt(
            measure_logprobs(prompt_logits, prompt[1:], sequence.logprob_recorder.top)
        )

    def _append_token(
        self, sequence: DecodingSequence, token: int, measurement: TokenMeasurement | None
    ) -> str:
        """Append a token to one sequence. An error here ends only this sequence."""
        if token == sampler.INVALID_TOKEN:
            return sequence.finish("error")
        try:
            return sequence.append_token(token, self._eos_ids, measurement)
        except Exception:
            log.exception("sequence failed", extra={"tokens": len(sequence.output_ids)})
            sequence.finish_reason = "error"
            return ""


def next_token_distribution(model: LoadedModel, ids: Sequence[int]) -> Tensor:
    """Return the distribution (V,) of the token after `ids`, in float64 on the CPU, at temperature 1."""
    batch = pad([ids], model)
    with torch.no_grad():
        logits = model.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
            logits_to_keep=1,
        ).logits[0, -1]
    p: Tensor = logits.cpu().double().softmax(-1)
    return p
