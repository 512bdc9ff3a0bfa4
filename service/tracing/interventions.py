"""The scores that a trace has to find, and which of them causality gives for nothing (methods B.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.tracing.reference import SEVERABLE_KINDS, restoration_window
from service.tracing.trace_input import TraceInput

#: what is cut at the subject's last token -> the name of its cells: plain hidden ones when nothing is
CELL_NAME_BY_PATH = {"none": "hidden", "mlp": "mlp severed", "attn": "attn severed"}


class CorruptedRun(NamedTuple):
    """A corrupted run of one sample with one token exchanged. Those that share most stand together when sorted."""

    entry_layer: int
    source_kind: str
    held_kind: str
    severed: bool
    sample: int
    end_layer: int

    def clipped_at(self, layer: int) -> CorruptedRun:
        """What of it shows below a block: not yet where its window ends."""
        return self if self.end_layer <= layer else self._replace(end_layer=layer)

    def is_held(self, kind: str, layer: int) -> bool:
        """Whether the token's module output is held in a block; in the entry block that is how a window begins."""
        first = self.entry_layer + (self.source_kind == "hidden")
        return self.held_kind == kind and first <= layer < self.end_layer


@dataclass(frozen=True)
class TraceCell:
    """One score: which it is, and what its run has at its token."""

    name: str
    token: int
    layer: int
    source_kind: str  #: the kind whose entry state the token has after block `entry`
    entry_layer: int
    end_layer: int  #: in the blocks entry+1 .. until-1 the token's module output is held
    held_kind: str = ""  #: "mlp" or "attn"
    severed: bool = False  #: held at the corrupted run's value rather than the clean run's

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.token, self.layer

    def corrupted_run(self, sample: int, trace_input: TraceInput, layers: int) -> CorruptedRun:
        """Its run of one sample. In the last block, where no other token listens, holding is no matter."""
        until = (
            self.end_layer if self.token == trace_input.prompt_length - 1 else min(self.end_layer, layers - 1)
        )
        return CorruptedRun(self.entry_layer, self.source_kind, self.held_kind, self.severed, sample, until)

    def is_low(self, trace_input: TraceInput, layers: int) -> bool:
        """Nothing comes back: before the subject the runs agree; after the last attention no token listens."""
        return self.token < trace_input.subject[0] or (
            self.entry_layer == layers - 1 and self.token < trace_input.prompt_length - 1
        )


def restored_cell(kind: str, token: int, layer: int, window: int, layers: int) -> TraceCell:
    """A clean block output at one layer, or clean module outputs in a window of layers."""
    if kind == "hidden":
        return TraceCell(kind, token, layer, kind, layer, layer + 1)
    first, last = restoration_window(layer, window, layers)
    return TraceCell(kind, token, layer, kind, first, last, held_kind=kind)


def severed_cell(severed_kind: str, token: int, layer: int, layers: int) -> TraceCell:
    """A clean block output, with the token's MLPs (or attentions) as in the corrupted run in all layers.

    The noise being equal, up to the entry block that is what they are anyway.
    """
    return TraceCell(
        CELL_NAME_BY_PATH[severed_kind],
        token,
        layer,
        "hidden",
        layer,
        layers,
        held_kind=severed_kind,
        severed=True,
    )


def list_cells(
    trace_input: TraceInput, kinds: Sequence[str], window: int, severed: bool, layers: int
) -> list[TraceCell]:
    """Every cell of a trace once, those of one map and token together."""
    cells = [
        restored_cell(k, t, m, window, layers)
        for k in kinds
        for t in range(trace_input.prompt_length)
        for m in range(layers)
    ]
    if severed:
        last = trace_input.subject[1] - 1
        cells += [restored_cell("hidden", last, m, window, layers) for m in range(layers)]
        cells += [severed_cell(cut, last, m, layers) for cut in SEVERABLE_KINDS for m in range(layers)]
    return list(dict.fromkeys(cells))
