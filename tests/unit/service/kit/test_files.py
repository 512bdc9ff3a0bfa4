"""Atomic writes: service.kit.files."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.kit.files import atomic_path, write_atomically


@pytest.mark.parametrize(("data", "content"), [(b"\x00\xff", b"\x00\xff"), ("é", "é".encode())])
def test_bytes_and_text_are_written(tmp_path: Path, data: bytes | str, content: bytes) -> None:
    """Bytes are written as they are and text in UTF-8; parent directories are created."""
    path = tmp_path / "a" / "b.json"
    write_atomically(path, data)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails keeps the previous content and leaves no temporary file."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write = Path.write_bytes

    def fail(self: Path, data: bytes) -> int:
        write(self, data[:1])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_concurrent_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Two writers of one file use different temporary files; the last one to finish wins."""
    path = tmp_path / "file"
    with atomic_path(path) as slow:
        slow.write_bytes(b"slow")
        write_atomically(path, b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow" and list(tmp_path.iterdir()) == [path]
