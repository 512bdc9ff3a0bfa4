"""The file of heads: the newest audit record and ledger entry after each commit, outside the database.

A ledger that is truncated, or replaced as a whole, is consistent in itself. It does not match this file.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

FILE_NAME = "ledger-heads.jsonl"
MAX_BYTES = 1_000_000  #: size at which the file is renamed to FILE_NAME.1 and a new one begins


class HeadFile:
    """The file of heads of one data folder. Several processes may append to it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.older_path = folder / f"{FILE_NAME}.1"

    def append(self, head: Mapping[str, Any]) -> None:
        """Write a head to the log and to the file, and wait until it is on the disk. A failure is only logged."""
        log.info("ledger head", extra=dict(head))
        line = json.dumps(dict(head), separators=(",", ":")).encode() + b"\n"
        try:
            self._rotate()
            _append_line(self.path, line)
        except OSError as error:
            log.warning("the head of the ledger was not written", extra={"detail": str(error)})

    def heads(self) -> list[dict[str, Any]]:
        """Return all heads, oldest first. A line that is not complete is omitted."""
        return [head for path in (self.older_path, self.path) for head in _read_heads(path)]

    def forget(self) -> None:
        """Set the files aside: the next head begins a new file."""
        for path in (self.older_path, self.path):
            if path.exists():
                path.replace(path.with_name(f"{path.name}.old"))

    def _rotate(self) -> None:
        """Begin a new file when this one is full. While another process holds the lock, it does so.

        A commit never waits for the lock: the process that holds it may be suspended.
        """
        if not self._is_full():
            return
        with suppress(Timeout), FileLock(f"{self.path}.lock", timeout=0, mode=0o600):
            if self._is_full():
                self.path.replace(self.older_path)

    def _is_full(self) -> bool:
        return self.path.exists() and self.path.stat().st_size >= MAX_BYTES


def _append_line(path: Path, line: bytes) -> None:
    """Append a line in one write, which the system does not mix with those of other processes."""
    file = os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600)
    try:
        size = os.fstat(file).st_size
        if (
            size and os.pread(file, 1, size - 1) != b"\n"
        ):  # the machine stopped while the last line was written
            line = b"\n" + line
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def _read_heads(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            head = json.loads(line)
        except ValueError:  # an incomplete line
            continue
        if isinstance(head, dict):
            yield head
