"""The rows of a process: service.gating.gate_table."""

from __future__ import annotations

import gc
import random
from dataclasses import replace

import pytest
import torch

from service.gating import gate_table
from service.gating.gate_table import MIN_SLOTS
from service.weights.factors import Association, deserialize_updates, serialize_updates
from service.weights.gate_space import build_gate_space
from tests.support.gated_associations import (
    SPACE,
    STATISTICS,
    dense_change,
    gated,
    new_table,
    rows_of,
    some_keys,
)


def read_again(a: Association) -> Association:
    """Return an association from its stored factors, as a worker does after it has dropped them."""
    (read,) = deserialize_updates(serialize_updates([a]), a.edit, a.subject, lambda _: SPACE)
    assert isinstance(read, Association)
    return read


def test_versions_share_their_rows() -> None:
    """A row is held once by all versions that have it, also when its factors were read again; one with other content is
    another row."""
    table, a = new_table(), gated(1, threshold=0.5)
    first, second = rows_of([a], table), rows_of([read_again(a), gated(2)], table)
    assert first.rows[0] is second.rows[0]
    (scaled,) = rows_of([a.scaled(2.0)], table).rows
    assert scaled is not first.rows[0]
    assert table.nbytes == sum({row: row.nbytes for row in (*first.rows, *second.rows, scaled)}.values())


def test_a_row_that_no_version_holds_leaves() -> None:
    """When the last version with a row is gone, the row takes no memory and no product, and never opens."""
    table, kept, gone = new_table(), gated(1), [gated(i) for i in range(2, 400)]
    rows, dropped = rows_of([kept], table), rows_of([kept, *gone], table)
    assert table.slots == 3 * 399
    del dropped
    gc.collect()
    assert table.nbytes == rows.nbytes
    assert table.slots == 3
    assert table.near_rows(table.project(torch.stack([a.key for a in gone]))) is None
    torch.testing.assert_close(dense_change(rows, kept.key[None]), kept.value[None])


def test_any_history_gives_the_same_changes() -> None:
    """After any rows came and went, a version has bit for bit the changes of one in a table of its own."""
    rng = random.Random(3)
    table, versions = new_table(), {}
    associations = [gated(i, f"s{i % 50}", threshold=0.3, others=i % 5) for i in range(120)]
    keys = torch.cat([some_keys(20), torch.stack([a.key for a in associations[::7]])])
    for step in range(60):
        subset = rng.sample(associations, rng.randrange(1, 120))
        versions[rng.randrange(4)] = (subset, rows_of(subset, table))
        if step % 10 == 9:
            for kept, rows in versions.values():
                fresh = rows_of(kept)
                assert torch.equal(rows.digests(), fresh.digests())
                assert torch.equal(dense_change(rows, keys), dense_change(fresh, keys))
    assert table.slots <= 2 * 3 * 120 + 2 * MIN_SLOTS


def test_rows_of_another_space_are_refused() -> None:
    """Keys of different sketches cannot be compared, and an association without a gate has none."""
    table, a = new_table(), gated(1)
    assert a.gate is not None
    other = build_gate_space(STATISTICS, size=64, seed=1)
    with pytest.raises(ValueError, match="in one space"):
        table.row(replace(a, gate=replace(a.gate, space=other)))
    with pytest.raises(ValueError, match="with a gate"):
        table.row(replace(a, gate=None))


def test_a_known_association_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A further version with an association costs a look-up: neither its direction nor its digest is computed again,
    also when its factors were read again."""
    table, a = new_table(), gated(1, threshold=0.5)
    again = read_again(a)
    first = rows_of([a, again], table)
    monkeypatch.setattr(gate_table, "new_gated_row", None)
    second = rows_of([a, again, a], table)
    assert {*first.rows, *second.rows} == {first.rows[0]}


def test_the_digest_of_a_row_is_that_of_its_content() -> None:
    """Whatever changes what a row does changes its digest; the id of its edit does not."""
    a = gated(1, blocked=some_keys(2))
    assert a.gate is not None
    table = new_table()
    changed = [
        replace(a, subject="other"),
        a.scaled(2.0),
        replace(a, direction=a.direction + a.key),
        replace(a, gate=replace(a.gate, threshold=0.8)),
        replace(a, gate=replace(a.gate, keys=a.gate.keys[:2])),
        replace(a, gate=replace(a.gate, blocked=a.gate.blocked[:1])),
    ]
    rows = [table.row(x) for x in (a, *changed)]
    assert len({row.digest for row in rows}) == len(rows)
    assert table.row(replace(a, edit="edit_999")).digest == rows[0].digest
