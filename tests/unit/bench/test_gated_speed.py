"""The edits of the bench of gated edits open where it says: bench/gated_speed.py."""

from __future__ import annotations

import torch

from bench.gated_speed import (
    PROMPTS,
    EditsLedger,
    bench_tokens,
    bench_versions,
    bench_versions_made,
    edit_at,
    new_replica,
    open_edit,
    random_edit,
    random_space,
)
from service.models.hooks import capture
from service.weights.factors import Association
from tests.support.tiny_models import tiny


def opened(edit: Association, prompt: str) -> list[int]:
    """Return the tokens of a prompt at which an edit opens."""
    model = tiny()
    with capture({0: model.down_proj(0)}, "input") as captured, torch.no_grad():
        model.model(input_ids=torch.tensor([model.encode(prompt)[0]]))
    (patch,) = new_replica(model).compose_patch([edit]).gated
    change = patch.rows.change(captured[0].flatten(0, -2))
    return [] if change is None else change.tokens.tolist()


def test_gates_open_where_they_should() -> None:
    """Random edits open nowhere, the open one at every token, and that of prompts at their last tokens."""
    model = tiny()
    space, count = random_space(model), len(model.encode(PROMPTS[0])[0])
    assert all(opened(random_edit(model, space, i), PROMPTS[0]) == [] for i in range(20))
    assert opened(open_edit(model, space, 1), PROMPTS[0]) == list(range(count))
    assert count - 1 in opened(edit_at(model, space, 1, PROMPTS), PROMPTS[0])


def test_versions_of_the_ledger_are_made() -> None:
    """The replica of the bench composes the versions of its ledger, with the rows of their edits."""
    model = tiny()
    edits = [random_edit(model, random_space(model), i) for i in range(5)]
    ledger = EditsLedger(edits, random_space(model))
    version = ledger.add_version([e.edit for e in edits[:3]])
    (patch,) = new_replica(model, ledger).patch(version).gated
    assert [row.edit for row in patch.rows.rows] == [e.edit for e in edits[:3]]


def test_every_part_runs() -> None:
    """Each part gives a row for each of its alternatives."""
    model = tiny(positions=128)
    edits = [random_edit(model, random_space(model), i) for i in range(11)]
    assert [row[:2] for row in bench_tokens(model, edits, [0, 10], [2], 1)] == [
        [2, "0"],
        [2, "10"],
        [2, "10, one open"],
    ]
    assert [row[0] for row in bench_versions_made(model, edits, [1, 10], 1)] == ["1", "10"]
    assert len(bench_versions(model, edits, callers=4, versions=2, tokens=3, rounds=1)) == 5
