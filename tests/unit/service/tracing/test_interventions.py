"""Tests of service.tracing.interventions."""

from __future__ import annotations

from service.kit.text import locate_subject
from service.tracing.interventions import CorruptedRun, list_cells, restored_cell, severed_cell
from service.tracing.trace_input import build_trace_input
from tests.support.tiny_models import tiny

TRACE_INPUT = build_trace_input(tiny(), locate_subject("In Rome it is in", "Rome"), None, 1, 0.1, 1, None, ())


def test_every_cell_once() -> None:
    """Each map has a cell for each token and layer; the severed paths share the cells of hidden states."""
    t = TRACE_INPUT.prompt_length
    assert len(list_cells(TRACE_INPUT, ["hidden", "mlp", "attn"], 10, False, 3)) == 3 * t * 3
    assert len(list_cells(TRACE_INPUT, ["hidden"], 10, True, 3)) == t * 3 + 2 * 3
    assert len(list_cells(TRACE_INPUT, ["mlp"], 10, True, 3)) == t * 3 + 3 * 3


def test_cells_that_need_no_run() -> None:
    """Cells before the subject, and above the last attention except at the last token, have the low score."""
    cells = list_cells(TRACE_INPUT, ["hidden", "mlp"], 1, False, 3)
    b, last = TRACE_INPUT.subject[0], TRACE_INPUT.prompt_length - 1
    for cell in cells:
        assert cell.is_low(TRACE_INPUT, 3) == (cell.token < b or (cell.layer == 2 and cell.token != last))


def test_clipped_runs_are_deduplicated() -> None:
    """Two windows with one entry layer are the same run below the block where the shorter one ends."""
    short, long = CorruptedRun(1, "mlp", "mlp", False, 0, 4), CorruptedRun(1, "mlp", "mlp", False, 0, 6)
    assert short.clipped_at(4) == long.clipped_at(4) and short.clipped_at(5) != long.clipped_at(5)
    assert short._replace(source_kind="attn", held_kind="attn").clipped_at(4) != short.clipped_at(4)
    assert sorted([long, short, long._replace(sample=1)]) == [short, long, long._replace(sample=1)]


def test_where_outputs_are_held() -> None:
    """A window holds its module from its first to its last layer; a severed path holds it above the restored state."""
    window, severed, plain = (
        c.corrupted_run(0, TRACE_INPUT, 6)
        for c in (
            restored_cell("mlp", 1, 2, 3, 6),
            severed_cell("attn", 1, 2, 6),
            restored_cell("hidden", 1, 2, 3, 6),
        )
    )
    assert [m for m in range(6) if window.is_held("mlp", m)] == [1, 2, 3]
    assert [m for m in range(6) if severed.is_held("attn", m)] == [3, 4]  # nothing reads the last block
    assert not any(
        x.is_held(k, m) for x, k in ((window, "attn"), (plain, "mlp"), (plain, "")) for m in range(6)
    )


def test_outputs_in_the_last_block_are_held_for_the_last_token_only() -> None:
    """In the last block, only holding the last token's module output has an effect."""
    last, other = (
        restored_cell("mlp", t, 5, 3, 6).corrupted_run(0, TRACE_INPUT, 6)
        for t in (TRACE_INPUT.prompt_length - 1, 1)
    )
    assert last.is_held("mlp", 5) and not other.is_held("mlp", 5)
