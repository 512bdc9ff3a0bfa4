"""A folder as one file: a zip without compression, clocks or chance, so that the same files are always the same bytes.

Free of torch. Written to a file of its own, so that nothing large is held in memory.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from typing import IO

Pieces = Iterable[bytes | memoryview]
_NEVER = (1980, 1, 1, 0, 0, 0)  # the earliest that the format has
_BIG = 2**31  # from here on sizes take more room in the format


def write(file: IO[bytes], files: Mapping[str, tuple[int, Pieces]]) -> None:
    """Each file by its name: its size in bytes, and its pieces."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (size, pieces) in sorted(files.items()):
            told = zipfile.ZipInfo(name, _NEVER)
            told.create_system, told.external_attr, told.file_size = 3, 0o644 << 16, size
            with archive.open(told, "w", force_zip64=size >= _BIG) as inside:
                for piece in pieces:
                    inside.write(piece)
