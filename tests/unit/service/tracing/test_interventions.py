"""The scores that a trace has to find."""

from __future__ import annotations

from service.kit.text import find
from service.tracing.interventions import Track, cells_of, restore, sever
from service.tracing.trace_input import ask
from tests.support.tiny_models import tiny

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


def test_what_tells_runs_apart() -> None:
    """Below the block where the shorter window ends, two windows of one entry are the same run; other kinds never are."""
    short, long = Track(1, "mlp", "mlp", False, 0, 4), Track(1, "mlp", "mlp", False, 0, 6)
    assert short.below(4) == long.below(4) and short.below(5) != long.below(5)
    assert short._replace(source="attn", held="attn").below(4) != short.below(4)
    assert sorted([long, short, long._replace(sample=1)]) == [short, long, long._replace(sample=1)]


def test_where_outputs_are_held() -> None:
    """A window holds its module from its first layer to its last; a severed path holds it above the restored state."""
    window, cut, plain = (
        c.track(0, QUESTION, 6)
        for c in (restore("mlp", 1, 2, 3, 6), sever("attn", 1, 2, 6), restore("hidden", 1, 2, 3, 6))
    )
    assert [m for m in range(6) if window.holds("mlp", m)] == [1, 2, 3]
    assert [m for m in range(6) if cut.holds("attn", m)] == [3, 4]  # in the last block nobody listens
    assert not any(
        x.holds(k, m) for x, k in ((window, "attn"), (plain, "mlp"), (plain, "")) for m in range(6)
    )


def test_the_last_block_holds_for_the_last_token() -> None:
    """Only what the last token's module gives in the last block is heard."""
    last, other = (restore("mlp", t, 5, 3, 6).track(0, QUESTION, 6) for t in (QUESTION.length - 1, 1))
    assert last.holds("mlp", 5) and not other.holds("mlp", 5)
