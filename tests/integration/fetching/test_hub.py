"""Tests of service.fetching.hub, with a small server in place of the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from service.errors import Unavailable
from service.fetching.hub import download_from_hub, reach_hub

NAME, REVISION = "nobody/tiny", "a" * 40
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "model.safetensors": b"weights",
    "onnx/model.onnx": b"other",
}


class Hub(BaseHTTPRequestHandler):
    """Answers the calls that the library of the hub makes for one model."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/{NAME}/resolve/{REVISION}/")
        if path.startswith(f"/api/models/{NAME}/tree/"):
            body = json.dumps(
                [{"type": "file", "path": x, "size": len(data), "oid": "0" * 40} for x, data in FILES.items()]
            ).encode()
        elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/{REVISION}"):
            siblings = [{"rfilename": x} for x in FILES]
            body = json.dumps({"id": NAME, "sha": REVISION, "siblings": siblings}).encode()
        elif name in FILES:
            body = FILES[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{abs(hash(body))}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve one model at the address that the library takes for the hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        use_endpoint(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        yield
        server.shutdown()
        thread.join()


def use_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )


@pytest.mark.usefixtures("hub")
def test_the_files_of_a_revision_are_downloaded(tmp_path: Path) -> None:
    """The newest revision is found, and its files for transformers are in the folder, without the library's own."""
    assert reach_hub(NAME) == REVISION
    download_from_hub(NAME, REVISION, tmp_path)
    found = {str(x.relative_to(tmp_path)): x.read_bytes() for x in tmp_path.rglob("*") if x.is_file()}
    assert found == {name: data for name, data in FILES.items() if "/" not in name}


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_hub_does_not_have(tmp_path: Path) -> None:
    """A name and a revision that the hub does not know are refused in one line."""
    with pytest.raises(Unavailable, match="the hub cannot be reached") as caught:
        reach_hub("nobody/else")
    assert "\n" not in caught.value.detail
    with pytest.raises(Unavailable, match=f"{NAME} cannot be downloaded from the hub") as caught:
        download_from_hub(NAME, "b" * 40, tmp_path)
    assert "\n" not in caught.value.detail


def test_a_hub_without_a_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address where nothing listens is refused."""
    use_endpoint("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(Unavailable, match="the hub cannot be reached"):
        reach_hub(NAME)
