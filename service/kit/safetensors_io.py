"""Safetensors files: written in chunks with reproducible bytes, and read with validation.

Free of torch. The writer of the library needs all tensors in memory and does not guarantee the order of metadata.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.errors import InvalidInput
from service.kit.large_json import scan_tokens

#: dtype as the format names it -> bytes
DTYPE_SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1,
    "F8_E5M2": 1, "F8_E4M3": 1, "BOOL": 1,
}  # fmt: skip
_NUMPY_DTYPES: dict[str, Any] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1"),
}  # fmt: skip


MAX_HEADER = 1_000_000  #: bytes
MAX_TENSORS = 10_000
MAX_TOKENS_OF_TENSOR = 60  #: of JSON, in the header: name, dtype, shape and offsets, with white space
MAX_TOKENS_OF_METADATA = 1000


class ReadableFile(Protocol):
    """A file that is read at any place."""

    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...


class FileSection:
    """A part of a file as a file."""

    def __init__(self, file: ReadableFile, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        rest = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(rest if size < 0 else min(size, rest))
        self._position += len(data)
        return data


class _HeaderEntry(BaseModel):
    """A tensor in the header of a file."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=8)]
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]


class _Header(BaseModel):
    """The header of a file: its metadata, and a tensor for each other name."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _HeaderEntry]

    metadata: dict[str, str] | None = Field(None, alias="__metadata__")


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor in bytes."""
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]


def build_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the header of a file. The bytes of the tensors follow in the given order."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for t in tensors:
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [offset, offset + t.nbytes],
        }
        offset += t.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class SafetensorsFile:
    """The header of a file, and the file to read its tensors from."""

    metadata: dict[str, str]
    tensor_infos: dict[str, TensorInfo]
    _offsets: dict[str, int]  #: of each tensor in the file
    _file: ReadableFile

    def read(self, name: str) -> bytes:
        """Return the bytes of a tensor."""
        return self.open(name).read()

    def open(self, name: str) -> FileSection:
        """Return the bytes of a tensor as a file."""
        return FileSection(self._file, self._offsets[name], self.tensor_infos[name].nbytes)

    def to_numpy(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor as an array. Its dtype must be F64, F32, I64 or U8."""
        info = self.tensor_infos[name]
        return np.frombuffer(self.read(name), _NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def read_safetensors(
    source: ReadableFile | bytes, label: str, max_header: int = MAX_HEADER, max_tensors: int = MAX_TENSORS
) -> SafetensorsFile:
    """Return the header of a file, whose tensors are then read one by one.

    Raise InvalidInput if it is not valid safetensors, or if its header exceeds `max_header` bytes or `max_tensors`
    tensors. A header is limited before it is parsed, and the tensors must fill the file without gaps.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("it is shorter than its header says")
        if length > max_header:
            raise ValueError(f"its header has {length} bytes, and at most {max_header} are read")
        header = file.read(length)
        for _ in scan_tokens(header, MAX_TOKENS_OF_METADATA + MAX_TOKENS_OF_TENSOR * max_tensors):
            pass
        parsed = _Header.model_validate_json(header)
        return _locate_tensors(parsed, file, 8 + length, size)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        reason = (
            f"its header is invalid: {place}: {first['msg']}"
            if place
            else f"its header is invalid: {first['msg']}"
        )
        raise InvalidInput(f"{label} is not a valid safetensors file: {reason}.") from None
    except ValueError as error:
        raise InvalidInput(f"{label} is not a valid safetensors file: {error}.") from None


def _locate_tensors(header: _Header, file: ReadableFile, start: int, size: int) -> SafetensorsFile:
    """Return the file with the place of each tensor. Raise ValueError unless they fill it without gaps."""
    infos, offsets, end = {}, {}, 0
    entries = header.model_extra or {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPE_SIZES:
            raise ValueError(f"the tensor {name!r} has the unknown type {entry.dtype!r}")
        infos[name] = TensorInfo(name, entry.dtype, entry.shape)
        first, last = entry.data_offsets
        if first != end or last - first != infos[name].nbytes:
            raise ValueError(f"the offsets of the tensor {name!r} are wrong")
        offsets[name], end = start + first, last
    if start + end != size:
        raise ValueError("its tensors do not fill it")
    return SafetensorsFile(header.metadata or {}, {name: infos[name] for name in entries}, offsets, file)
