"""Fixtures of the tests of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from openai import OpenAI

from tests.support.application import FakeWorker, TestApp
from tests.support.local_server import run_http_server


@pytest.fixture
def openai_client(test_app: TestApp, worker: FakeWorker) -> Iterator[OpenAI]:
    """The official OpenAI client, connected to the application over a real socket."""
    with (
        run_http_server(test_app.app) as url,
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client
