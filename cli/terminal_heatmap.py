"""Heat maps in a terminal: tokens down, layers across, one map for each kind (as in Meng et al. 2022, Fig. 1).

In colour a cell sets its background, so that a map looks the same on light and dark terminals. Without colours (a file,
NO_COLOR, 16 colours) characters of increasing density are used.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
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
    """The scores of one kind: a row per token, a column per layer. `best` is the cell that is marked."""

    kind: str
    title: str
    scores: Scores
    best: tuple[int, int] | None = None


@dataclass(frozen=True)
class MapLayout:
    """Layout of maps: columns per cell, layers per cell, and whether the maps are side by side."""

    cell_width: int
    layers_per_cell: int = 1
    side_by_side: bool = False


@dataclass(frozen=True)
class ColourScale:
    """The scale from `low` (pale) to `high` (full), in colours or in characters."""

    low: float
    high: float
    coloured: bool

    def fraction(self, value: float) -> float:
        """Return the position of a value on the scale, from 0 to 1."""
        return (
            0.0 if self.high <= self.low else min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))
        )

    def draw_cell(self, text: Text, kind: str, fraction: float, width: int, best: bool = False) -> None:
        """Append a cell to a line. In colour the best cell is marked."""
        if not self.coloured:
            level = round(fraction * (len(SHADES) - 1) * width)  # two characters have intermediate levels
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
    corrupted: Collection[int],
    low: float,
    high: float,
    width: int,
    coloured: bool,
) -> Text:
    """Render maps in `width` columns, side by side if they fit. Corrupted tokens have a star."""
    labels = _token_labels(tokens, corrupted)
    margin = max(map(cell_len, [*labels, "layer"])) + 1
    layers = len(maps[0].scores[0])
    layout, scale = fit_layout(maps, layers, width - margin), ColourScale(low, high, coloured)
    text = Text()
    for group in [maps] if layout.side_by_side else [[one] for one in maps]:
        for line in _map_lines(group, labels, corrupted, margin, layout, scale):
            text.append_text(line).append("\n")
    text.append(" " * margin + f"{low:.3f} ")
    for one in maps:
        for i in range(5):
            scale.draw_cell(text, one.kind, i / 4, 1)
        text.append(" ")
    return text.append(f"{high:.3f}\n")


def fit_layout(maps: Sequence[HeatMap], layers: int, width: int) -> MapLayout:
    """Choose a layout: side by side first, wide cells before narrow ones, several layers per cell as the last
    resort."""
    titles = [len(one.title) for one in maps]
    for wide in (2, 1):
        if sum(max(title, wide * layers) for title in titles) + GAP * (len(maps) - 1) <= width:
            return MapLayout(wide, side_by_side=True)
    for wide in (2, 1):
        if wide * layers <= width:
            return MapLayout(wide)
    return MapLayout(1, math.ceil(layers / max(width, 1)))


def axis_labels(layers: int, layout: MapLayout) -> str:
    """Return the layer numbers that fit, each below the first column of its cell."""
    label_width = len(str(layers - 1)) + 1
    step = next(
        (s for s in AXIS_STEPS if s * layout.cell_width // layout.layers_per_cell >= label_width), layers
    )
    line = ""
    for layer in range(0, layers, step):
        line = f"{line:<{layer // layout.layers_per_cell * layout.cell_width}}{layer}"
    return line


def _token_labels(tokens: Sequence[str], corrupted: Collection[int]) -> list[str]:
    """Return the row labels: truncated tokens, with a star for the corrupted ones."""
    return [
        truncate(format_cell(token).strip() or "␣", MAX_TOKEN_WIDTH) + ("*" if i in corrupted else "")
        for i, token in enumerate(tokens)
    ]


def _map_lines(
    maps: Sequence[HeatMap],
    labels: Sequence[str],
    corrupted: Collection[int],
    margin: int,
    layout: MapLayout,
    scale: ColourScale,
) -> Iterator[Text]:
    """Yield the lines of maps that are side by side: titles, a line per token, layer numbers."""
    layers = len(maps[0].scores[0])
    cells = math.ceil(layers / layout.layers_per_cell) * layout.cell_width
    width = [max(len(one.title), cells) + GAP for one in maps]
    yield _join_columns([""] + [one.title for one in maps], [margin, *width])
    for i, name in enumerate(labels):
        line = Text(" " * (margin - 1 - cell_len(name)))
        line.append(name, "bold" if i in corrupted else "").append(" ")
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
        yield Text(f"{'':{margin}}{layout.layers_per_cell} layers per cell; each cell shows their maximum")


def _join_columns(parts: Sequence[str], widths: Sequence[int]) -> Text:
    first = f"{parts[0]:>{widths[0] - 1}} "
    return Text((first + "".join(f"{p:<{w}}" for p, w in zip(parts[1:], widths[1:], strict=True))).rstrip())
