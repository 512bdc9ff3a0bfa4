"""An export that is a job, on each wiring: made by a worker, kept in pieces, handed out by whoever is asked."""

from __future__ import annotations

import copy
import hashlib
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from sqlalchemy import func, select

from service.db.models import Part
from service.errors import Conflict
from service.jobs import artifacts
from service.kit.steps import finish
from tests.support.logits import logits, served, with_peft
from tests.support.stepped_service import Place
from workers import job_handlers
from workers.job_handlers import exported


@pytest.fixture
def place(wiring: dict[str, Any], tmp_path: Path) -> Iterator[Place]:
    built = Place(tmp_path, **wiring)
    yield built
    built.wired.close()


def file_of(place: Place, export: dict[str, Any]) -> bytes:
    data = b"".join(place.do.exports.file(export))
    told = export["result"]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (told["bytes"], told["sha256"])
    return data


def test_the_adapter_follows_the_ledger(place: Place, tmp_path: Path) -> None:
    """Of found edits in two layers, with one superseded, and after a revert: peft agrees with what the service serves."""
    place.edit("Eiffel Tower", "is")
    place.edit("Eiffel Tower", "in")
    last = place.edit("Colosseum", "on", method="memit")
    place.do.edits.revert(last, "key:alice")
    place.edit("Louvre", "is")
    base = place.replica.base
    for version, count in ((3, 2), (4, 1), (5, 2)):
        with zipfile.ZipFile(io.BytesIO(file_of(place, place.export(version)))) as archive:
            archive.extractall(tmp_path / str(version))
        adapted = with_peft(copy.deepcopy(base.model), tmp_path / str(version))
        edited = served(place.replica, version)
        assert (edited - logits(adapted, base)).abs().max() < 1e-4
        assert (edited - logits(base.model, base)).abs().max() > 1e-2
        told = place.export(version)["result"]
        assert [x["terms"] for x in told["layers"]] == [count, count], version


def test_edited_weights_of_any_method(place: Place) -> None:
    """The bytes of the replica, of fine-tuning as well."""
    place.edit("Eiffel Tower", "is")
    place.edit("Mount Fuji", "in", method="ft", hparams={"steps": 2})
    found = load(file_of(place, place.export(form="safetensors")))
    weights = place.replica.weights(2)
    assert {place.replica.base.parameter_name(s) for s in weights} == set(found)
    assert all(torch.equal(found[place.replica.base.parameter_name(s)], t) for s, t in weights.items())


def test_one_export_serves_all_who_ask(place: Place) -> None:
    """While it waits, while it runs, and as long as it is kept."""
    place.edit("Eiffel Tower", "is")
    first = place.do.exports.submit("head", "peft", "key:alice")
    assert place.do.exports.submit(1, "peft", "key:bob")["id"] == first["id"]
    assert place.do.exports.submit(1, "safetensors", "key:bob")["id"] != first["id"]
    done = place.export()
    assert done["id"] == first["id"] and place.do.exports.submit(1, "peft", "key:bob")["status"] == "done"


def test_only_the_newest_are_kept(place: Place) -> None:
    """An older one is made again when it is asked for, to the same bytes."""
    exports, files = [], []
    for number in range(artifacts.EXPORTS + 1):
        place.edit(f"Tower {number}", "is")
        exports.append(place.export())
        files.append(file_of(place, exports[-1]))
    with pytest.raises(Conflict, match="no longer kept"):
        list(place.do.exports.file(exports[0]))
    with place.wired.database.read() as session:
        assert session.scalar(select(func.count(func.distinct(Part.job_id)))) == artifacts.EXPORTS
    again = place.export(1)
    assert again["id"] != exports[0]["id"] and file_of(place, again) == files[0]


def test_an_export_is_taken_over(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker dies in the middle of storing it: the next one makes the same file."""
    monkeypatch.setattr(job_handlers, "PIECE", 1000)
    place.edit("Eiffel Tower", "is")
    asked = place.do.exports.submit("head", "peft", "key:alice")
    job = place.desk.start(asked["id"])
    assert job is not None
    steps = exported(place.replica, place.desk, place.toolkit, job)
    while (progress := next(steps)).phase != "store":
        pass
    assert progress.total > 2
    steps.close()
    place.desk.abandon(job)
    again = place.desk.start(asked["id"])
    assert again is not None and again.attempt == 2
    finish(exported(place.replica, place.desk, place.toolkit, again))
    done = place.do.exports.get(asked["id"])
    with zipfile.ZipFile(io.BytesIO(file_of(place, done))) as archive:
        assert archive.testzip() is None and "README.md" in archive.namelist()


def test_what_is_too_large_says_where_to_make_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of gigabytes do not go through the database."""
    monkeypatch.setattr("service.exporting.export_job.MOST", 1000)
    place.edit("Eiffel Tower", "is")
    with pytest.raises(Exception, match="palimpsest export --format model"):
        place.export(form="safetensors")
