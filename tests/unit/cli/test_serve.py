"""Starting and stopping the service."""

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
    """Without an API key a host that others can reach is refused in plain words, before anything is made."""
    data = tmp_path / "data"
    assert main(["serve", "--host", host, "--port", "0", "--data-dir", str(data)]) == 2
    said = capsys.readouterr().err
    assert "PALIMPSEST_API_KEY" in said
    assert "127.0.0.1" in said
    assert "Traceback" not in said
    assert not data.exists()


def test_a_port_in_use_is_reported_at_once(capsys: Captured, tmp_path: Path) -> None:
    """Before the model is loaded a port that is in use is told, with what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port), "--data-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}" in said
    assert "--port" in said


def test_an_unresolvable_host_is_reported() -> None:
    """A host that cannot be looked up is a wrong configuration, not a stack trace."""
    settings = Settings(host="no-such-host.invalid", api_key="k")
    with pytest.raises(Misconfigured, match="no-such-host"), listening_socket(settings):
        pass


def test_the_address_is_one_a_client_can_use() -> None:
    """Port 0 becomes the port that was given; every-interface becomes loopback; IPv6 stands in brackets."""
    with listening_socket(Settings(port=0)) as bound:
        assert url_of_socket(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    with listening_socket(Settings(host="0.0.0.0", port=0, api_key="k")) as bound:
        assert url_of_socket(bound).startswith("http://127.0.0.1:")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_ask_to_stop(number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM set the event, and afterwards mean again what they meant before."""
    before = signal.getsignal(number)
    with stop_on_signals(number) as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(60)
    assert signal.getsignal(number) is before
