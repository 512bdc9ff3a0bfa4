"""Reading and writing of safetensors files: service.kit.safetensors_io."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from service.errors import InvalidInput
from service.kit.safetensors_io import TensorInfo, build_header, read_safetensors


def test_library_reads_written_files() -> None:
    """The library reads names, shapes, bytes and metadata, also of a tensor without entries."""
    a, b = np.arange(6, dtype="<f4").reshape(2, 3), np.zeros((0, 3), "<f4")
    listed = [TensorInfo("a", "F32", (2, 3)), TensorInfo('ü "quoted"', "F32", (0, 3))]
    data = build_header(listed, {"x": "{}"}) + a.tobytes() + b.tobytes()
    found = load(data)
    assert np.array_equal(found["a"], a) and found['ü "quoted"'].shape == (0, 3)
    mine = read_safetensors(data, "it")
    assert mine.metadata == {"x": "{}"} and np.array_equal(mine.to_numpy("a"), a)


def test_tensor_data_is_aligned() -> None:
    """The data begins at a multiple of eight bytes."""
    for length in range(9):
        assert len(build_header([TensorInfo("x" * length, "U8", (1,))], {})) % 8 == 0


def is_readable(data: bytes) -> bool:
    """Return whether the library reads the file."""
    try:
        load(data)
    except SafetensorError:
        return False
    return True


@given(st.binary(max_size=60))
def test_invalid_files_are_refused(data: bytes) -> None:
    """An invalid file raises InvalidInput and no other error."""
    if is_readable(data):
        assert set(read_safetensors(data, "it").tensor_infos) == set(load(data))
        return
    with pytest.raises(InvalidInput, match="it is not a valid safetensors file"):
        read_safetensors(data, "it")


@pytest.mark.parametrize(
    "offsets",
    [[0, 5], [4, 8], [0, 2**63], [8, 0], [-4, 0]],
    ids=["longer", "a gap", "huge", "backwards", "negative"],
)
def test_invalid_offsets_are_refused(offsets: list[int]) -> None:
    """Offsets outside the data are refused."""
    header_json = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    with pytest.raises(InvalidInput):
        read_safetensors(len(header_json).to_bytes(8, "little") + header_json + b"\0" * 4, "it")


def test_every_truncation_is_detected() -> None:
    """A file truncated at any byte is refused."""
    data = save({"a": np.ones(4, np.float32)}, {"x": "y"})
    for length in range(len(data)):
        with pytest.raises(InvalidInput):
            read_safetensors(data[:length], "it")
