"""`palimpsest export` and `palimpsest import`, with a fake service and with a local model."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

import cli.client
import cli.main
from palimpsest import Client
from service.models.loading import load_model
from tests.support.fake_http_service import FakeService
from tests.support.stepped_service import SteppedService
from tests.support.tiny_models import tiny


def make_zip(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, f"this is {name}")
    return file.getvalue()


def file_response(data: bytes, name: str) -> httpx.Response:
    return httpx.Response(
        200, content=data, headers={"Content-Disposition": f'attachment; filename="{name}"'}
    )


def answer_export_with(fake: FakeService, file: Any) -> None:
    """Let the fake service complete an export at once with this file."""
    fake.responses = {
        "POST /exports": {"id": "export_1", "status": "done"},
        "GET /exports/export_1/file": file,
    }


def test_an_adapter_is_a_folder(
    fake: FakeService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of the requested version is unpacked to a folder, and only its path is printed to stdout."""
    answer_export_with(fake, file_response(make_zip("README.md", "adapter_config.json"), "a-v3-peft.zip"))
    folder = tmp_path / "adapter"
    assert cli.main.main(["export", "--version", "3", "--out", str(folder)]) == 0
    assert fake.requests[0] == ("POST /exports", {"version": 3, "format": "peft"})
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "adapter_config.json"]
    assert capsys.readouterr().out.strip() == str(folder)


def test_export_refuses_a_folder_that_is_not_empty(fake: FakeService, tmp_path: Path) -> None:
    """A non-empty output folder is rejected before a request is sent."""
    (tmp_path / "mine.txt").touch()
    assert cli.main.main(["export", "--out", str(tmp_path)]) == 1
    assert fake.requests == []


def test_zip_members_with_paths_are_refused(fake: FakeService, tmp_path: Path) -> None:
    """A zip archive with a member outside the output folder is rejected."""
    answer_export_with(fake, file_response(make_zip("../outside"), "a.zip"))
    assert cli.main.main(["export", "--out", str(tmp_path / "in")]) == 1
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("form", ["edits", "safetensors"])
def test_a_file_has_the_name_it_is_given_or_its_own(fake: FakeService, tmp_path: Path, form: str) -> None:
    """The file has the path of --out, or the name of the service if --out is an existing folder."""
    answer_export_with(fake, [file_response(b"abc", "version-1.bin"), file_response(b"abc", "version-1.bin")])
    for out, file in ((tmp_path / "x.bin", tmp_path / "x.bin"), (tmp_path, tmp_path / "version-1.bin")):
        assert cli.main.main(["export", "--format", form, "--out", str(out)]) == 0
        assert file.read_bytes() == b"abc"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version-1.bin", "x.bin"]


def test_an_import_says_what_became_of_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import` marks edits that are already present, and exits with 1 and the reason if an edit is rejected.
    A missing file exits with 2."""
    told: dict[str, Any] = {
        "subject": "Eiffel Tower",
        "prompt": "{} is in",
        "target_new": "Rome",
        "version": 1,
    }
    items = [
        told | {"id": "edit_1", "status": "applied"},
        told
        | {"id": "edit_2", "status": "rejected", "version": None, "result": {"reason": "it did not take"}},
    ]
    bodies: list[bytes] = []

    def service(request: httpx.Request) -> httpx.Response:
        assert request.headers["content-type"] == "application/octet-stream"
        bodies.append(request.content)
        return httpx.Response(200, json={"items": items, "already_present": ["edit_1"]})

    def connect(url: str, key: str | None, **options: Any) -> Client:
        return Client(url, key, transport=httpx.MockTransport(service), **options)

    monkeypatch.setattr(cli.client, "Client", connect)
    file = tmp_path / "edits.safetensors"
    file.write_bytes(b"all of it")
    assert cli.main.main(["import", str(file)]) == 1
    said = capsys.readouterr()
    assert bodies == [b"all of it"]
    assert "already present" in said.out and "edit_2 is rejected: it did not take" in said.err
    items.pop()
    assert cli.main.main(["import", str(file)]) == 0
    assert cli.main.main(["import", str(tmp_path / "none")]) == 2


@pytest.fixture
def place(tmp_path: Path) -> Iterator[SteppedService]:
    """A service with one edit, whose model is loaded from a folder."""
    made = tiny()
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    place = SteppedService(tmp_path / "data", load_model(tmp_path / "base"))
    place.edit("Eiffel Tower", "is")
    place.replica.attest_version(1)
    yield place
    place.container.close()


def export_model(place: SteppedService, tmp_path: Path, out: Path, *more: str) -> int:
    base, data = str(tmp_path / "base"), str(tmp_path / "data")
    named = ["--model", base, "--data-dir", data, "--out", str(out)]
    return cli.main.main(["export", "--format", "model", *named, *more])


def test_a_whole_model_is_exported_locally(
    place: SteppedService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exported weights equal those of the worker bit for bit and match its digest. The ledger is
    unchanged."""
    out, before = tmp_path / "edited", place.services.ledger.verify()
    assert export_model(place, tmp_path, out) == 0
    assert "Its weights match the digest of a worker." in capsys.readouterr().err
    found = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for site, tensor in place.replica.weights(1).items():
        assert torch.equal(found[place.replica.base.parameter_name(site)], tensor)
    assert place.services.ledger.verify() == before


def test_export_refuses_a_digest_that_workers_disagree_with(place: SteppedService, tmp_path: Path) -> None:
    """The export fails and leaves no folder if its digest differs from that of a worker."""
    place.edit("Colosseum", "on")
    place.worker_parts.session.attest(2, "0" * 64)
    assert export_model(place, tmp_path, tmp_path / "edited") == 1
    assert not (tmp_path / "edited").exists()


def test_the_wrong_base_model_is_named(
    place: SteppedService, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export fails if the ledger does not have the model or the version."""
    assert export_model(place, tmp_path, tmp_path / "x", "--dtype", "bfloat16") == 1
    assert "the ledger has no model with the fingerprint" in capsys.readouterr().err
    assert export_model(place, tmp_path, tmp_path / "x", "--version", "9") == 1
