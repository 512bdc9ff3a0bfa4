"""Files of safetensors, by our own hand and by the library's: service.kit.safetensors_io."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load, save

from service.errors import InvalidInput
from service.kit.safetensors_io import Described, header, read


def test_the_library_reads_what_is_written() -> None:
    """Names, shapes, bytes and metadata; also of a tensor without entries."""
    a, b = np.arange(6, dtype="<f4").reshape(2, 3), np.zeros((0, 3), "<f4")
    listed = [Described("a", "F32", (2, 3)), Described('ü "quoted"', "F32", (0, 3))]
    data = header(listed, {"x": "{}"}) + a.tobytes() + b.tobytes()
    found = load(data)
    assert np.array_equal(found["a"], a) and found['ü "quoted"'].shape == (0, 3)
    mine = read(data, "it")
    assert mine.metadata == {"x": "{}"} and np.array_equal(mine.numbers("a"), a)


def test_numbers_begin_where_machines_like_them() -> None:
    """At a multiple of eight bytes."""
    for length in range(9):
        assert len(header([Described("x" * length, "U8", (1,))], {})) % 8 == 0


def readable(data: bytes) -> bool:
    """Whether the library takes it."""
    try:
        load(data)
    except SafetensorError:
        return False
    return True


@given(st.binary(max_size=60))
def test_what_is_no_file_is_refused(data: bytes) -> None:
    """In words, and never with another error."""
    if readable(data):
        assert set(read(data, "it").data) == set(load(data))
        return
    with pytest.raises(InvalidInput, match="it is no file of safetensors"):
        read(data, "it")


@pytest.mark.parametrize(
    "offsets",
    [[0, 5], [4, 8], [0, 2**63], [8, 0], [-4, 0]],
    ids=["longer", "a gap", "huge", "backwards", "negative"],
)
def test_offsets_are_believed_only_where_they_fit(offsets: list[int]) -> None:
    """A tensor is where the file has bytes for it."""
    said = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
    with pytest.raises(InvalidInput):
        read(len(said).to_bytes(8, "little") + said + b"\0" * 4, "it")


def test_every_cut_is_noticed() -> None:
    """Wherever a file ends too early."""
    data = save({"a": np.ones(4, np.float32)}, {"x": "y"})
    for at in range(len(data)):
        with pytest.raises(InvalidInput):
            read(data[:at], "it")
