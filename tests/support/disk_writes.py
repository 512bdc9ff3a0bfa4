"""Writes of test processes do not wait for the disk: committed data survives a crash of the process, not of the
machine."""

from __future__ import annotations

import os

from service.db import database

#: the settings of SQLite connections outside the tests
DURABLE_PRAGMAS = database.SQLITE_PRAGMAS


def do_not_wait_for_the_disk() -> None:
    """Disable fsync in this process and in those that are forked from it."""
    database.SQLITE_PRAGMAS = {"synchronous": "OFF", "journal_mode": "WAL", "foreign_keys": "ON"}
    os.fsync = lambda fd: None
