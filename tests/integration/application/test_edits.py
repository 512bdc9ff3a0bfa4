"""Reading of edits: related edits, factors, filters and pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.application import Services
from service.application.edit_filters import EditFilters
from service.errors import Conflict, InvalidInput


class TestRead:
    def test_related(
        self, services: Services, applied_edit: Callable[..., Any], submit_edit: Callable[..., Any]
    ) -> None:
        """`related` has the other active edits of the subject; white space in the subject is normalized."""
        a, b = applied_edit("Eiffel Tower"), applied_edit("Eiffel  Tower", prompt="{} was built by")
        applied_edit("Colosseum")
        waiting = submit_edit("Eiffel Tower", prompt="{} is made of")
        assert services.edits.get(waiting)["related"] == [a, b]
        assert services.edits.get(a)["related"] == [b]
        services.edits.revert(a, "somebody")
        assert services.edits.get(waiting)["related"] == [b]

    def test_delta(
        self, services: Services, applied_edit: Callable[..., Any], submit_edit: Callable[..., Any]
    ) -> None:
        """The factors of an applied edit can be read, also after it is reverted; a queued edit has none."""
        edit = applied_edit()
        assert services.edits.delta(edit) == edit.encode()
        services.edits.revert(edit, "somebody")
        assert services.edits.delta(edit) == edit.encode()
        with pytest.raises(Conflict):
            services.edits.delta(submit_edit())

    def test_filters(
        self, services: Services, applied_edit: Callable[..., Any], submit_edit: Callable[..., Any]
    ) -> None:
        """Edits can be filtered by status and by subject; an unknown status is rejected."""
        applied, waiting = applied_edit(), submit_edit("Colosseum")
        assert [
            edit["id"] for edit in services.edits.page(filters=EditFilters(status="applied"))["items"]
        ] == [applied]
        assert [
            edit["id"] for edit in services.edits.page(filters=EditFilters(subject=" Colosseum"))["items"]
        ] == [waiting]
        with pytest.raises(InvalidInput, match="queued, running"):
            services.edits.page(filters=EditFilters(status="done"))

    def test_pages(self, services: Services, submit_edit: Callable[..., Any]) -> None:
        """Pages are newest first, without gaps or duplicates, also when an edit is added between pages."""
        ids = [submit_edit(f"Tower {n}") for n in range(4)]
        seen, cursor = [], None
        while True:
            page = services.edits.page(cursor=cursor, limit=1)
            seen += [edit["id"] for edit in page["items"]]
            if cursor is None:
                submit_edit("Tower late")
            cursor = page["next"]
            if cursor is None:
                break
        assert seen == ids[::-1]
