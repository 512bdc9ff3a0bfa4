"""The advisory locks in PostgreSQL. Each has a number of its own, the same in every process."""

from __future__ import annotations

from enum import IntEnum, unique


@unique
class AdvisoryLock(IntEnum):
    """What a lock protects."""

    MIGRATIONS = 0x70616C696D70
    OWNERSHIP = 0x70616C6F776E
    AUDIT_RECORDS = 0x6175646974
