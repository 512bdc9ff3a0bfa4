"""Floating-point operations: counts during execution, and lower bounds for an edit and a trace.

The bounds hold for blocks of the GPT-2 and GPT-J kind (four square matrices in the attention, two in the MLP). Work
that is constant because of causal attention is counted once, outputs that are not read are not counted, and work that
cells share is counted once. Sharing between requests is not considered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from service.editing.tokenized_contexts import TokenizedContexts
from service.models.loading import LoadedModel
from service.tracing.interventions import TraceCell
from service.tracing.trace_input import TraceInput

T = TypeVar("T")


def count_flops(work: Callable[[], T]) -> tuple[T, int]:
    """Return the result and the operations of its matrix products, with the math attention kernel, which is counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


def avoided_fraction(theirs: float, ours: float, bound: float) -> float:
    """Return the avoided fraction of the avoidable work."""
    return (theirs - ours) / (theirs - bound)


@dataclass(frozen=True)
class TokenCost:
    """Operations per token of a model."""

    layers: int
    width: int  #: d
    inner: int  #: D
    vocabulary: int

    @classmethod
    def from_model(cls, model: LoadedModel) -> TokenCost:
        return cls(
            model.num_layers,
            model.hidden_size,
            model.intermediate_size,
            model.lm_head.get_parameter("weight").shape[0],
        )

    @property
    def projection(self) -> int:
        """One square matrix of the attention."""
        return 2 * self.width**2

    @property
    def mlp(self) -> int:
        return 4 * self.width * self.inner

    @property
    def key_value(self) -> int:
        """The key and value projections."""
        return 2 * self.projection

    @property
    def query_output(self) -> int:
        """The query and output projections."""
        return 2 * self.projection

    @property
    def block(self) -> int:
        """All matrices of a block."""
        return self.key_value + self.query_output + self.mlp

    @property
    def head(self) -> int:
        return 2 * self.width * self.vocabulary

    def attention(self, first: int, count: int) -> int:
        """Causal attention of `count` tokens from position `first`, each over all positions up to its own."""
        return 4 * self.width * sum(range(first + 1, first + count + 1))

    def block_span(self, first: int, count: int) -> int:
        """One block for `count` tokens from position `first`."""
        return count * self.block + self.attention(first, count)

    def last_block(self, first: int, count: int, read: int) -> int:
        """The last block for `count` tokens, of which only the last `read` outputs are read."""
        alone = read * (self.block - self.key_value) + self.attention(first + count - read, read)
        return count * self.key_value + alone


def edit_bound(cost: TokenCost, rows: TokenizedContexts, layer: int, steps: int) -> int:
    """Return a lower bound for an edit of one layer with `steps` forward and `steps - 1` backward passes (ROME, Eq. 4).

    Once: all tokens up to the edited layer, and above it the tokens before the subject's edited one. In every pass: the
    other tokens above the edited layer. A backward pass is counted as a forward pass.
    """
    above = cost.layers - 1 - layer
    read_counts = [
        *map(len, rows.targets),
        1,
    ]  # 1 for the KL reference text, if it is a separate row
    fixed, per_pass = 0, (cost.head if rows.kl_reference_row == 0 else 0)
    for text, n in zip(rows.texts(), read_counts, strict=False):
        size, before = len(text.ids), text.edited_index
        fixed += (layer + 1) * cost.block_span(0, size)
        if above:
            fixed += (above - 1) * cost.block_span(0, before) + before * cost.key_value
            per_pass += (above - 1) * cost.block_span(before, size - before) + cost.last_block(
                before, size - before, n
            )
        per_pass += n * cost.head
    return fixed + (2 * steps - 1) * per_pass


def trace_bound(cost: TokenCost, q: TraceInput, cells: Sequence[TraceCell], parallel: bool = False) -> int:
    """Return a lower bound for the cells of a causal trace (Meng et al. 2022, Section 2).

    Once: the clean run, and the corrupted runs from the subject on. For each token and layer: the rows that differ
    below the block, from the token on. Rows that begin to differ within the block, because a window ends there, differ
    at that token only, and a module whose output is held does not run for it.
    """
    begin, size, n = q.subject[0], len(q.ids), len(q.answer_ids)
    run = (cost.layers - 1) * cost.block_span(begin, size - begin) + cost.last_block(begin, size - begin, n)
    work = cost.layers * cost.block_span(0, begin) + (1 + q.samples) * (run + n * cost.head)
    groups: dict[tuple[str, int], list[TraceCell]] = {}
    for c in cells:
        if not c.is_low(q, cost.layers):
            groups.setdefault((c.name, c.token), []).append(c)
    return work + q.samples * sum(_cell_group_flops(cost, q, group, parallel) for group in groups.values())


def _cell_group_flops(cost: TokenCost, q: TraceInput, cells: Sequence[TraceCell], parallel: bool) -> int:
    """Return the operations of one sample of the cells of one map and token."""
    cell, n = cells[0], len(q.answer_ids)
    first, count, last = cell.token, len(q.ids) - cell.token, cost.layers - 1
    entries = {c.entry_layer for c in cells}
    work = cost.mlp * len(entries) if cell.source_kind == "attn" and not parallel else 0
    for layer in range(1, cost.layers):
        below: dict[
            tuple[int, int], set[bool]
        ] = {}  # (entry, end) equal below the block -> whether the token is held in it
        for c in cells:
            if c.entry_layer < layer:
                below.setdefault((c.entry_layer, min(c.end_layer, layer)), set()).add(c.end_layer > layer)
        read = min(n, count) if layer == last else count
        others = cost.last_block(first + 1, count - 1, min(read, count - 1))
        token_flops = [
            _token_flops(cost, cell.held_kind, held, first, count > 1, parallel) for held in below.values()
        ]
        work += len(below) * others + (sum(token_flops) if read == count else len(below) * cost.key_value)
    # the token is read after the last block, or the output held in that block is not read
    ends = {(c.entry_layer, min(c.end_layer, cost.layers if count <= n else last)) for c in cells}
    clean = (
        cell.source_kind == "hidden" and count <= n
    )  # the restored output of the last block is that of the clean run
    return work + n * cost.head * sum(not (clean and entry == last) for entry, _ in ends)


def _token_flops(
    cost: TokenCost, kind: str, held: set[bool], first: int, has_later_tokens: bool, parallel: bool
) -> int:
    """Return the operations of the token in one block: with a module's output held, without, or both."""
    free = False in held
    attend = cost.query_output + cost.attention(first, 1)
    if kind == "mlp":
        return cost.key_value + attend + free * cost.mlp
    if kind == "attn":
        times = 1 if parallel else len(held)
        return (has_later_tokens or free) * cost.key_value + free * attend + times * cost.mlp
    return cost.key_value + attend + cost.mlp
