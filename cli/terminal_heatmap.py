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

from cli.terminal import format_cell, truncate

Scores = Sequence[Sequence[float]]

#: the full colour of each kind: hidden states, MLP, attention
FULL_COLOURS = {"hidden": (88, 24, 140), "mlp": (0, 104, 55), "attn": (165, 15, 21)}
PALE_COLOUR = (243, 240, 247)
SHADES = "·░▒▓█"
MAX_TOKEN_WIDTH = 20  # columns of a token that are shown
GAP = 3  # columns between two maps
AXIS_STEPS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class HeatMap:
    """The scores of one kind: a row per token, a column per layer. `best` is the cell that is pointed at."""

    kind: str
    title: str
    scores: Scores
    best: tuple[int, int] | None = None


@dataclass(frozen=True)
class MapLayout:
    """How maps fit a width: columns of a cell, layers in a cell, and whether maps stand side by side."""

    cell_width: int
    layers_per_cell: int = 1
    side_by_side: bool = False


@dataclass(frozen=True)
class ColourScale:
    """From `low` (pale) to `high` (full), in colours or in characters."""

    low: float
    high: float
    coloured: bool

    def fraction(self, value: float) -> float:
        """Where a value stands between the two: 0 to 1."""
        return (
            0.0 if self.high <= self.low else min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        )

    def draw_cell(self, text: Text, kind: str, fraction: float, width: int, best: bool = False) -> None:
        """One cell at the end of a line; the best one bears a sign where it can be seen."""
        if not self.coloured:
            level = round(
                fraction * (len(SHADES) - 1) * width
            )  # a cell of two characters has the steps between, too
            text.append("".join(SHADES[(level + i) // width] for i in range(width)))
            return
        full = FULL_COLOURS.get(kind, FULL_COLOURS["hidden"])
        background = "".join(
            f"{round(p + (f - p) * fraction):02x}" for p, f in zip(PALE_COLOUR, full, strict=True)
        )
        ink = "#ffffff" if fraction > 0.5 else "#000000"
        marker = ("<>" if width > 1 else "+") if best else " " * width
        text.append(marker, Style(color=ink, bgcolor=f"#{background}", bold=best))


def render_heat_maps(
    maps: Sequence[HeatMap],
    tokens: Sequence[str],
    subject: range,
    low: float,
    high: float,
    width: int,
    coloured: bool,
) -> Text:
    """All maps in so many columns, side by side where they fit; `rows` are the tokens, those of the subject (`marked`) bear a star."""
    labels = _token_labels(tokens, subject)
    margin = max(map(cell_len, [*labels, "layer"])) + 1
    layers = len(maps[0].scores[0])
    layout, scale = fit_layout(maps, layers, width - margin), ColourScale(low, high, coloured)
    text = Text()
    for group in [maps] if layout.side_by_side else [[one] for one in maps]:
        for line in _map_lines(group, labels, subject, margin, layout, scale):
            text.append_text(line).append("\n")
    text.append(" " * margin + f"{low:.3f} ")
    for one in maps:
        for i in range(5):
            scale.draw_cell(text, one.kind, i / 4, 1)
        text.append(" ")
    return text.append(f"{high:.3f}\n")


def fit_layout(maps: Sequence[HeatMap], layers: int, width: int) -> MapLayout:
    """Side by side before one below the other, broad cells before narrow ones; several layers in a cell where nothing else fits."""
    titles = [len(one.title) for one in maps]
    for wide in (2, 1):
        if sum(max(title, wide * layers) for title in titles) + GAP * (len(maps) - 1) <= width:
            return MapLayout(wide, side_by_side=True)
    for wide in (2, 1):
        if wide * layers <= width:
            return MapLayout(wide)
    return MapLayout(1, math.ceil(layers / max(width, 1)))


def axis_labels(layers: int, layout: MapLayout) -> str:
    """The numbers of layers, as many as find room, each below the beginning of its cell."""
    label_width = len(str(layers - 1)) + 1
    step = next(
        (s for s in AXIS_STEPS if s * layout.cell_width // layout.layers_per_cell >= label_width), layers
    )
    line = ""
    for layer in range(0, layers, step):
        line = f"{line:<{layer // layout.layers_per_cell * layout.cell_width}}{layer}"
    return line


def _token_labels(tokens: Sequence[str], subject: range) -> list[str]:
    """Tokens as they stand beside their lines: on one line, cut, with a star for the subject's."""
    return [
        truncate(format_cell(token).strip() or "␣", MAX_TOKEN_WIDTH) + ("*" if i in subject else "")
        for i, token in enumerate(tokens)
    ]


def _map_lines(
    maps: Sequence[HeatMap],
    labels: Sequence[str],
    subject: range,
    margin: int,
    layout: MapLayout,
    scale: ColourScale,
) -> Iterator[Text]:
    """The lines of maps that stand side by side: titles, a line per token, the layers."""
    layers = len(maps[0].scores[0])
    cells = math.ceil(layers / layout.layers_per_cell) * layout.cell_width
    width = [max(len(one.title), cells) + GAP for one in maps]
    yield _join_columns([""] + [one.title for one in maps], [margin, *width])
    for i, name in enumerate(labels):
        line = Text(" " * (margin - 1 - cell_len(name)))
        line.append(name, "bold" if i in subject else "").append(" ")
        for one, w in zip(maps, [*width[:-1], cells], strict=True):
            for m in range(0, layers, layout.layers_per_cell):
                best = (
                    one.best is not None
                    and one.best[0] == i
                    and m <= one.best[1] < m + layout.layers_per_cell
                )
                scale.draw_cell(
                    line,
                    one.kind,
                    scale.fraction(max(one.scores[i][m : m + layout.layers_per_cell])),
                    layout.cell_width,
                    best,
                )
            line.append(" " * (w - cells))
        yield line
    yield _join_columns(["layer"] + [axis_labels(layers, layout)] * len(maps), [margin, *width])
    if layout.layers_per_cell > 1:
        yield Text(f"{'':{margin}}{layout.layers_per_cell} layers in a cell, the strongest of them shown")


def _join_columns(parts: Sequence[str], widths: Sequence[int]) -> Text:
    first = f"{parts[0]:>{widths[0] - 1}} "
    return Text((first + "".join(f"{p:<{w}}" for p, w in zip(parts[1:], widths[1:], strict=True))).rstrip())
