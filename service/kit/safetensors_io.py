"""Files of safetensors: written piece by piece, so that the same tensors are always the same bytes; read with suspicion.

Free of torch. The library's own writer wants everything in memory at once, and its order of metadata is not promised.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
from safetensors import SafetensorError

from service.errors import InvalidInput

#: bytes of a number, by the format's names of types
DTYPE_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1}
_NUMPY_DTYPES: dict[str, Any] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "U8": np.dtype("u1")}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file, without its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]


def build_header(tensors: Sequence[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """What a file begins with; the bytes of the tensors follow, in this order."""
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
    """What a file holds."""

    metadata: dict[str, str]
    tensor_infos: dict[str, TensorInfo]
    data: dict[str, memoryview]

    def to_numpy(self, name: str) -> np.ndarray[Any, Any]:
        """A tensor of a type that Python has."""
        info = self.tensor_infos[name]
        return np.frombuffer(self.data[name], _NUMPY_DTYPES[info.dtype]).reshape(info.shape)


def read_safetensors(data: bytes, label: str) -> SafetensorsFile:
    """The tensors of a file. Raises InvalidInput for everything that is none: the library checks every offset before."""
    try:
        entries = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
        length = int.from_bytes(data[:8], "little")
        header_json = json.loads(data[8 : 8 + length])
    except (SafetensorError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidInput(f"{label} is no file of safetensors that can be read: {error}") from None
    tensor_infos = {
        name: TensorInfo(name, str(t["dtype"]), tuple(map(int, t["shape"]))) for name, t in entries
    }
    metadata = header_json.get("__metadata__") or {}
    return SafetensorsFile(metadata, tensor_infos, {name: memoryview(t["data"]) for name, t in entries})
