"""A folder as one file: a zip without compression, clocks or chance, so that the same files are always the same bytes.

Free of torch. Written to a file of its own, so that nothing large is held in memory.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from typing import IO

ByteChunks = Iterable[bytes | memoryview]
_EARLIEST_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that the format has
_ZIP64_THRESHOLD = 2**31  # from here on sizes take more room in the format


def write_zip(file: IO[bytes], files: Mapping[str, tuple[int, ByteChunks]]) -> None:
    """Each file by its name: its size in bytes, and its pieces."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (size, chunks) in sorted(files.items()):
            info = zipfile.ZipInfo(name, _EARLIEST_DATE)
            info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, size
            with archive.open(info, "w", force_zip64=size >= _ZIP64_THRESHOLD) as entry:
                for chunk in chunks:
                    entry.write(chunk)
