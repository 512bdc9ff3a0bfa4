"""The Ed25519 key that signs audit records. It is stored outside the database."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from service.errors import Misconfigured

KEY_FILE = "ledger.key"  #: in the data folder
ID_LENGTH = 16  #: hexadecimal digits of the id of a key
_HEX_KEY = re.compile(r"[0-9a-fA-F]{64}")


class SigningKey:
    """A private key. Everybody can verify its signatures with the public key, and only its holder can sign."""

    def __init__(self, seed: bytes) -> None:
        self._private_key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._private_key.public_key().public_bytes_raw().hex()
        self.id = key_id(self.public_key)

    def sign(self, message: bytes) -> str:
        """Return the signature of a message in hexadecimal."""
        return self._private_key.sign(message).hex()


def key_id(public_key: str) -> str:
    """Return the short id of a public key."""
    return hashlib.sha256(public_key.encode()).hexdigest()[:ID_LENGTH]


def is_signed(public_key: str, message: bytes, signature: str) -> bool:
    """Return whether a signature of a message was made with the private key of this public key."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(
            bytes.fromhex(signature), message
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def new_key_text() -> str:
    """Return a new random key as the setting and the file hold it: 64 hexadecimal digits."""
    return secrets.token_hex(32)


def parse_key(text: str, where: str) -> SigningKey:
    """Return the key of 64 hexadecimal digits. Raises Misconfigured, with the place of the text, for any other text."""
    if not _HEX_KEY.fullmatch(text.strip()):
        raise Misconfigured(
            f"{where} must hold 64 hexadecimal digits, for example the output of `openssl rand -hex 32`."
        )
    return SigningKey(bytes.fromhex(text.strip()))


def read_or_create_key(folder: Path) -> SigningKey:
    """Return the key in the file KEY_FILE of a folder. A missing file is created with a new key and mode 0600."""
    path = folder / KEY_FILE
    try:
        if not path.exists():
            _create_key_file(path)
        return _parse_key_file(path)
    except OSError as error:
        raise Misconfigured(
            f"the key of the ledger cannot be read or created: {error}. Set PALIMPSEST_LEDGER_KEY, or PALIMPSEST_DATA_DIR to a "
            "folder that this process can write."
        ) from None


def read_key(folder: Path) -> SigningKey:
    """Return the key in the file KEY_FILE of a folder. Raises Misconfigured if there is none."""
    try:
        return _parse_key_file(folder / KEY_FILE)
    except OSError as error:
        raise Misconfigured(
            f"the key of the ledger cannot be read: {error}. Set PALIMPSEST_LEDGER_KEY, or PALIMPSEST_DATA_DIR to the folder of "
            "the service."
        ) from None


def _parse_key_file(path: Path) -> SigningKey:
    return parse_key(path.read_text(encoding="ascii", errors="replace"), str(path))


def _create_key_file(path: Path) -> None:
    """Create the file of a new key. Of several processes that do this at once, one creates the file."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    write_key_file(temporary, new_key_text())
    try:
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def write_key_file(path: Path, text: str) -> None:
    """Write a key to a new file that only its owner can read, and wait until it is on the disk."""
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(file, text.encode() + b"\n")
        os.fsync(file)
    finally:
        os.close(file)
