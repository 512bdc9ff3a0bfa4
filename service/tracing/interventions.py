"""The scores that a trace has to find, and which of them causality gives for nothing (methods B.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from service.tracing.reference import CUTS, window_of
from service.tracing.trace_input import Question

#: what is cut at the subject's last token -> the name of its cells: plain hidden ones when nothing is
PATHS = {"none": "hidden", "mlp": "mlp severed", "attn": "attn severed"}


class Track(NamedTuple):
    """A corrupted run of one sample with one token exchanged. Those that share most stand together when sorted."""

    entry: int
    source: str
    held: str
    cut: bool
    sample: int
    until: int

    def below(self, layer: int) -> Track:
        """What of it shows below a block: not yet where its window ends."""
        return self if self.until <= layer else self._replace(until=layer)

    def holds(self, kind: str, layer: int) -> bool:
        """Whether the token's module output is held in a block; in the entry block that is how a window begins."""
        first = self.entry + (self.source == "hidden")
        return self.held == kind and first <= layer < self.until


@dataclass(frozen=True)
class Cell:
    """One score: which it is, and what its run has at its token."""

    name: str
    token: int
    layer: int
    source: str  #: the kind whose entry state the token has after block `entry`
    entry: int
    until: int  #: in the blocks entry+1 .. until-1 the token's module output is held
    held: str = ""  #: "mlp" or "attn"
    cut: bool = False  #: held at the corrupted run's value rather than the clean run's

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.token, self.layer

    def track(self, sample: int, q: Question, layers: int) -> Track:
        """Its run of one sample. In the last block, where no other token listens, holding is no matter."""
        until = self.until if self.token == q.length - 1 else min(self.until, layers - 1)
        return Track(self.entry, self.source, self.held, self.cut, sample, until)

    def is_low(self, q: Question, layers: int) -> bool:
        """Nothing comes back: before the subject the runs agree; after the last attention no token listens."""
        return self.token < q.subject[0] or (self.entry == layers - 1 and self.token < q.length - 1)


def restore(kind: str, token: int, layer: int, window: int, layers: int) -> Cell:
    """A clean block output at one layer, or clean module outputs in a window of layers."""
    if kind == "hidden":
        return Cell(kind, token, layer, kind, layer, layer + 1)
    first, last = window_of(layer, window, layers)
    return Cell(kind, token, layer, kind, first, last, held=kind)


def sever(cut: str, token: int, layer: int, layers: int) -> Cell:
    """A clean block output, with the token's MLPs (or attentions) as in the corrupted run in all layers.

    The noise being equal, up to the entry block that is what they are anyway.
    """
    return Cell(PATHS[cut], token, layer, "hidden", layer, layers, held=cut, cut=True)


def cells_of(q: Question, kinds: Sequence[str], window: int, severed: bool, layers: int) -> list[Cell]:
    """Every cell of a trace once, those of one map and token together."""
    cells = [restore(k, t, m, window, layers) for k in kinds for t in range(q.length) for m in range(layers)]
    if severed:
        last = q.subject[1] - 1
        cells += [restore("hidden", last, m, window, layers) for m in range(layers)]
        cells += [sever(cut, last, m, layers) for cut in CUTS for m in range(layers)]
    return list(dict.fromkeys(cells))
