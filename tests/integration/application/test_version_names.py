"""Names of versions, and the facts that differ between two versions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from service.application import Services
from service.db.database import Database
from service.db.models import VersionName
from service.errors import Conflict, InvalidInput, ModelNotFound, NotFound
from service.jobs.broker import Broker
from service.schemas import CompareRequest, ExportRequest, GenerateRequest, WorkerGenerateRequest
from tests.support.ledger_tampering import drop_append_only_guards
from tests.support.served_model import INFO
from tests.support.service_requests import trace_request
from tests.support.workers import WorkerParts


class TestNames:
    def test_a_name_stays_with_its_version(
        self, services: Services, applied_edit: Callable[..., Any], broker: Broker
    ) -> None:
        """After later edits and reverts a name means the version that it was given to, wherever a version is asked
        for."""
        edit = applied_edit()
        named, is_new = services.version_names.give("release-1", "head", "me")
        assert is_new and (named["version"], named["actor"]) == (1, "me")
        applied_edit("Nile")
        services.edits.revert(edit, "me")
        model_id = f"{INFO['name']}@release-1"
        assert named["model"] == model_id
        for text in ("release-1", model_id, f"org/{model_id}", "1", f"{INFO['name']}@1"):
            request = GenerateRequest(prompt="The", version=text)
            assert services.generation.needs_rendering(request)
            assert services.generation.render_generation(request).version == 1
        compared = services.generation.render_comparison(
            CompareRequest(prompt="The", versions=("release-1", "head"))
        )
        assert compared.versions == (1, "head")
        completion = services.generation.create_completion(
            model_id, WorkerGenerateRequest(prompts=["The"], max_new_tokens=1)
        )
        assert completion.request.version == 1 and completion.model_version.id == f"{INFO['name']}@1"
        assert services.generation.resolve_version_name(model_id).version == 1
        assert model_id in [name.id for name in services.generation.list_version_names()]
        assert services.traces.submit(trace_request(version="release-1"), "me")["request"]["version"] == 1
        exported = services.exports.submit(ExportRequest(version="release-1", format="peft"), "me")
        assert exported["request"]["version"] == 1
        assert [e["version"] for e in services.ledger.page(version="release-1")["items"]] == [1]

    def test_a_name_is_unique(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """Giving a name again to its version has no effect, and to another one is a conflict until it is deleted."""
        applied_edit()
        services.version_names.give("release-1", 0, "me")
        assert services.version_names.give("release-1", "base", "you")[1] is False
        with pytest.raises(Conflict, match="that of version 0: delete it"):
            services.version_names.give("release-1", "head", "me")
        services.version_names.delete("release-1", "me")
        for call in (services.version_names.get, lambda name: services.version_names.delete(name, "me")):
            with pytest.raises(NotFound, match="'release-1'"):
                call("release-1")
        again, is_new = services.version_names.give("release-1", "head", "you")
        assert is_new and (again["version"], again["actor"]) == (1, "you")
        assert services.ledger.verify()["findings"] == []

    def test_pages_of_names(self, services: Services, worker: WorkerParts) -> None:
        """Names are listed in their order, page by page, without deleted ones."""
        for name in ("b", "a", "d", "c"):
            services.version_names.give(name, 0, "me")
        services.version_names.delete("b", "me")
        first = services.version_names.page(limit=2)
        rest = services.version_names.page(first["next"], limit=2)
        assert [item["name"] for item in first["items"] + rest["items"]] == ["a", "c", "d"]
        assert rest["next"] is None

    def test_what_has_no_version(self, services: Services, worker: WorkerParts) -> None:
        """A name that no version has, a version that does not exist, and a word that has a meaning are refused."""
        request = GenerateRequest(prompt="The", version="unknown")
        with pytest.raises(InvalidInput, match="'unknown': GET /versions lists") as refused:
            services.generation.render_generation(request)
        assert refused.value.field == "version"
        with pytest.raises(ModelNotFound, match="GET /versions lists"):
            services.generation.resolve_version_name(f"{INFO['name']}@unknown")
        for name, version, match in (
            ("x", 7, "does not exist"),
            ("x", "y", "no version"),
            ("head", 0, "meaning"),
        ):
            with pytest.raises(InvalidInput, match=match):
                services.version_names.give(name, version, "me")

    def test_a_changed_name_is_found(
        self, services: Services, applied_edit: Callable[..., Any], database: Database
    ) -> None:
        """A name that was moved in the database is a finding of the verification."""
        applied_edit()
        services.version_names.give("release-1", 1, "me")
        with database.write_session() as session:
            drop_append_only_guards(session)
            session.execute(update(VersionName).values(version=0))
        findings = services.ledger.verify()["findings"]
        assert [finding["where"] for finding in findings] == ["names"]
        assert "release-1 was changed" in findings[0]["detail"]


class TestDifference:
    def test_facts_that_differ(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """A difference has, for each fact, the edit that is active at one version and at the other, in both
        directions; a fact whose edit is the same is left out."""
        nile, tower = applied_edit("Nile"), applied_edit(target_new="Rome")
        services.version_names.give("before", "head", "me")
        newer, added = applied_edit(target_new="Bonn"), applied_edit(prompt="The {} was built by")
        services.edits.revert(applied_edit("Rhine"), "me")
        services.edits.revert(nile, "me")

        def shown(before: Any, after: Any) -> list[tuple[Any, ...]]:
            page = services.version_diff.page(before, after)
            assert page["next"] is None
            ids = [[side and side["edit_id"] for side in (c["before"], c["after"])] for c in page["items"]]
            return [(c["change"], *pair) for c, pair in zip(page["items"], ids, strict=True)]

        assert sorted(shown("before", "head")) == sorted(
            [("replaced", tower, newer), ("added", None, added), ("removed", nile, None)]
        )
        assert sorted(shown("head", "before")) == sorted(
            [("replaced", newer, tower), ("removed", added, None), ("added", None, nile)]
        )
        assert shown("head", "head") == shown(0, 0) == []
        (change, *_) = services.version_diff.page("base", 1)["items"]
        assert (change["subject"], change["after"]["target_new"], change["after"]["version"]) == (
            "Nile",
            "Rome",
            1,
        )

    def test_pages_of_facts(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """Pages end at a number of subjects and have all facts together."""
        ids = [applied_edit(f"Tower {n % 3}", prompt=f"The {{}} {n}") for n in range(6)]
        found, cursor, pages = [], None, 0
        while pages == 0 or cursor is not None:
            page = services.version_diff.page(0, "head", cursor, limit=2)
            found += [change["after"]["edit_id"] for change in page["items"]]
            cursor, pages = page["next"], pages + 1
        assert sorted(found) == sorted(ids) and pages == 2

    def test_unknown_versions(self, services: Services, applied_edit: Callable[..., Any]) -> None:
        """The error of a version that does not exist names the field."""
        applied_edit()
        for versions, field in (((0, "x"), "after"), ((9, 0), "before")):
            with pytest.raises(InvalidInput) as refused:
                services.version_diff.page(*versions)
            assert refused.value.field == field
