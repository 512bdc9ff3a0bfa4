"""The cells of a trace, the interventions that define them, and the cells whose score is known without computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.tracing.reference import SEVERABLE_KINDS, restoration_window
from service.tracing.trace_input import TraceInput

#: the path severed at the subject's last token -> the name of its cells; "none" are plain hidden cells
CELL_NAME_BY_PATH = {"none": "hidden", "mlp": "mlp severed", "attn": "attn severed"}


class CorruptedRun(NamedTuple):
    """A corrupted run of one noise sample with one token restored. Sorting places runs that share the most together."""

    entry_layer: int
    source_kind: str
    held_kind: str
    severed: bool
    sample: int
    end_layer: int

    def clipped_at(self, layer: int) -> CorruptedRun:
        """Return the run as far as the blocks below `layer` determine it: the deduplication key at that layer."""
        return self if self.end_layer <= layer else self._replace(end_layer=layer)

    def is_held(self, kind: str, layer: int) -> bool:
        """Return whether the token's module output is held in a block. A window begins in its entry block."""
        first = self.entry_layer + (self.source_kind == "hidden")
        return self.held_kind == kind and first <= layer < self.end_layer


@dataclass(frozen=True)
class TraceCell:
    """One score: its kind, token and layer, and the intervention at its token."""

    name: str
    token: int
    layer: int
    source_kind: str  #: the kind whose clean state the token has after block `entry_layer`
    entry_layer: int
    end_layer: int  #: the token's module output is held in blocks entry_layer + 1 .. end_layer - 1
    held_kind: str = ""  #: "mlp" or "attn"
    severed: bool = False  #: held at the corrupted value instead of the clean value

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.token, self.layer

    def corrupted_run(self, sample: int, trace_input: TraceInput, layers: int) -> CorruptedRun:
        """Return the cell's run of one sample. In the last block no other token attends, so holding has no effect
        there."""
        until = (
            self.end_layer if self.token == trace_input.prompt_length - 1 else min(self.end_layer, layers - 1)
        )
        return CorruptedRun(self.entry_layer, self.source_kind, self.held_kind, self.severed, sample, until)

    def is_low(self, trace_input: TraceInput, layers: int) -> bool:
        """Return whether the score equals the corrupted score: before all corrupted tokens, or after the last
        attention."""
        return self.token < trace_input.corrupted_tokens[0] or (
            self.entry_layer == layers - 1 and self.token < trace_input.prompt_length - 1
        )


def restored_cell(kind: str, token: int, layer: int, window: int, layers: int) -> TraceCell:
    """Return the cell that restores a block output at one layer, or module outputs in a window of layers."""
    if kind == "hidden":
        return TraceCell(kind, token, layer, kind, layer, layer + 1)
    first, last = restoration_window(layer, window, layers)
    return TraceCell(kind, token, layer, kind, first, last, held_kind=kind)


def severed_cell(severed_kind: str, token: int, layer: int, layers: int) -> TraceCell:
    """Return the cell that restores a block output and holds the token's MLPs (or attentions) at their corrupted
    values.

    Up to the entry block they have these values anyway, because the noise is the same.
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
