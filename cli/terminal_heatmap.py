"""Heat maps in a terminal: tokens down, layers across, a map for each kind, as in the paper's figures.

With colours a cell bears its own ground, so that a map reads the same on a light and on a dark terminal. Without them (a file, NO_COLOR,
sixteen colours) characters of more or less ink take their place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from cli.terminal import cell, cut

Scores = Sequence[Sequence[float]]

#: the full colour of each kind: hidden states, MLP, attention
FULL = {"hidden": (88, 24, 140), "mlp": (0, 104, 55), "attn": (165, 15, 21)}
PALE = (243, 240, 247)
INKS = "·░▒▓█"
LONGEST = 20  # columns of a token that are shown
GAP = 3  # columns between two maps
STEPS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Map:
    """The scores of one kind: a row per token, a column per layer. `best` is the cell that is pointed at."""

    kind: str
    title: str
    scores: Scores
    best: tuple[int, int] | None = None


@dataclass(frozen=True)
class Layout:
    """How maps fit a width: columns of a cell, layers in a cell, and whether maps stand side by side."""

    wide: int
    layers: int = 1
    together: bool = False


@dataclass(frozen=True)
class Scale:
    """From `low` (pale) to `high` (full), in colours or in characters."""

    low: float
    high: float
    coloured: bool

    def share(self, value: float) -> float:
        """Where a value stands between the two: 0 to 1."""
        return (
            0.0 if self.high <= self.low else min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        )

    def cell(self, text: Text, kind: str, share: float, wide: int, best: bool = False) -> None:
        """One cell at the end of a line; the best one bears a sign where it can be seen."""
        if not self.coloured:
            level = round(
                share * (len(INKS) - 1) * wide
            )  # a cell of two characters has the steps between, too
            text.append("".join(INKS[(level + i) // wide] for i in range(wide)))
            return
        full = FULL.get(kind, FULL["hidden"])
        ground = "".join(f"{round(p + (f - p) * share):02x}" for p, f in zip(PALE, full, strict=True))
        ink = "#ffffff" if share > 0.5 else "#000000"
        sign = ("<>" if wide > 1 else "+") if best else " " * wide
        text.append(sign, Style(color=ink, bgcolor=f"#{ground}", bold=best))


def heat_maps(
    maps: Sequence[Map],
    rows: Sequence[str],
    marked: range,
    low: float,
    high: float,
    width: int,
    coloured: bool,
) -> Text:
    """All maps in so many columns, side by side where they fit; `rows` are the tokens, those of the subject (`marked`) bear a star."""
    names = _names(rows, marked)
    margin = max(map(cell_len, [*names, "layer"])) + 1
    layers = len(maps[0].scores[0])
    layout, scale = fit(maps, layers, width - margin), Scale(low, high, coloured)
    text = Text()
    for some in [maps] if layout.together else [[one] for one in maps]:
        for line in _lines(some, names, marked, margin, layout, scale):
            text.append_text(line).append("\n")
    text.append(" " * margin + f"{low:.3f} ")
    for one in maps:
        for i in range(5):
            scale.cell(text, one.kind, i / 4, 1)
        text.append(" ")
    return text.append(f"{high:.3f}\n")


def fit(maps: Sequence[Map], layers: int, room: int) -> Layout:
    """Side by side before one below the other, broad cells before narrow ones; several layers in a cell where nothing else fits."""
    titles = [len(one.title) for one in maps]
    for wide in (2, 1):
        if sum(max(title, wide * layers) for title in titles) + GAP * (len(maps) - 1) <= room:
            return Layout(wide, together=True)
    for wide in (2, 1):
        if wide * layers <= room:
            return Layout(wide)
    return Layout(1, math.ceil(layers / max(room, 1)))


def axis(layers: int, layout: Layout) -> str:
    """The numbers of layers, as many as find room, each below the beginning of its cell."""
    each = len(str(layers - 1)) + 1
    step = next((s for s in STEPS if s * layout.wide // layout.layers >= each), layers)
    line = ""
    for layer in range(0, layers, step):
        line = f"{line:<{layer // layout.layers * layout.wide}}{layer}"
    return line


def _names(rows: Sequence[str], marked: range) -> list[str]:
    """Tokens as they stand beside their lines: on one line, cut, with a star for the subject's."""
    return [
        cut(cell(token).strip() or "␣", LONGEST) + ("*" if i in marked else "")
        for i, token in enumerate(rows)
    ]


def _lines(
    maps: Sequence[Map], names: Sequence[str], marked: range, margin: int, layout: Layout, scale: Scale
) -> Iterator[Text]:
    """The lines of maps that stand side by side: titles, a line per token, the layers."""
    layers = len(maps[0].scores[0])
    cells = math.ceil(layers / layout.layers) * layout.wide
    width = [max(len(one.title), cells) + GAP for one in maps]
    yield _joined([""] + [one.title for one in maps], [margin, *width])
    for i, name in enumerate(names):
        line = Text(" " * (margin - 1 - cell_len(name)))
        line.append(name, "bold" if i in marked else "").append(" ")
        for one, w in zip(maps, [*width[:-1], cells], strict=True):
            for m in range(0, layers, layout.layers):
                best = one.best is not None and one.best[0] == i and m <= one.best[1] < m + layout.layers
                scale.cell(
                    line, one.kind, scale.share(max(one.scores[i][m : m + layout.layers])), layout.wide, best
                )
            line.append(" " * (w - cells))
        yield line
    yield _joined(["layer"] + [axis(layers, layout)] * len(maps), [margin, *width])
    if layout.layers > 1:
        yield Text(f"{'':{margin}}{layout.layers} layers in a cell, the strongest of them shown")


def _joined(parts: Sequence[str], widths: Sequence[int]) -> Text:
    first = f"{parts[0]:>{widths[0] - 1}} "
    return Text((first + "".join(f"{p:<{w}}" for p, w in zip(parts[1:], widths[1:], strict=True))).rstrip())
