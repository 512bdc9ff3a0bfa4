"""Decoding, one token for each row at a time. Knows nothing of versions, jobs or channels.

A batch is padded on the left, with positions that count real tokens, so that every architecture reads a padded row as
it reads the row alone. Keys and values are kept (see `cache`); what the next step needs of them is on the device
already, so that a step waits for the device once: to learn the tokens that were said. Rows that are done leave; another
batch can join between two steps.
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
from service.engine.kv_cache import RowCache
from service.engine.logprobs import Measured, Report, measure
from service.errors import InvalidInput
from service.models.loading import LoadedModel
from service.models.token_batch import pad
from service.schemas import Sampling, SpeechRequest

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False)
class Row:
    """One prompt and what was said after it. `said` are the tokens of the answer, without the end-of-text token."""

    prompt: list[int]
    asked: Sampling
    room: int  #: tokens that may be said
    voice: Detokenizer
    numbers: list[float]  #: one for each token that may be said; none are needed at temperature 0
    echo: str = ""  #: what is given out before the answer: the prompt, where that is wanted
    report: Report | None = None  #: how probable its tokens are, where that is wanted
    said: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    opened: bool = False  #: whether the echo is given out

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.said

    @property
    def most(self) -> int:
        """Positions that it takes when it has said all it may."""
        return len(self.prompt) + self.room

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.said)

    @property
    def text(self) -> str:
        """All that was given out."""
        return (self.echo if self.opened else "") + self.voice.text

    @property
    def reach(self) -> float:
        """Tokens that begin before this character of the text are in it. The last ones may have no character of their own."""
        ended = self.finish_reason is not None and not self.voice.stopped
        return math.inf if ended else len(self.text)

    @property
    def uniform(self) -> float:
        """The number that the next token is drawn with. A step that is tried again draws the same."""
        return self.numbers[len(self.said)] if self.numbers else 0.0

    def take(self, token: int, ends: frozenset[int], found: Measured | None = None) -> str:
        """Say a token; returns the text that can be shown now."""
        opening = "" if self.opened else self.echo
        self.opened = True
        return opening + self._say(token, ends, found)

    def _say(self, token: int, ends: frozenset[int], found: Measured | None) -> str:
        if self.room == 0:  # the prompt was to be read and no more
            return self.finish("length")
        if token in ends:
            return self.finish("stop")
        if self.report is not None and found is not None:
            self.report.take(token, len(self.echo) + self.voice.begins(token), found)
        self.said.append(token)
        piece = self.voice.push(token)
        if self.voice.stopped:
            return piece + self.finish("stop")
        if len(self.said) >= self.room:
            return piece + self.finish("length")
        return piece

    def finish(self, reason: FinishReason) -> str:
        """End the row; returns the text that was held back. A stop string may still come to light in it."""
        rest = self.voice.end()
        self.finish_reason = "stop" if reason == "length" and self.voice.stopped else reason
        return rest


def row(model: LoadedModel, prompt: str | Sequence[int], asked: Sampling, choice: int = 0) -> Row:
    """A prompt as a row of its own: its tokens, its room within the model's positions, its seed."""
    ids = model.encode(prompt)[0] if isinstance(prompt, str) else list(prompt)
    room = min(asked.max_new_tokens, model.positions - len(ids))
    if not ids or room < min(1, asked.max_new_tokens):
        raise InvalidInput(
            f"the prompt has {len(ids)} tokens and the model has {model.positions} positions: give it 1 to "
            f"{model.positions - 1} tokens.",
            "prompt",
        )
    if max(ids) >= model.embedding.weight.shape[0]:  # type: ignore[index]
        raise InvalidInput(f"the model has no token {max(ids)}.", "prompt")
    voice = Detokenizer(model.tokenizer, ids, asked.stop)
    seed = sampler.seed_of(asked.seed, choice)
    numbers = sampler.uniforms(seed, room) if asked.temperature > 0 else []
    return Row(ids, asked, room, voice, numbers)


def rows(model: LoadedModel, request: SpeechRequest) -> list[Row]:
    """A row for each answer that is asked for: those to one prompt follow each other."""
    prompts = [p for p in request.spoken() for _ in range(request.choices)]
    return [_answer(model, p, request, i if request.apart else 0) for i, p in enumerate(prompts)]


