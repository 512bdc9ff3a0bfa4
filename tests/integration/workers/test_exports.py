"""Export jobs on each wiring: run by a worker, stored in chunks, and downloaded."""

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

from service.db.models import JobArtifact
from service.errors import Conflict
from service.jobs.job_kinds import JOB_KINDS
from service.kit.steps import run_to_completion
from service.schemas import ExportRequest
from tests.support.logits import load_with_peft, logits, served_logits
from tests.support.stepped_service import SteppedService
from workers import job_handlers
from workers.job_handlers import run_export


@pytest.fixture
def stepped_service(wiring: dict[str, Any], tmp_path: Path) -> Iterator[SteppedService]:
    created = SteppedService(tmp_path, **wiring)
    yield created
    created.container.close()


def download(stepped_service: SteppedService, export: dict[str, Any]) -> bytes:
    data = b"".join(stepped_service.services.exports.open_file(export["id"]).chunks)
    result = export["result"]
    assert (len(data), hashlib.sha256(data).hexdigest()) == (result["bytes"], result["sha256"])
    return data


def test_the_adapter_follows_the_ledger(stepped_service: SteppedService, tmp_path: Path) -> None:
    """With a superseded edit and after a revert, PEFT with the adapter gives the logits that the service
    computes at each version."""
    stepped_service.edit("Eiffel Tower", "is")
    stepped_service.edit("Eiffel Tower", "in")
    last = stepped_service.edit("Colosseum", "on", method="memit")
    stepped_service.services.edits.revert(last, "key:alice")
    stepped_service.edit("Louvre", "is")
    base = stepped_service.replica.base
    for version, count in ((3, 2), (4, 1), (5, 2)):
        with zipfile.ZipFile(
            io.BytesIO(download(stepped_service, stepped_service.export(version)))
        ) as archive:
            archive.extractall(tmp_path / str(version))
        adapted = load_with_peft(copy.deepcopy(base.model), tmp_path / str(version))
        edited = served_logits(stepped_service.replica, version)
        assert (edited - logits(adapted, base)).abs().max() < 1e-4
        assert (edited - logits(base.model, base)).abs().max() > 1e-2
        result = stepped_service.export(version)["result"]
        assert [x["terms"] for x in result["layers"]] == [count, count], version


def test_edited_weights_of_any_method(stepped_service: SteppedService) -> None:
    """The exported weights equal those of the replica bit by bit, also with fine-tuning."""
    stepped_service.edit("Eiffel Tower", "is")
    stepped_service.edit("Mount Fuji", "in", method="ft", hparams={"steps": 2})
    tensors = load(download(stepped_service, stepped_service.export(file_format="safetensors")))
    weights = stepped_service.replica.weights(2)
    assert {stepped_service.replica.base.parameter_name(s) for s in weights} == set(tensors)
    assert all(
        torch.equal(tensors[stepped_service.replica.base.parameter_name(s)], t) for s, t in weights.items()
    )


def test_one_export_is_shared_by_all_requests(stepped_service: SteppedService) -> None:
    """Requests for one version and format return the same export, whether it is queued or done."""
    stepped_service.edit("Eiffel Tower", "is")
    first = stepped_service.services.exports.submit(ExportRequest(version="head", format="peft"), "key:alice")
    assert (
        stepped_service.services.exports.submit(ExportRequest(version=1, format="peft"), "key:bob")["id"]
        == first["id"]
    )
    assert (
        stepped_service.services.exports.submit(ExportRequest(version=1, format="safetensors"), "key:bob")[
            "id"
        ]
        != first["id"]
    )
    done = stepped_service.export()
    assert (
        done["id"] == first["id"]
        and stepped_service.services.exports.submit(ExportRequest(version=1, format="peft"), "key:bob")[
            "status"
        ]
        == "done"
    )


def test_only_the_newest_are_kept(stepped_service: SteppedService) -> None:
    """The file of the oldest export is deleted; a new export of that version has the same bytes."""
    exports, files = [], []
    for number in range(JOB_KINDS["export"].max_kept + 1):
        stepped_service.edit(f"Tower {number}", "is")
        exports.append(stepped_service.export())
        files.append(download(stepped_service, exports[-1]))
    with pytest.raises(Conflict, match="no longer kept"):
        stepped_service.services.exports.open_file(exports[0]["id"])
    with stepped_service.container.database.read_session() as session:
        assert (
            session.scalar(select(func.count(func.distinct(JobArtifact.job_id))))
            == JOB_KINDS["export"].max_kept
        )
    again = stepped_service.export(1)
    assert again["id"] != exports[0]["id"] and download(stepped_service, again) == files[0]


def test_export_is_resumed_by_another_worker(
    stepped_service: SteppedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a worker stops while it stores an export, the next attempt stores a complete file."""
    monkeypatch.setattr(job_handlers, "CHUNK_BYTES", 1000)
    stepped_service.edit("Eiffel Tower", "is")
    submitted = stepped_service.services.exports.submit(
        ExportRequest(version="head", format="peft"), "key:alice"
    )
    job = stepped_service.worker_parts.jobs.claim(submitted["id"])
    assert job is not None
    steps = run_export(
        stepped_service.replica, stepped_service.worker_parts.jobs, stepped_service.context, job
    )
    while (progress := next(steps)).phase != "store":
        pass
    assert progress.total > 2
    steps.close()
    stepped_service.worker_parts.jobs.forget_locally(job)
    again = stepped_service.worker_parts.jobs.claim(submitted["id"])
    assert again is not None and again.attempt == 2
    run_to_completion(
        run_export(stepped_service.replica, stepped_service.worker_parts.jobs, stepped_service.context, again)
    )
    done = stepped_service.services.exports.get(submitted["id"])
    with zipfile.ZipFile(io.BytesIO(download(stepped_service, done))) as archive:
        assert archive.testzip() is None and "README.md" in archive.namelist()


def test_too_large_export_names_the_cli_command(
    stepped_service: SteppedService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export above the size limit fails, and the error names the command for it."""
    monkeypatch.setattr("service.exporting.export_job.MAX_EXPORT_BYTES", 1000)
    stepped_service.edit("Eiffel Tower", "is")
    with pytest.raises(Exception, match="palimpsest export --format model"):
        stepped_service.export(file_format="safetensors")
