"""The scores that a trace has to find."""

from __future__ import annotations

from tiny import tiny

from service.text import find
from service.tracing.cells import cells_of
from service.tracing.question import ask

QUESTION = ask(tiny(), find("In Rome it is in", "Rome"), None, 1, 0.1, 1, None, ())


def test_every_cell_once() -> None:
    """Each map has a cell for each token and layer, and the severed paths share the map of hidden states."""
    t = QUESTION.length
    assert len(cells_of(QUESTION, ["hidden", "mlp", "attn"], 10, False, 3)) == 3 * t * 3
    assert len(cells_of(QUESTION, ["hidden"], 10, True, 3)) == t * 3 + 2 * 3
    assert len(cells_of(QUESTION, ["mlp"], 10, True, 3)) == t * 3 + 3 * 3


def test_cells_that_need_no_run() -> None:
    """Cells before the subject are low, and so are those above the last attention except at the last token."""
    cells = cells_of(QUESTION, ["hidden", "mlp"], 1, False, 3)
    b, last = QUESTION.subject[0], QUESTION.length - 1
    for cell in cells:
        assert cell.is_low(QUESTION, 3) == (cell.token < b or (cell.layer == 2 and cell.token != last))
