"""The file of heads outside the database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from service.ledger import head_file
from service.ledger.head_file import FILE_NAME, HeadFile


def test_heads_are_lines(tmp_path: Path) -> None:
    """Each head is a line of JSON in a file that only its owner can read."""
    heads = [{"position": n, "record": str(n)} for n in range(3)]
    for head in heads:
        HeadFile(tmp_path).append(head)
    assert HeadFile(tmp_path).heads() == heads
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 3
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_the_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of at most MAX_BYTES and one line are kept, with the newest heads."""
    monkeypatch.setattr(head_file, "MAX_BYTES", 200)
    for number in range(100):
        HeadFile(tmp_path).append({"position": number})
    kept = [head["position"] for head in HeadFile(tmp_path).heads()]
    assert kept == list(range(kept[0], 100))
    assert 10 < len(kept) < 50
    assert sum(path.stat().st_size for path in tmp_path.glob(f"{FILE_NAME}*")) < 500


def test_concurrent_appends_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of several writers are whole lines, also while files are renamed."""
    monkeypatch.setattr(head_file, "MAX_BYTES", 1000)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: HeadFile(tmp_path).append({"position": n}), range(80)))
    assert len({head["position"] for head in HeadFile(tmp_path).heads()}) == 80


@pytest.mark.parametrize("size", [1_000_000, 10])
def test_append_does_not_wait_for_a_suspended_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A head is written while another process holds the lock, also when the file is full."""
    monkeypatch.setattr(head_file, "MAX_BYTES", size)
    heads = [{"position": number} for number in range(3)]
    with FileLock(tmp_path / f"{FILE_NAME}.lock"):
        for head in heads:
            HeadFile(tmp_path).append(head)
    assert HeadFile(tmp_path).heads() == heads
    HeadFile(tmp_path).append({"position": 3})
    assert (tmp_path / f"{FILE_NAME}.1").exists() == (size == 10)


def test_an_incomplete_line_is_omitted(tmp_path: Path) -> None:
    """A line that was not written completely is omitted, and the next head is a line of its own."""
    (tmp_path / FILE_NAME).write_text('{"position": 1}\n{"posi', encoding="ascii")
    heads = HeadFile(tmp_path)
    heads.append({"position": 2})
    assert heads.heads() == [{"position": 1}, {"position": 2}]


def test_forgotten_heads_are_kept_aside(tmp_path: Path) -> None:
    """`forget` renames the files."""
    heads = HeadFile(tmp_path)
    heads.append({"position": 1})
    heads.forget()
    assert heads.heads() == []
    assert (tmp_path / f"{FILE_NAME}.old").exists()