def _answer(model: LoadedModel, prompt: str | Sequence[int], request: SpeechRequest, choice: int) -> Row:
    made, places = row(model, prompt, request, choice), list[tuple[int, int]]()
    if request.echo:
        made.echo, starts = _written(model, prompt)
        places = list(zip(made.prompt, starts, strict=True))
    if request.logprobs is not None:
        made.report = Report(model.spelling, request.logprobs, places)
    return made


def _written(model: LoadedModel, prompt: str | Sequence[int]) -> tuple[str, list[int]]:
    """A prompt as text, and the character at which each of its tokens begins."""
    starts: list[int] = []
    if isinstance(prompt, str):
        end = 0
        for start, after in model.encode(prompt)[1]:
            # a token begins where the one before it ends, also when it is said to begin after its space; or in the middle
            # of a character that it shares with that one
            starts.append(max(min(start, end), starts[-1] if starts else 0))
            end = max(end, after)
        return prompt, starts
    voice = Detokenizer(model.tokenizer, [])
    for token in prompt:
        starts.append(voice.begins(token))
        voice.push(token)
    voice.end()
    return voice.text, starts


def end_tokens(model: LoadedModel) -> frozenset[int]:
    """The tokens that end a text: those of the generation configuration, the configuration and the tokenizer."""
    sources = (getattr(model.model, "generation_config", None), model.model.config, model.tokenizer)
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


@dataclass(frozen=True)
class Said:
    """What one step gave one row: text to show, and whether the row has ended."""

    row: Row
    piece: str


class Inputs:
    """What the model reads in a step, on its device. From one step to the next it needs nothing from the host."""

    def __init__(self, model: LoadedModel, rows: Sequence[Row], read: bool) -> None:
        """All tokens of the rows, or the last ones where the others were read."""
        lengths = [r.length for r in rows]
        self._width, self._even = max(lengths), len(set(lengths)) == 1
        ids = [r.ids[-1:] if read else [0] * (self._width - r.length) + r.ids for r in rows]
        self.ids = sampler.sent(ids, torch.long, model.device)
        self.sampler = sampler.Sampler([r.asked for r in rows], model.device)
        self._lengths = sampler.sent(lengths, torch.long, model.device)[:, None]
        self._window = getattr(model.model.config, "sliding_window", None)
        self._dtype: torch.dtype = model.model.dtype

    @property
    def positions(self) -> Tensor:
        """(B, n): which of its row's tokens each of `ids` is."""
        return (self._lengths - self._width + self._columns()).clamp(min=0)

    @property
    def mask(self) -> Tensor | None:
        """(B, 1, n, T), to be added to attention's scores; none where every row has a token in every column.

        Where a window hides a part, transformers knows how: it is then told the columns that hold tokens, (B, T).
        """
        if self._even:
            return None
        columns = torch.arange(self._width, device=self.ids.device)
        seen = columns >= self._width - self._lengths
        if self._window is not None and self._width > self._window:
            return seen
        seen = seen[:, None, None] & (columns <= self._columns()[:, None])
        return torch.zeros_like(seen, dtype=self._dtype).masked_fill(~seen, torch.finfo(self._dtype).min)

    def _columns(self) -> Tensor:
        """(n,): the columns of `ids` among the T of their rows."""
        return torch.arange(self._width - self.ids.shape[1], self._width, device=self.ids.device)

    def follow(self, tokens: Tensor) -> None:
        """These tokens (B,) are what the model reads next."""
        self.ids, self._lengths, self._width = tokens[:, None], self._lengths + 1, self._width + 1


