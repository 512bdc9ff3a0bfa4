"""Reproducible zip archives: no compression and no timestamps, so that equal files give equal bytes. Free of torch."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from typing import IO

ByteChunks = Iterable[bytes | memoryview]
_EARLIEST_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest date of the format
_ZIP64_THRESHOLD = 2**31  # bytes from which an entry uses 64-bit sizes


def write_zip(file: IO[bytes], files: Mapping[str, tuple[int, ByteChunks]]) -> None:
    """Write a zip of files, given by name as the size in bytes and the chunks, one chunk at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (size, chunks) in sorted(files.items()):
            info = zipfile.ZipInfo(name, _EARLIEST_DATE)
            info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, size
            with archive.open(info, "w", force_zip64=size >= _ZIP64_THRESHOLD) as entry:
                for chunk in chunks:
                    entry.write(chunk)
