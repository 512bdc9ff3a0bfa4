"""Anchors of a verification, and the number of verifications at once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from service.application.ledger import MAX_VERIFICATIONS, LedgerService, parse_anchor
from service.db.database import Database
from service.errors import InvalidInput, QueueFull

HASH = "0a" * 32


def test_an_anchor_is_a_number_and_a_hash() -> None:
    """An anchor is NUMBER:HASH; None stays None."""
    assert parse_anchor(f"12:{HASH}", "expect") == (12, HASH)
    assert parse_anchor(None, "expect") is None


@pytest.mark.parametrize(
    "text", ["", "1", "1:", f"x:{HASH}", f"1:{HASH[1:]}", f"-1:{HASH}", f"1:{HASH.upper()}"]
)
def test_a_malformed_anchor_is_rejected(text: str) -> None:
    """Any other text raises InvalidInput with the parameter."""
    with pytest.raises(InvalidInput, match=r"`expect_record`.*hexadecimal") as raised:
        parse_anchor(text, "expect_record")
    assert raised.value.field == "expect_record"


def test_few_verifications_wait(tmp_path: Path) -> None:
    """One verification runs at a time, a few wait, and further ones are rejected at once."""
    service: Any = LedgerService(Database(f"sqlite:///{tmp_path / 'x.sqlite3'}"))
    entered, leave, running = threading.Semaphore(0), threading.Event(), []

    def hold() -> None:
        with service._one_at_a_time():
            running.append(1)
            entered.release()
            leave.wait(20)

    threads = [threading.Thread(target=hold) for _ in range(MAX_VERIFICATIONS)]
    for thread in threads:
        thread.start()
    assert entered.acquire(timeout=20)
    while service._places._value:  # until all of them wait
        threading.Event().wait(0.001)
    assert len(running) == 1
    with pytest.raises(QueueFull):
        service.verify()
    leave.set()
    for thread in threads:
        thread.join(20)
    assert len(running) == MAX_VERIFICATIONS
