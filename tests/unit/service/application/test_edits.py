"""Edits as they are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.application import Operations
from service.errors import Conflict, InvalidInput


class TestRead:
    def test_related(
        self, operations: Operations, landed: Callable[..., Any], ask: Callable[..., Any]
    ) -> None:
        """An edit names the active edits of its subject, however its spaces run, and no others."""
        a, b = landed("Eiffel Tower"), landed("Eiffel  Tower", prompt="{} was built by")
        landed("Colosseum")
        waiting = ask("Eiffel Tower", prompt="{} is made of")
        assert operations.edits.get(waiting)["related"] == [a, b]
        assert operations.edits.get(a)["related"] == [b]
        operations.edits.revert(a, "somebody")
        assert operations.edits.get(waiting)["related"] == [b]

    def test_delta(self, operations: Operations, landed: Callable[..., Any], ask: Callable[..., Any]) -> None:
        """The vectors of an applied edit can be had, also after it is reverted; others have none."""
        edit = landed()
        assert operations.edits.delta(edit) == edit.encode()
        operations.edits.revert(edit, "somebody")
        assert operations.edits.delta(edit) == edit.encode()
        with pytest.raises(Conflict):
            operations.edits.delta(ask())

    def test_filters(
        self, operations: Operations, landed: Callable[..., Any], ask: Callable[..., Any]
    ) -> None:
        """Edits are listed by status and by subject."""
        applied, waiting = landed(), ask("Colosseum")
        assert [edit["id"] for edit in operations.edits.page(status="applied")["items"]] == [applied]
        assert [edit["id"] for edit in operations.edits.page(subject=" Colosseum")["items"]] == [waiting]
        with pytest.raises(InvalidInput, match="queued, running"):
            operations.edits.page(status="done")

    def test_pages(self, operations: Operations, ask: Callable[..., Any]) -> None:
        """Pages follow each other newest first, without gap or repetition, also when edits come meanwhile."""
        ids = [ask(f"Tower {n}") for n in range(4)]
        seen, cursor = [], None
        while True:
            page = operations.edits.page(cursor=cursor, limit=1)
            seen += [edit["id"] for edit in page["items"]]
            if cursor is None:
                ask("Tower late")
            cursor = page["next"]
            if cursor is None:
                break
        assert seen == ids[::-1]
