"""Commands that call a service: cli.client."""

from __future__ import annotations

import pytest

from cli.main import main
from tests.support.fake_http_service import FakeService

Captured = pytest.CaptureFixture[str]


def test_the_key_is_sent(fake: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request carries the API key of PALIMPSEST_API_KEY; `--api-key` overrides it."""
    fake.responses = {"GET /models": {"items": []}}
    monkeypatch.setenv("PALIMPSEST_API_KEY", "secret")
    assert main(["models"]) == main(["models", "--api-key", "other"]) == 0
    assert [headers["Authorization"] for headers in fake.headers] == ["Bearer secret", "Bearer other"]


def test_invalid_fields_are_listed_below_the_detail(fake: FakeService, capsys: Captured) -> None:
    """A problem document is printed as its detail and the details of its fields."""
    fake.responses = {
        "GET /models": FakeService.problem(
            422, "Two things.", errors=[{"field": "prompt", "detail": "no slot"}]
        )
    }
    assert main(["models"]) == 1
    assert capsys.readouterr().err == "palimpsest: Two things.\n  no slot\n"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://"])
def test_an_invalid_address_is_a_wrong_command(capsys: Captured, url: str) -> None:
    """A URL without scheme or host exits with 2 and prints an example."""
    assert main(["models", "--url", url]) == 2
    assert "http://127" in capsys.readouterr().err
