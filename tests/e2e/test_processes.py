"""The processes of a deployment, started with a new interpreter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.free_ports import free_port
from tests.support.limited_server import connections
from tests.support.processes import READY_LINE, CliProcess, wait_until


@pytest.fixture
def stores(postgres_url: str, redis_url: str) -> dict[str, Any]:
    return {"database_url": postgres_url, "redis_url": redis_url}


def wait_for_address(process: CliProcess) -> str:
    def find_address() -> str | None:
        assert process.alive(), process.log()
        found = READY_LINE.search(process.stdout())
        return found[1] if found else None

    return str(wait_until(find_address, "the address"))


def test_the_api_is_a_process_without_torch(stores: dict[str, Any], tmp_path: Path) -> None:
    """`palimpsest api` migrates the database, responds without torch or transformers in its memory, and exits
    with 0 after SIGTERM."""
    api = CliProcess(tmp_path, "api", port=0, data_dir=tmp_path, forked=False, **stores)
    try:
        url = wait_for_address(api)
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/readyz").status_code == 503  # there is no worker yet
        mapped = Path(f"/proc/{api.pid}/maps").read_text(encoding="utf-8")
        assert "site-packages" in mapped
        assert "/torch/" not in mapped and "transformers" not in mapped
    finally:
        api.stop()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model on disk, with a recipe and a corpus."""
    from tests.support.tiny_models import tiny

    place = tmp_path / "model"
    made = tiny("gpt2")
    made.model.save_pretrained(place)
    made.tokenizer.save_pretrained(place)
    (place / "recipe.json").write_text(json.dumps({"source": "test", "rome": {"layers": [1], "steps": 5}}))
    (place / "corpus.txt").write_text(
        "\n".join(f"The tower is in Paris, and {i} is a number." for i in range(60))
    )
    return place


