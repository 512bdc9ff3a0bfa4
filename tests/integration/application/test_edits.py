"""Reading of edits: related edits, factors, filters and pages; and reverts of several edits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from service.application import Services, edits
from service.application.edit_filters import EditFilters
from service.errors import Conflict, InvalidInput, NotFound
from service.jobs.job_store import ClaimedJob
from service.ledger.ledger import state_hash
from service.schemas import RevertRequest
from tests.support.job_rows import claim_job
from tests.support.service_requests import collect_job_events
from tests.support.workers import WorkerParts


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

    def test_search(
        self, services: Services, applied_edit: Callable[..., Any], submit_edit: Callable[..., Any]
    ) -> None:
        """A search finds words of the subject, the statement and the objects, also of the true object that the model
        said; a word with a sign of the database is taken as it is."""
        tower = submit_edit("Eiffel Tower", target_new="Rome 100%")
        river = applied_edit("Nile_River", result={"target_true": "Straße"})

        def found(search: str) -> list[str]:
            return [edit["id"] for edit in services.edits.page(filters=EditFilters(search=search))["items"]]

        assert found("located") == [river, tower]
        assert found("ROME eiffel") == found("100%") == [tower]
        assert found("strasse") == found("nile_r") == [river]
        assert found("nile eiffel") == found("eiffel_tower") == found("1%0") == []

    def test_filters_by_origin(self, services: Services, submit_edit: Callable[..., Any]) -> None:
        """Edits can be filtered by batch, by caller and by time of creation."""
        first, second = submit_edit(batch="corrections"), submit_edit("Nile", batch="other")
        created = services.edits.get(second)["created"]

        def found(**filters: str) -> list[str]:
            return [edit["id"] for edit in services.edits.page(filters=EditFilters(**filters))["items"]]

        assert found(batch="corrections") == [first] and services.edits.get(first)["batch"] == "corrections"
        assert found(actor="somebody") == [second, first] and found(actor="nobody") == []
        assert found(since=created) == [second] and found(until=created) == [first]
        assert found(since=created[:10], until=created[:10]) == [second, first]
        assert found(since="2001-01-01", until="2001-12-31") == []

    def test_all_pages_are_read(self, services: Services, submit_edit: Callable[..., Any]) -> None:
        """A whole list has what its pages have, one page in memory at a time."""
        ids = [submit_edit(f"Tower {n}") for n in range(5)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(edits, "MAX_PAGE_SIZE", 2)
            assert [edit["id"] for edit in services.edits.iter_all()] == ids[::-1]

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


class TestRevertMany:
    def test_a_batch(
        self,
        services: Services,
        applied_edit: Callable[..., Any],
        submit_edit: Callable[..., Any],
        worker: WorkerParts,
    ) -> None:
        """A batch is reverted in one transaction with an entry for each edit; what waits or runs is cancelled, other
        edits stay, and a repetition has no effect. The ledger stays valid."""
        other = applied_edit("Colosseum", batch="other")
        old, new = applied_edit(batch="wrong"), applied_edit(batch="wrong")
        rejected, running, waiting = (submit_edit(f"Tower {n}", batch="wrong") for n in range(3))
        worker.jobs.finish(claim_job(worker, rejected), "rejected", {})
        claim_job(worker, running)
        assert services.edits.get(old)["status"] == "superseded"
        done = services.edits.revert_many(RevertRequest(batch="wrong"), "me")
        assert done == {
            "version": 5,
            "reverted": [old, new],
            "cancelled": [running, waiting],
            "unchanged": [rejected],
        }
        status = {edit["id"]: edit["status"] for edit in services.edits.page()["items"]}
        assert [status[i] for i in (other, old, new, rejected, running, waiting)] == [
            "applied", "reverted", "reverted", "rejected", "running", "cancelled",
        ]  # fmt: skip
        entries = services.ledger.page()["items"][3:]
        assert [(e["kind"], e["edit_id"], e["actor"], e["body"]["applied_version"]) for e in entries] == [
            ("revert", old, "me", 2),
            ("revert", new, "me", 3),
        ]
        assert collect_job_events(services, waiting)[-1].data["status"] == "cancelled"
        assert worker.jobs.cancel_requested(ClaimedJob(running, "edit", 1, {}, "", "", None, False))
        again = services.edits.revert_many(RevertRequest(batch="wrong"), "me")
        assert (again["version"], again["reverted"], again["cancelled"]) == (5, [], [])
        assert services.ledger.verify()["findings"] == []

    def test_all_or_none(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """If one of the edits does not exist, none is reverted; an unknown batch is an error."""
        edit = applied_edit()
        for request in (RevertRequest(edits=[edit, "edit_unknown"]), RevertRequest(batch="unknown")):
            with pytest.raises(NotFound, match="unknown"):
                services.edits.revert_many(request, "me")
        assert services.edits.get(edit)["status"] == "applied" and services.ledger.head() == 1

    def test_the_same_states_as_one_by_one(
        self, services: Services, applied_edit: Callable[..., Any]
    ) -> None:
        """Edits that are reverted together leave the states and statuses that they leave one after another."""
        subjects = ["Nile", "Eiffel Tower", "Nile"]
        together, alone = ([applied_edit(s) for s in subjects] for _ in range(2))
        services.edits.revert_many(RevertRequest(edits=alone[::-1]), "me")
        services.edits.revert_many(RevertRequest(edits=[*together, together[0]]), "me")
        states = [entry["state"] for entry in services.ledger.page()["items"]]
        for edit in together:
            assert services.edits.get(edit)["status"] == "reverted"
        assert states[-1] == state_hash("fingerprint", []) and len(states) == 12
        assert services.ledger.verify()["findings"] == []  # each state is computed again
