"""Start and stop of the service."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from cli.http_server import listening_socket, url_of_socket
from cli.main import main
from cli.signals import stop_on_signals
from service.errors import Misconfigured
from service.settings import Settings

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_a_public_host_needs_an_api_key(capsys: Captured, tmp_path: Path, host: str) -> None:
    """Without an API key a non-loopback host exits with 2, and no data folder is created."""
    data = tmp_path / "data"
    assert main(["serve", "--host", host, "--port", "0", "--data-dir", str(data)]) == 2
    said = capsys.readouterr().err
    assert "PALIMPSEST_API_KEY" in said
    assert "127.0.0.1" in said
    assert "Traceback" not in said
    assert not data.exists()


def test_a_port_in_use_is_reported_at_once(capsys: Captured, tmp_path: Path) -> None:
    """A port in use exits with 2 and a message that names the address and the flag."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in said
    assert "--port" in said


def test_an_unresolvable_host_is_reported() -> None:
    """A host name that cannot be resolved raises Misconfigured."""
    settings = Settings(host="no-such-host.invalid", api_key="k")
    with pytest.raises(Misconfigured, match="no-such-host"), listening_socket(settings):
        pass


def test_the_address_is_one_a_client_can_use() -> None:
    """The URL has the assigned port instead of port 0, and loopback instead of the wildcard address."""
    with listening_socket(Settings(port=0)) as bound:
        assert url_of_socket(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    with listening_socket(Settings(host="0.0.0.0", port=0, api_key="k")) as bound:
        assert url_of_socket(bound).startswith("http://127.0.0.1:")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_to_stop(number: signal.Signals) -> None:
    """SIGINT and SIGTERM set the event, and the previous handlers are restored afterwards."""
    before = signal.getsignal(number)
    with stop_on_signals(number) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(60)
    assert signal.getsignal(number) is before
