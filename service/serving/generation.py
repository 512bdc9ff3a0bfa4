"""Decoding, one token for each row at a time. Knows nothing of versions, jobs or channels.

A batch is left-padded, with positions that count real tokens, so that every architecture reads a padded row as it reads
the row alone. The cache is transformers' plain `DynamicCache`: keys and values (B, heads, T, size) of each layer, which
can be cut and joined along B and T. Rows that are done leave; another batch can join between two steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import DynamicCache

from service.errors import InvalidInput
from service.models.loading import LoadedModel
from service.models.prompts import pad
from service.requests import Sampling
from service.serving import sampling
from service.serving.detokenizer import Detokenizer

log = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False)
class Row:
    """One prompt and what was said after it. `said` are the tokens of the answer, without the end-of-text token."""

    prompt: list[int]
    asked: Sampling
    room: int  #: tokens that may be said
    voice: Detokenizer
    numbers: torch.Generator
    said: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.said

    @property
    def text(self) -> str:
        return self.voice.text

    def choose(self, logits: Tensor) -> int:
        """The next token from logits (V,)."""
        return sampling.choose(logits, self.asked, self.numbers)

    def take(self, token: int, ends: frozenset[int]) -> str:
        """Say a token; returns the text that can be shown now."""
        if token in ends:
            return self.finish("stop")
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


def row(model: LoadedModel, prompt: str, asked: Sampling) -> Row:
    """A prompt as a row of its own: its tokens, its room within the model's positions, its seed."""
    ids = model.encode(prompt)[0]
    room = min(asked.max_new_tokens, model.positions - len(ids))
    if not ids or room < 1:
        raise InvalidInput(
            f"the prompt has {len(ids)} tokens and the model has {model.positions} positions: give it 1 to "
            f"{model.positions - 1} tokens.",
            "prompt",
        )
    voice = Detokenizer(model.tokenizer, ids, asked.stop)
    return Row(ids, asked, room, voice, sampling.generator(asked.seed))


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


class Batch:
    """Rows that decode together."""

    def __init__(self, model: LoadedModel, rows: Iterable[Row]) -> None:
        self.model = model
        self.rows = list(rows)
        self._ends = end_tokens(model)
        self._cache: Any = None  # DynamicCache over all tokens but the last of each row
        self._mask: Tensor | None = None  # (B, T): the real tokens among those in the cache

    def __len__(self) -> int:
        return len(self.rows)

    def step(self) -> list[Said]:
        """Every row says one token. Rows that end leave the batch."""
        self.sweep()
        if not self.rows:
            return []
        logits = self._forward()
        peak, best = logits.max(-1)
        peaks, greedy = peak.tolist(), best.tolist()
        said = [Said(r, self._advance(r, logits[i], peaks[i], greedy[i])) for i, r in enumerate(self.rows)]
        self.sweep()
        return said

    def sweep(self) -> None:
        """Rows that have ended leave, and so do columns in which no row has a token."""
        keep = [i for i, r in enumerate(self.rows) if r.finish_reason is None]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        if self._mask is None or not keep:
            self._cache = self._mask = None
            return
        chosen = torch.tensor(keep, device=self._mask.device)
        mask = self._mask[chosen]
        cut = int(mask.any(0).int().argmax())  # first column with a token
        self._mask = mask[:, cut:]
        self._change(lambda states: states[chosen, :, cut:].contiguous())

    def join(self, other: Batch) -> None:
        """Take in the rows of a batch of the same model that has made a step."""
        if not other.rows:
            return
        if not self.rows:
            self.rows, self._cache, self._mask = other.rows, other._cache, other._mask
        elif self._mask is None or other._mask is None:
            self.rows, self._cache, self._mask = (
                self.rows + other.rows,
                None,
                None,
            )  # read anew at the next step
        else:
            self._append(other)
        other.rows, other._cache, other._mask = [], None, None

    def split(self) -> list[Batch]:
        """Each row in a batch of its own, to be read anew from its tokens: how a failed step is tried again."""
        alone = [Batch(self.model, [r]) for r in self.rows]
        self.rows, self._cache, self._mask = [], None, None
        return alone

    def _advance(self, r: Row, logits: Tensor, peak: float, greedy: int) -> str:
        """One row's token. What goes wrong here goes wrong for this row only."""
        if peak != peak:  # NaN anywhere makes the peak NaN
            return r.finish("error")
        try:
            return r.take(greedy if r.asked.temperature == 0 else r.choose(logits), self._ends)
        except Exception:
            log.exception("row failed", extra={"tokens": len(r.said)})
            r.finish_reason = "error"
            return ""

    def _forward(self) -> Tensor:
        """Logits (B, V) after the last token of each row; the cache then holds that token."""
        if self._mask is None:
            batch = pad([r.ids for r in self.rows], self.model, side="left")
            ids, mask, positions, cache = batch.ids, batch.mask, batch.positions, DynamicCache()
        else:
            ids = torch.tensor([[r.ids[-1]] for r in self.rows], device=self._mask.device)
            positions = self._mask.sum(1, keepdim=True)
            mask, cache = pad_tensor(self._mask, (0, 1), value=1), self._cache
        self._cache = self._mask = None  # a pass that fails leaves no half-written cache behind
        with torch.no_grad():
            logits = self.model.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        self._cache, self._mask = cache, mask
        return logits  # type: ignore[no-any-return]

    def _append(self, other: Batch) -> None:
        """Both caches as one: the narrower is padded on the left, where its mask is 0."""
        assert self._mask is not None and other._mask is not None
        wide = max(self._mask.shape[1], other._mask.shape[1])
        mine, theirs = wide - self._mask.shape[1], wide - other._mask.shape[1]
        self._mask = torch.cat([_left(self._mask, mine, 1), _left(other._mask, theirs, 1)])
        for layer, more in zip(self._cache.layers, other._cache.layers, strict=True):
            layer.keys = torch.cat([_left(layer.keys, mine, 2), _left(more.keys, theirs, 2)])
            layer.values = torch.cat([_left(layer.values, mine, 2), _left(more.values, theirs, 2)])
        self.rows = self.rows + other.rows

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for layer in self._cache.layers:
            layer.keys, layer.values = change(layer.keys), change(layer.values)


def _left(states: Tensor, count: int, dim: int) -> Tensor:
    """Zeros before the first entry along a dimension."""
    if not count:
        return states
    shape = list(states.shape)
    shape[dim] = count
    return torch.cat([states.new_zeros(shape), states], dim)


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
    return sampling.distribution(logits, 1.0)