class Batch:
    """Rows that decode together."""

    def __init__(self, model: LoadedModel, rows: Iterable[Row]) -> None:
        self.model = model
        self.rows = list(rows)
        self._ends = end_tokens(model)
        self._cache: RowCache | None = None  # over all tokens but the last of each row
        self._next: Inputs | None = None  # what the next step begins with, while the rows stay the same

    def __len__(self) -> int:
        return len(self.rows)

    @torch.inference_mode()
    def step(self) -> list[Said]:
        """Every row says one token. Rows that end leave the batch."""
        self.sweep()
        if not self.rows:
            return []
        drawn = self._decode()
        said = [Said(r, self._advance(r, *d)) for r, d in zip(self.rows, drawn, strict=True)]
        self.sweep()
        return said

    @torch.inference_mode()
    def sweep(self) -> None:
        """Let the rows leave that have ended; the last rows take their places."""
        count = len(self.rows)
        kept = sum(r.finish_reason is None for r in self.rows)
        if kept == count:
            return
        holes = [i for i in range(kept) if self.rows[i].finish_reason is not None]
        movers = [i for i in range(kept, count) if self.rows[i].finish_reason is None]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        self.rows, self._next = self.rows[:kept], None
        if not kept:
            self._cache = None
        elif self._cache is not None:
            width = max(r.length for r in self.rows) - 1
            self._settle(lambda cache: cache.keep(kept, holes, movers, width))

    @torch.inference_mode()
    def join(self, other: Batch) -> None:
        """Take in the rows of a batch of the same model that has made a step."""
        if not other.rows:
            return
        if not self.rows:
            self._cache = other._cache
        elif self._cache is None or other._cache is None:
            self._cache = None  # read anew at the next step
        else:
            theirs = other._cache
            self._settle(lambda cache: cache.join(theirs))
        self.rows, self._next = self.rows + other.rows, None
        other.rows, other._cache, other._next = [], None, None

    def split(self) -> list[Batch]:
        """Each row in a batch of its own, to be read anew from its tokens: how a failed step is tried again."""
        alone = [Batch(self.model, [r]) for r in self.rows]
        self.rows, self._cache, self._next = [], None, None
        return alone

    def _settle(self, change: Callable[[RowCache], None]) -> None:
        """The cache follows the rows. Where there is no memory for it, all rows are read anew at the next step."""
        assert self._cache is not None
        try:
            change(self._cache)
        except RuntimeError:
            log.exception("cache lost", extra={"rows": len(self.rows)})
            self._cache = None

    def _decode(self) -> list[tuple[int, Measured | None]]:
        """A token for each row, and how probable it is where that is wanted; the cache then holds all tokens but these."""
        cache, now = self._cache, self._next
        self._cache = self._next = None  # a pass that fails leaves no half-written cache behind
        if cache is None:
            cache = RowCache()
        numbers = sampler.sent([r.uniform for r in self.rows], torch.float64, self.model.device)
        if now is None:
            now = Inputs(self.model, self.rows, len(cache) > 0)
        lacking = [i for i, r in enumerate(self.rows) if r.report is not None and r.report.lacks]
        every = self.model.model(
            input_ids=now.ids,
            attention_mask=now.mask,
            position_ids=now.positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if lacking else 1,  # 0 keeps all
        ).logits
        logits = every[:, -1]
        tokens = now.sampler(logits, numbers)
        now.follow(tokens)
        said: list[int] = tokens.tolist()
        for i in lacking:
            self._measure_prompt(self.rows[i], every[i])
        found = self._measure(logits, tokens)
        self._cache, self._next = cache, now
        return list(zip(said, found, strict=True))

    def _measure(self, logits: Tensor, tokens: Tensor) -> list[Measured | None]:
        """How probable the tokens (B,) are, of the rows that report it."""
        found: list[Measured | None] = [None] * len(self.rows)
        if told := {i: r.report.top for i, r in enumerate(self.rows) if r.report is not None}:
            which = sampler.sent(list(told), torch.long, self.model.device)
            measured = measure(logits[which], tokens[which], max(told.values()))
            for i, one in zip(told, measured, strict=True):
                found[i] = one
        return found

    def _measure_prompt(self, r: Row, logits: Tensor) -> None:
        """How probable a row's prompt is, from the logits (T, V) of all its columns, the last of which are its tokens."""
        assert r.report is not None
        prompt = sampler.sent(r.report.lacks, torch.long, self.model.device)
        begin = len(logits) - r.length
        there = logits[begin : begin + len(prompt) - 1]
        r.report.take_prompt(measure(there, prompt[1:], r.report.top))

    def _advance(self, r: Row, token: int, found: Measured | None) -> str:
        """One row's token. What goes wrong here goes wrong for this row only."""
        if token == sampler.NONE:
            return r.finish("error")
        try:
            return r.take(token, self._ends, found)
        except Exception:
            log.exception("row failed", extra={"tokens": len(r.said)})
            r.finish_reason = "error"
            return ""


def next_tokens(model: LoadedModel, ids: Sequence[int]) -> Tensor:
    """The distribution (V,) of the token after `ids`, in float64 on the CPU, at temperature 1."""
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
