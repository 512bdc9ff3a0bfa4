"""The key of the ledger: signatures, its file and its text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service.errors import Misconfigured
from service.kit.signing import KEY_FILE, is_signed, key_id, new_key_text, parse_key, read_or_create_key


def test_a_signature_is_of_one_message_and_one_key() -> None:
    """A signature is valid for its message and its public key only."""
    key, other = (parse_key(new_key_text(), "test") for _ in range(2))
    signature = key.sign(b"message")
    assert is_signed(key.public_key, b"message", signature)
    assert not is_signed(key.public_key, b"other", signature)
    assert not is_signed(other.public_key, b"message", signature)
    assert key.id == key_id(key.public_key) != other.id


@pytest.mark.parametrize(
    ("public_key", "signature"), [("", ""), ("zz", "00"), ("00" * 32, "zz"), ("00" * 31, "00" * 64)]
)
def test_malformed_keys_and_signatures_are_invalid(public_key: str, signature: str) -> None:
    """A malformed public key or signature is invalid and raises nothing."""
    assert not is_signed(public_key, b"message", signature)


def test_the_file_is_created_once(tmp_path: Path) -> None:
    """Of several readers at once, one creates the file, with mode 0600, and all get its key."""
    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(lambda _: read_or_create_key(tmp_path).id, range(8)))
    assert len(ids) == 1
    assert (tmp_path / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 65, "g" * 64, "key"])
def test_a_malformed_key_is_refused(tmp_path: Path, text: str) -> None:
    """A text that is not 64 hexadecimal digits raises Misconfigured with the place, and the text is not repeated."""
    (tmp_path / KEY_FILE).write_text(text, encoding="ascii")
    with pytest.raises(Misconfigured, match=r"ledger\.key.*64 hexadecimal digits"):
        read_or_create_key(tmp_path)
    with pytest.raises(Misconfigured, match=r"^PALIMPSEST_LEDGER_KEY must hold 64"):
        parse_key(text, "PALIMPSEST_LEDGER_KEY")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """A key file that cannot be created raises Misconfigured with the setting to change."""
    with pytest.raises(Misconfigured, match="PALIMPSEST_LEDGER_KEY"):
        read_or_create_key(tmp_path / "missing")
