"""Heat maps in the terminal: cli.terminal_heatmap."""

from __future__ import annotations

import pytest
from rich.cells import cell_len
from rich.text import Text

from cli.terminal_heatmap import GAP, HeatMap, MapLayout, axis_labels, fit_layout, render_heat_maps

FLAT = [[0.1] * 4] * 2


def cell_backgrounds(text: Text) -> list[str]:
    return [str(span.style).partition("on ")[2] for span in text.spans if "on " in str(span.style)]


def render(scores: list[list[float]], width: int = 80, coloured: bool = True, **more: object) -> Text:
    rows = [f"t{i}" for i in range(len(scores))]
    one = HeatMap("hidden", "state", scores, **more)  # type: ignore[arg-type]
    return render_heat_maps([one], rows, range(1, 2), 0.1, 0.9, width, coloured)


def test_low_is_pale_and_high_is_full() -> None:
    """The background of a cell ranges from pale at `low` to saturated at `high`. Values outside the range are
    clamped. The scale has the same colours."""
    found = cell_backgrounds(render([[0.1, 0.9], [0.5, -1.0]]))
    assert found[:4] == ["#f3f0f7", "#58188c", "#a684c2", "#f3f0f7"]
    assert [found[4], found[6], found[8]] == [found[0], found[2], found[1]]  # the scale below the map


def test_without_colours_shades_are_used() -> None:
    """Without colours the cells and the scale are drawn with shading characters."""
    text = render([[0.1, 0.2, 0.5, 0.9]], coloured=False)
    lines = text.plain.splitlines()
    assert lines == ["      state", "   t0 ···░▒▒██", "layer 0 1 2 3", "      0.100 ·░▒▓█ 0.900"]
    assert cell_backgrounds(text) == []


def test_the_subject_and_the_strongest_are_marked() -> None:
    """Tokens of the subject are marked with a star, and the highest score with `<>`."""
    lines = render([[0.1, 0.2], [0.9, 0.3]], best=(1, 0)).plain.splitlines()
    assert lines[1].split() == ["t0"]
    assert lines[2].split() == ["t1*", "<>"]


def test_a_short_prompt_has_its_axis_below_its_cells() -> None:
    """The axis is aligned with the cells, also when the axis label is wider than the tokens."""
    lines = render([[0.1, 0.9]], coloured=False).plain.splitlines()
    assert lines[1].index("·") == lines[2].index("0")


def test_a_flat_map_is_pale() -> None:
    """A map whose `low` equals `high` is pale and causes no division by zero."""
    text = render_heat_maps([HeatMap("mlp", "MLP", [[0.5]])], ["a"], range(0), 0.5, 0.5, 80, coloured=True)
    assert cell_backgrounds(text)[0] == "#f3f0f7"


@pytest.mark.parametrize(
    ("layers", "room", "layout"),
    [
        (8, 66, MapLayout(2, side_by_side=True)),
        (12, 66, MapLayout(1, side_by_side=True)),
        (24, 66, MapLayout(2)),
        (48, 66, MapLayout(1)),
        (80, 66, MapLayout(1, 2)),
    ],
)
def test_maps_fit_the_terminal(layers: int, room: int, layout: MapLayout) -> None:
    """The layout prefers maps side by side to stacked maps, wide cells to narrow ones, and one layer per cell
    to several."""
    maps = [HeatMap("hidden", title, [[0.0] * layers]) for title in ("state", "MLP", "attention")]
    assert fit_layout(maps, layers, room) == layout


@pytest.mark.parametrize("coloured", [True, False])
@pytest.mark.parametrize("layers", [2, 8, 12, 48, 126])
def test_no_line_is_broader_than_the_terminal(layers: int, coloured: bool) -> None:
    """No line exceeds 80 columns, for any number of layers and for long or wide tokens. All lines of a map
    have the same width."""
    maps = [HeatMap(kind, kind, [[0.1] * layers] * 3, (2, layers - 1)) for kind in ("hidden", "mlp", "attn")]
    names = [" is", "東京" * 20, "\x1b[31mred" * 9]
    text = render_heat_maps(maps, names, range(1, 3), 0.1, 0.9, 80, coloured)
    assert max(map(cell_len, text.plain.splitlines())) <= 80
    assert "\x1b" not in text.plain
    assert len({cell_len(line) for line in text.plain.splitlines()[1:4]}) == 1


def test_layers_that_share_a_cell_show_the_strongest() -> None:
    """A cell of several layers has the maximum score, and the number of layers per cell is printed."""
    scores = [[0.1] * 160]
    scores[0][101] = 0.9
    text = render(scores, width=60, coloured=False)
    assert text.plain.count("█") == 2  # the cell, and the end of the scale
    assert "3 layers per cell" in text.plain


@pytest.mark.parametrize(
    ("layers", "layout", "line"),
    [
        (8, MapLayout(2), "0 1 2 3 4 5 6 7"),
        (12, MapLayout(1), "0    5    10"),
        (24, MapLayout(2), "0   2   4   6   8   10  12  14  16  18  20  22"),
        (1, MapLayout(2), "0"),
    ],
)
def test_numbers_stand_below_their_layers(layers: int, layout: MapLayout, line: str) -> None:
    """Layer numbers are printed below their cells, as many as fit."""
    assert axis_labels(layers, layout) == line


def test_maps_side_by_side_stand_apart() -> None:
    """The title of each map starts at the column of its cells."""
    maps = [HeatMap("hidden", "state", FLAT), HeatMap("attn", "attention", FLAT)]
    lines = render_heat_maps(maps, ["a", "b"], range(0), 0.1, 0.9, 80, coloured=False).plain.splitlines()
    assert lines[0].index("attention") == lines[1].rindex("·" * 8) == lines[1].index("·") + 8 + GAP