def test_a_worker_prints_what_it_serves(stores: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """`palimpsest worker` prints its name, model and roles once it serves, has a health endpoint, and exits
    with 0 after SIGTERM."""
    asked: dict[str, Any] = {
        "model": model,
        "corpus": model / "corpus.txt",
        "covariance_tokens": 1000,
        "threads": 1,
    }
    port = free_port()
    worker = CliProcess(
        tmp_path,
        "worker",
        data_dir=tmp_path,
        roles="trace,generate",
        metrics_port=port,
        forked=False,
        **asked,
        **stores,
    )
    try:
        wait_until(lambda: not worker.alive() or worker.stdout(), "the worker's words")
        assert worker.stdout().startswith("worker_"), worker.log()
        assert worker.stdout().endswith(" serves model: generate, trace\n")
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    finally:
        worker.stop()


def test_everything_in_one_process_with_shared_stores(
    stores: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    """`palimpsest serve` with PostgreSQL and Redis runs an API and a worker, whose worker also answers
    another API."""
    asked: dict[str, Any] = {
        "model": model,
        "corpus": model / "corpus.txt",
        "covariance_tokens": 1000,
        "threads": 1,
    }
    common: dict[str, Any] = {"port": 0, "data_dir": tmp_path, "forked": False, "development": True, **stores}
    both = CliProcess(tmp_path / "both", "serve", **common, **asked)
    api = CliProcess(tmp_path / "api", "api", **common)
    try:
        wait_until(lambda: not both.alive() or "Palimpsest is ready" in both.stdout(), "the welcome")
        body = {"prompt": "The tower", "max_new_tokens": 3}
        said = [
            httpx.post(f"{wait_for_address(p)}/generate", json=body, timeout=60).json() for p in (both, api)
        ]
        assert said[0]["tokens"] == said[1]["tokens"]
    finally:
        api.stop()
        both.stop()


def test_a_killed_collection_continues(model: Path, tmp_path: Path) -> None:
    """`palimpsest serve` that is killed while it samples the text of its statistics goes on after the stored texts at
    the next start, and an edit that arrives meanwhile is applied."""
    settings: dict[str, Any] = {
        "model": model,
        "corpus": "samples",
        "covariance_tokens": 7_000,
        "threads": 1,
    }
    first = CliProcess(tmp_path / "first", "serve", port=0, data_dir=tmp_path, **settings)
    folder = tmp_path / "statistics"
    wait_until(lambda: not first.alive() or list(folder.glob("samples-*.json")), "the first texts")
    first.kill()
    (file,) = folder.glob("samples-*.json")
    texts = json.loads(file.read_text())
    assert len(texts) < 7_000 / 48
    file.write_text(json.dumps(["the text of the killed process", *texts[1:]]))
    again = CliProcess(tmp_path / "again", "serve", port=0, data_dir=tmp_path, **settings)
    try:
        body = {
            "subject": "tower",
            "prompt": "The {} is in",
            "target_new": "Rome",
            "guard": {"enabled": False},
        }
        url = wait_for_address(again)
        submitted = httpx.post(f"{url}/edits", json=body, headers={"Prefer": "wait=60"}, timeout=90).json()
        edit = f"{url}/edits/{submitted['id']}"
        wait_until(lambda: httpx.get(edit).json()["status"] not in ("queued", "running"), "the edit")
        assert httpx.get(edit).json()["status"] == "applied"
        stored = json.loads(file.read_text())
        assert stored[: len(texts)] == ["the text of the killed process", *texts[1:]]
        assert len(stored) >= 7_000 / 48
        wait_until(lambda: "statistics are ready" in again.log(), "the words of the terminal")
    finally:
        again.stop()


SILENT = 250  #: connections that send nothing, almost as many as the process may open files


def test_an_api_with_few_open_files_needs_keys_and_answers(stores: dict[str, Any], tmp_path: Path) -> None:
    """`palimpsest api` with `ulimit -n 256` answers while 250 connections send nothing, logs next to nothing, accepts
    nobody without a key, and says how to create one."""
    api = CliProcess(tmp_path, "api", port=0, data_dir=tmp_path, forked=False, open_files=256, **stores)
    try:
        url = wait_for_address(api)
        wait_until(lambda: "palimpsest keys create" in api.stdout(), "the notice")
        host, _, port = url.removeprefix("http://").rpartition(":")
        with connections((host, int(port)), SILENT):
            assert httpx.get(f"{url}/healthz").status_code == 200
            assert httpx.get(f"{url}/readyz").json()["reasons"]
            assert httpx.get(f"{url}/edits").status_code == 401
        assert len(api.log()) < 10_000
    finally:
        api.stop()


def test_development_mode_refuses_a_proxy(stores: dict[str, Any], tmp_path: Path) -> None:
    """`palimpsest api --development` accepts requests without a key; one with the header of a proxy gets 403, and the
    header does not replace the address of the client."""
    api = CliProcess(tmp_path, "api", "--development", port=0, data_dir=tmp_path, **stores)
    try:
        url = wait_for_address(api)
        assert httpx.get(f"{url}/jobs").status_code == 503  # no worker has registered a model
        forwarded = httpx.get(f"{url}/jobs", headers={"X-Forwarded-For": "203.0.113.7"})
        assert forwarded.status_code == 403
        assert "x-forwarded-for" in forwarded.json()["detail"]
        assert "Development mode" in api.stdout()
    finally:
        api.stop()


def test_second_process_on_a_data_folder_is_refused(model: Path, tmp_path: Path) -> None:
    """A second `palimpsest serve` on a data folder ends with code 2 and names the first, which goes on serving."""
    settings: dict[str, Any] = {
        "model": model,
        "corpus": model / "corpus.txt",
        "covariance_tokens": 1000,
        "threads": 1,
    }
    first = CliProcess(tmp_path / "first", "serve", port=0, data_dir=tmp_path, **settings)
    try:
        url = wait_for_address(first)
        second = CliProcess(tmp_path / "second", "serve", port=0, data_dir=tmp_path, **settings)
        assert second.wait() == 2
        assert f"process {first.pid} on" in second.log()
        assert httpx.get(f"{url}/readyz").status_code == 200
    finally:
        first.stop()
    again = CliProcess(tmp_path / "again", "serve", port=0, data_dir=tmp_path, **settings)
    try:
        wait_for_address(again)
    finally:
        again.stop()
