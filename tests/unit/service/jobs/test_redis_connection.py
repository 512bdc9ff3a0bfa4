"""Connections to Redis: service.jobs.redis_connection."""

from __future__ import annotations

import pytest

from service.errors import Misconfigured
from service.jobs.redis_connection import redis_client


@pytest.mark.parametrize(
    "url", ["", "nonsense", "http://127.0.0.1", "redis://host:99999/0", "redis://:pass/word@host:6379/0"]
)
def test_url_that_is_not_of_redis_is_a_configuration_error(url: str) -> None:
    """A URL that cannot be parsed raises Misconfigured with an example, and the message has no part of the URL."""
    with pytest.raises(Misconfigured, match="for example redis://") as error:
        redis_client(url, 1.0)
    assert "word" not in error.value.detail.replace("password", "") and "nonsense" not in error.value.detail


def test_valid_urls_open_no_connection() -> None:
    """A client of a valid URL is created without a connection."""
    redis_client("redis://:secret@127.0.0.1:1/0", 1.0).close()
