"""Reads GGUF files: the metadata, and tensors that are dequantised when they are needed.

The header is parsed here, because the reader of the package `gguf` takes seconds for a vocabulary. The types of
quantisation are those of that package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from service.errors import Misconfigured

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes
STRING, ARRAY = 8, 9  # types of values
FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
CHUNK = 1 << 20  # values that are dequantised at once; this bounds the temporary arrays


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file. Indexing it, as transformers does when it loads a weight, dequantises it."""

    blocks: np.ndarray  #: its bytes in the mapped file, a row of the matrix each
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __getitem__(self, _: object) -> Tensor:
        rows, columns = self.blocks.shape[0], self.shape[-1]
        result = torch.empty((rows, columns), dtype=self.dtype)
        step = max(1, CHUNK // columns)
        for start in range(0, rows, step):
            values = dequantize(np.array(self.blocks[start : start + step]), self.kind)
            result[start : start + step] = torch.from_numpy(values)
        return result.reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """The metadata of a file and where its tensors lie."""

    path: Path
    metadata: Mapping[str, Any]
    positions: Mapping[str, tuple[GGMLQuantizationType, tuple[int, ...], int]]  #: name -> type, shape, offset

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @cached_property
    def _bytes(self) -> np.ndarray:
        return np.memmap(self.path, np.uint8, "r")

    def tensor(self, name: str, dtype: torch.dtype) -> GgufTensor:
        """Return a tensor that is read and converted to `dtype` when it is indexed."""
        return GgufTensor(self.stored(name), self.positions[name][0], self.positions[name][1], dtype)

    def stored(self, name: str) -> np.ndarray:
        """Return the bytes of a tensor, (rows, bytes of a row), mapped."""
        kind, shape, offset = self.positions[name]
        row = _row_bytes(kind, shape[-1])
        rows = math.prod(shape[:-1])
        return self._bytes[offset : offset + rows * row].reshape(rows, row)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a file. Raise Misconfigured when it is not a complete GGUF file of a known version."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] != MAGIC:
        raise Misconfigured(
            f"the model {str(path)!r} is not a GGUF file: its first bytes are not {MAGIC.decode()}."
        )
    version = int.from_bytes(head[4:8], "little")
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        raise Misconfigured(
            f"the model {str(path)!r} is GGUF of version {version}, and versions {known} in little-endian byte order "
            "are read: convert it with the tools of llama.cpp."
        )
    try:
        return _parse(path, size)
    except (struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise Misconfigured(
            f"the model {str(path)!r} is truncated or damaged ({error}): get the file again."
        ) from error


def _parse(path: Path, size: int) -> GgufFile:
    """Parse the header. Raise a ValueError, KeyError or struct.error where the file does not have its form."""
    reader = _Reader(np.memmap(path, np.uint8, "r"))
    tensor_count, value_count = reader.unpack("QQ")
    metadata = {}
    for _ in range(value_count):
        key = reader.string()
        metadata[key] = reader.value(*reader.unpack("I"))
    infos = [reader.tensor_info() for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", DEFAULT_ALIGNMENT))
    start = -(-reader.position // alignment) * alignment
    positions = {}
    for name, kind, shape, offset in infos:
        end = start + offset + math.prod(shape[:-1]) * _row_bytes(kind, shape[-1])
        if end > size:
            raise ValueError(f"it has {size} bytes, and {name} ends at {end}")
        positions[name] = (kind, shape, start + offset)
    return GgufFile(path, metadata, positions)


def _row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"a row of {columns} values has no whole blocks of {kind.name}")
    return columns // block * block_bytes


class _Reader:
    """Reads values one after another."""

    def __init__(self, data: np.ndarray) -> None:
        self._data = data.data
        self.position = 8  # after the magic bytes and the version

    def unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._data, self.position)
        self.position += struct.calcsize(f"<{form}")
        return values

    def string(self) -> str:
        (length,) = self.unpack("Q")
        data = self._data[self.position : self.position + length]
        if len(data) < length:
            raise ValueError("a text goes beyond its end")
        self.position += length
        return bytes(data).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.unpack(FORMATS[kind])[0]
        item, count = self.unpack("IQ")
        if count > len(self._data):
            raise ValueError("an array goes beyond its end")
        if item in FORMATS:
            return list(self.unpack(f"{count}{FORMATS[item]}"))
        return [self.value(item) for _ in range(count)]

    def tensor_info(self) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int]:
        name = self.string()
        (dimensions,) = self.unpack("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"{name} has {dimensions} dimensions")
        shape = self.unpack(f"{dimensions}Q")[::-1]  # the file has the fastest dimension first
        kind, offset = self.unpack("IQ")
        return name, GGMLQuantizationType(kind), shape, offset
