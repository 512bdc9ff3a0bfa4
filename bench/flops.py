"""Floating-point operations: counted as they happen, and the least that an edit or a trace is known to need.

The bounds follow methods B.6 and G for blocks of the GPT-2 and GPT-J kind (four square matrices in the attention, two in the
MLP): what causality makes constant is run once, what nobody reads not at all, and what several cells share once. They
are of one request alone: of what several requests could share nothing is taken off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from service.editing.value_optimizer import Rows
from service.models.loading import LoadedModel
from service.tracing.interventions import Cell
from service.tracing.trace_input import Question

T = TypeVar("T")


def counted(work: Callable[[], T]) -> tuple[T, int]:
    """What it gives, and the operations of its matrix products. The fused attention of a CPU is not counted, so the plain one runs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


def avoided(theirs: float, ours: float, bound: float) -> float:
    """Of the work that need not be done, the fraction that is not."""
    return (theirs - ours) / (theirs - bound)


@dataclass(frozen=True)
class Cost:
    """Operations of one token, from a model's shape."""

    layers: int
    width: int  #: d
    inner: int  #: D
    vocabulary: int

    @classmethod
    def of(cls, model: LoadedModel) -> Cost:
        return cls(model.layers, model.width, model.inner_width, int(model.head.weight.shape[0]))  # type: ignore[index,union-attr]

    @property
    def square(self) -> int:
        """Through one square matrix of the attention."""
        return 2 * self.width**2

    @property
    def mlp(self) -> int:
        return 4 * self.width * self.inner

    @property
    def heard(self) -> int:
        """What a token gives the others of a block: its key and its value."""
        return 2 * self.square

    @property
    def attend(self) -> int:
        """Its query, and what its attention comes out through."""
        return 2 * self.square

    @property
    def block(self) -> int:
        """Through all matrices of a block."""
        return self.heard + self.attend + self.mlp

    @property
    def head(self) -> int:
        return 2 * self.width * self.vocabulary

    def attention(self, first: int, count: int) -> int:
        """Looking back: `count` tokens from position `first` on, each at all up to itself."""
        return 4 * self.width * sum(range(first + 1, first + count + 1))

    def span(self, first: int, count: int) -> int:
        """`count` tokens from position `first` on through one block."""
        return count * self.block + self.attention(first, count)

    def top(self, first: int, count: int, read: int) -> int:
        """The same through the last block, of whose tokens only the last `read` are read."""
        alone = read * (self.block - self.heard) + self.attention(first + count - read, read)
        return count * self.heard + alone


def edit_bound(cost: Cost, rows: Rows, layer: int, steps: int) -> int:
    """An edit of one layer whose optimisation takes `steps` forward passes and one backward pass fewer (methods G).

    Once: all tokens up to the edited layer, and above it those before the subject's last. In every pass: the others, above the
    edited layer. A backward pass is counted as a forward one.
    """
    above = cost.layers - 1 - layer
    reads = [
        *map(len, rows.targets),
        1,
    ]  # the last where the subject stands bare, if that is a text of its own
    once, each = 0, (cost.head if rows.essence == 0 else 0)
    for text, n in zip(rows.texts(), reads, strict=False):
        size, before = len(text.ids), text.last_subject
        once += (layer + 1) * cost.span(0, size)
        if above:
            once += (above - 1) * cost.span(0, before) + before * cost.heard
            each += (above - 1) * cost.span(before, size - before) + cost.top(before, size - before, n)
        each += n * cost.head
    return once + (2 * steps - 1) * each


def trace_bound(cost: Cost, q: Question, cells: Sequence[Cell], parallel: bool = False) -> int:
    """A trace's cells (methods B.6).

    Once: the clean run, and the corrupted ones from the subject on. For each token and layer: the rows that differ below the
    block, from the token on. Those that begin to differ within it, because a window ends there, differ in it at that
    token alone, and a module whose output is held does not run for it.
    """
    begin, size, n = q.subject[0], len(q.ids), len(q.answer_ids)
    run = (cost.layers - 1) * cost.span(begin, size - begin) + cost.top(begin, size - begin, n)
    work = cost.layers * cost.span(0, begin) + (1 + q.samples) * (run + n * cost.head)
    groups: dict[tuple[str, int], list[Cell]] = {}
    for c in cells:
        if not c.is_low(q, cost.layers):
            groups.setdefault((c.name, c.token), []).append(c)
    return work + q.samples * sum(_sweep(cost, q, group, parallel) for group in groups.values())


def _sweep(cost: Cost, q: Question, cells: Sequence[Cell], parallel: bool) -> int:
    """One sample of the cells of one map and token."""
    cell, n = cells[0], len(q.answer_ids)
    first, count, last = cell.token, len(q.ids) - cell.token, cost.layers - 1
    entries = {c.entry for c in cells}
    work = cost.mlp * len(entries) if cell.source == "attn" and not parallel else 0
    for layer in range(1, cost.layers):
        below: dict[tuple[int, int], set[bool]] = {}  # those alike below the block: is the token held in it?
        for c in cells:
            if c.entry < layer:
                below.setdefault((c.entry, min(c.until, layer)), set()).add(c.until > layer)
        read = min(n, count) if layer == last else count
        others = cost.top(first + 1, count - 1, min(read, count - 1))
        alone = [_alone(cost, cell.held, held, first, count > 1, parallel) for held in below.values()]
        work += len(below) * others + (sum(alone) if read == count else len(below) * cost.heard)
    # the token itself is read after the last block, or what is held in that block is no matter
    ends = {(c.entry, min(c.until, cost.layers if count <= n else last)) for c in cells}
    clean = cell.source == "hidden" and count <= n  # the last block's output put back is the clean run's own
    return work + n * cost.head * sum(not (clean and entry == last) for entry, _ in ends)


def _alone(cost: Cost, kind: str, held: set[bool], first: int, heard: bool, parallel: bool) -> int:
    """The token itself in one block, once or twice: with a module's output held, without, or both. Others may hear it."""
    free = False in held
    attend = cost.attend + cost.attention(first, 1)
    if kind == "mlp":
        return cost.heard + attend + free * cost.mlp
    if kind == "attn":
        times = 1 if parallel else len(held)
        return (heard or free) * cost.heard + free * attend + times * cost.mlp
    return cost.heard + attend + cost.mlp
