"""Reading and writing of safetensors files: service.kit.safetensors_io."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load, save

from service.errors import InvalidInput
from service.kit import safetensors_io
from service.kit.safetensors_io import TensorInfo, build_header, read_safetensors
from tests.support.hostile_bodies import header_flood


def flooded_header(members: str) -> bytes:
    """Return a file whose header has these members, and that has no data."""
    header = b"{" + members.encode() + b"}"
    return len(header).to_bytes(8, "little") + header


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


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["F64", "F32", "U8"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    ),
    st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3),
)
def test_files_are_read_as_by_the_library(
    tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str]
) -> None:
    """Names, types, shapes and bytes of a valid file are those that the library reads."""
    infos = [TensorInfo(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()]
    size = sum(info.nbytes for info in infos)
    data = build_header(infos, metadata) + bytes(i % 256 for i in range(size))
    mine, library = read_safetensors(data, "it"), dict(deserialize(data))  # type: ignore[no-untyped-call]
    assert mine.metadata == metadata and set(mine.tensor_infos) == set(library)
    for name, tensor in library.items():
        info = mine.tensor_infos[name]
        assert (info.dtype, list(info.shape)) == (tensor["dtype"], tensor["shape"])
        assert mine.read(name) == bytes(tensor["data"])


class CountingFile(BytesIO):
    """A file that records how many bytes are read at once."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.sizes: list[int] = []

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.sizes.append(len(data))
        return data


def test_long_header_is_not_read() -> None:
    """A header above the limit is refused before it is read."""
    file = CountingFile((2_000_000).to_bytes(8, "little") + b"{}" + b" " * 2_000_000)
    with pytest.raises(InvalidInput, match="its header has 2000000 bytes, and at most 1000000 are read"):
        read_safetensors(file, "it")
    assert file.sizes == [8]


@pytest.mark.parametrize(
    "data",
    [
        header_flood(11_000),
        flooded_header('"__metadata__":{' + ",".join(f'"k{i}":""' for i in range(20_000)) + "}"),
        flooded_header('"a":{"dtype":"U8","shape":[' + "0," * 200_000 + '0],"data_offsets":[0,0]}'),
    ],
    ids=["tensors", "metadata", "shape"],
)
def test_header_with_many_values_is_not_parsed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header with more values than its tensors can have is refused before it is parsed."""

    def fail(*_: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(safetensors_io._Header, "model_validate_json", fail)
    with pytest.raises(InvalidInput, match="values and punctuation marks"):
        read_safetensors(data, "it", max_tensors=1000)


def test_tensors_are_read_one_by_one() -> None:
    """Opening a file reads its header only, and reading a tensor its bytes only."""
    infos = [TensorInfo(name, "U8", (100_000,)) for name in "abc"]
    file = CountingFile(build_header(infos, {}) + b"".join(bytes([i]) * 100_000 for i in range(3)))
    opened = read_safetensors(file, "it")
    assert max(file.sizes) < 1000
    file.sizes.clear()
    assert opened.read("b") == b"\1" * 100_000 and file.sizes == [100_000]
    section = opened.open("c")
    section.seek(99_990)
    assert section.read(100) == b"\2" * 10 and section.read() == b""
