"""CachedLedger: results do not depend on what is cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy.orm import Session

from service.application import Services
from service.errors import (
    NotFound,
)
from service.ledger import cached, ledger
from service.ledger.cached import CachedLedger
from tests.support.job_rows import (
    commit_edit,
)
from tests.support.workers import WorkerParts


class TestCachedLedger:
    def test_associations(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], services: Services
    ) -> None:
        """`active_at` returns the active edits of a version with the bodies of their entries, and
        `factors_of` returns their factors."""
        a, b = submit_edit(), submit_edit("Colosseum")
        commit_edit(worker, a, strength=1.5)
        commit_edit(worker, b)
        services.edits.revert(a, "somebody")
        assert worker.ledger.active_at(0) == []
        assert [x for x, _ in worker.ledger.active_at(2)] == [a, b]
        assert [x for x, _ in worker.ledger.active_at(3)] == [b]
        assert worker.ledger.active_at(1)[0][1]["strength"] == 1.5
        assert worker.ledger.factors_of([b, a]) == {a: a.encode(), b: b.encode()}

    def test_entries_are_read_once(
        self,
        worker: WorkerParts,
        submit_edit: Callable[..., Any],
        services: Services,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Only new entries are read, and the active edits are those of the whole ledger."""
        read: list[int] = []
        entries = ledger.entries

        def recording(session: Session, model: str, after: int = 0, **kwargs: Any) -> Any:
            read.append(after)
            return entries(session, model, after, **kwargs)

        monkeypatch.setattr(ledger, "entries", recording)
        a, b = submit_edit(), submit_edit("Colosseum")
        commit_edit(worker, a)
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        commit_edit(worker, b)
        services.edits.revert(a, "somebody")
        read.clear()
        assert [x for x, _ in worker.ledger.active_at(3)] == [b]
        assert read == [0]
        assert [x for x, _ in worker.ledger.active_at(2)] == [a, b]
        assert read == [0, 2]

    def test_pages(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A ledger that is longer than a page is read completely, from an empty cache and as it grows."""
        monkeypatch.setattr(cached, "PAGE_SIZE", 2)
        edits = [submit_edit(f"Tower {n}") for n in range(9)]
        for number, edit in enumerate(edits[:5], start=1):
            commit_edit(worker, edit)
            if number in (1, 2):
                assert [x for x, _ in worker.ledger.active_at(number)] == edits[:number]
        assert [x for x, _ in worker.ledger.active_at(5)] == edits[:5]
        for edit in edits[5:]:
            commit_edit(worker, edit)
        assert [x for x, _ in worker.ledger.active_at(9)] == edits
        fresh = CachedLedger(worker.database, worker.model)
        assert fresh.active_at(9) == worker.ledger.active_at(9)

    @pytest.mark.parametrize("max_body_bytes", [0, 500])
    def test_bodies_are_bounded_in_bytes(
        self, worker: WorkerParts, submit_edit: Callable[..., Any], max_body_bytes: int
    ) -> None:
        """The cached bodies never exceed the limit, and the results do not depend on it."""
        for n in range(6):
            commit_edit(worker, submit_edit(f"Tower {n}"), note="x" * 50)
        small = CachedLedger(worker.database, worker.model, max_body_bytes)
        for version in (6, 3, 6, 0):
            assert small.active_at(version) == worker.ledger.active_at(version)
            sizes = [len(ledger.canonical_json(body)) for body, _ in small._bodies.values()]
            assert sum(sizes) == small._body_bytes <= max_body_bytes
        assert len(worker.ledger._bodies) == 6

    def test_a_restored_ledger_is_read_again(
        self, worker: WorkerParts, submit_edit: Callable[..., Any]
    ) -> None:
        """The cache is not used when its newest entry has changed or is missing, as after a restored
        backup."""
        a = submit_edit()
        commit_edit(worker, a)
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        (entry,) = worker.ledger._index
        worker.ledger._index = [replace(entry, hash="0" * 64, edit_id="another")]
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        worker.ledger._index = [entry, replace(entry, version=2)]
        assert [x for x, _ in worker.ledger.active_at(1)] == [a]
        with pytest.raises(NotFound):
            worker.ledger.active_at(2)

    @pytest.mark.parametrize("version", [-1, 1])
    def test_unknown_version(self, worker: WorkerParts, version: int) -> None:
        """A version that does not exist raises NotFound."""
        with pytest.raises(NotFound, match="no version"):
            worker.ledger.active_at(version)
