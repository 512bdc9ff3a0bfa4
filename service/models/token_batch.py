"""Tokenize statements and pad them to batches: right padding for index arithmetic, left padding for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from service.kit.separator import Separator, separator
from service.kit.text import Span, Statement, token_span
from service.models.loading import LoadedModel


@dataclass(frozen=True)
class TokenizedStatement:
    """One text as token ids; `subject` is the subject's token range [b, e)."""

    ids: list[int]
    subject: Span
    tokens_after: int = 0  #: the subject's tokens after the edited one, as far as it has so many

    @property
    def last_subject_index(self) -> int:
        return self.subject[1] - 1

    @property
    def edited_index(self) -> int:
        """The position of the subject's token whose key is edited: by default the last one."""
        return max(self.subject[0], self.last_subject_index - self.tokens_after)

    @property
    def ids_through_subject(self) -> list[int]:
        """The token ids up to the subject's last token: by causality a key depends on nothing else."""
        return self.ids[: self.subject[1]]

    def through_subject(self) -> TokenizedStatement:
        """Return the text up to the subject's last token."""
        return replace(self, ids=self.ids_through_subject)


@dataclass(frozen=True)
class PaddedBatch:
    """ids, mask, positions: (B, T) each; `lengths` counts the real tokens of each row."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    lengths: list[int]


def tokenize_statement(model: LoadedModel, statement: Statement, tokens_after: int = 0) -> TokenizedStatement:
    """Tokenize the whole text and locate the subject by character offsets."""
    ids, offsets = model.encode(statement.text)
    return TokenizedStatement(ids, token_span(offsets, statement.span), tokens_after)


def tokenize_prompt_and_target(
    model: LoadedModel, prompt: str, target: str, chosen: Separator | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt and of the object after it, from one joint tokenisation, with the chosen separator or
    the usual one. A prompt that the version in place routes has its statement, unless both exceed the positions."""
    text = prompt + (separator(prompt, target) if chosen is None else chosen) + target
    ids, offsets = model.encode(text)
    start = token_span(offsets, (len(prompt), len(text)))[0]
    route = model.routing.route(ids[:start])
    if route is None or len(ids) + len(route.statement_ids) > model.max_positions:
        return ids[:start], ids[start:]
    return route.insert(ids[:start]), ids[start:]


def pad(rows: Sequence[Sequence[int]], model: LoadedModel, side: str = "right") -> PaddedBatch:
    """Return rows of unequal length as one batch. Positions count the real tokens only, so padding does not shift
    them."""
    width = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    device = model.device
    return PaddedBatch(ids.to(device), mask.to(device), positions.to(device), [len(r) for r in rows])


def forward(model: LoadedModel, batch: PaddedBatch, last: int = 0) -> Tensor:
    """Return the logits (B, T, V) of a batch; with `last`, those of its last positions only: (B, last, V)."""
    return model.model(  # type: ignore[no-any-return]
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        logits_to_keep=last,
    ).logits
