"""What the blocks of one page are run in: a shell and a Python interpreter of the page's own, which remember from block to block."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from tests.support.page_blocks import PYTHON, ROOT, Block

PATIENCE = 600.0  # seconds for one block
ENDED = "\x1eended\x1e"

INTERPRETER = f"""
import json, sys
names = {{"__name__": "__main__"}}
for line in sys.stdin:
    page, first, code = json.loads(line)
    exec(compile("\\n" * first + code, page, "exec"), names)
    print({ENDED!r}, end="", flush=True)
"""
#: what fails ends the shell, and that nothing follows is how it is told; an answer of 400 and above is a failure of curl's. A setup may
#: wait until the service has `settled`: a busy machine takes longer than a reader, or the header Prefer, would wait
SHELL = """set -e -o pipefail
curl() { command curl --fail-with-body "$@"; }
settled() { while command curl -sS "$PALIMPSEST_URL/models" | grep -q '"queued":[1-9]\\|"running":[1-9]'; do sleep 0.2; done; }
"""


class Failed(AssertionError):
    """A block did not do what the page says; with what it printed."""


class _Talk:
    """A process that is given code to run and says when that has ended."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def send(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def answer(self) -> tuple[str, bool]:
        """What was printed until the code ended, and whether it ended well."""
        said, deadline = b"", time.monotonic() + PATIENCE
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if not ready.select(timeout=1.0):
                    continue
                part = os.read(self._process.stdout.fileno(), 65536)
                said += part
                if not part or ENDED.encode() in said:
                    text, ended, _ = said.decode(errors="replace").partition(ENDED)
                    return text, bool(ended)
        return f"{said.decode(errors='replace')}\n(not ended after {PATIENCE:.0f} s)", False

    def close(self) -> None:
        """End it, and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


class Session:
    """A folder in which a page is followed, with this environment's programs and the files of the repository."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, port: int = 8000) -> None:
        self.folder, self._port = folder, port
        self._talks: dict[str, _Talk] = {}
        self._environment = _environment(folder) | dict(environment or {})
        _furnish(folder)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for talk in self._talks.values():
            talk.close()

    def run(self, block: Block) -> str:
        """What a block prints, with the port that pages are written for; Failed when it fails."""
        if block.setup:
            self._shell(block.setup, block)
        if block.language in PYTHON:
            return self._python(block)
        return self._shell(block.code, block)

    def _shell(self, code: str, block: Block) -> str:
        talk = self._talk("shell", ["bash", "--noprofile", "--norc"], SHELL)
        script = self.folder / ".block.sh"
        script.write_text(self._here(code), encoding="utf-8")
        talk.send(f". {script} < /dev/null; printf %s $'{ENDED.encode('unicode_escape').decode()}'\n")
        return self._answer(talk, block, code)

    def _python(self, block: Block) -> str:
        talk = self._talk("python", [sys.executable, "-u", "-c", INTERPRETER])
        talk.send(json.dumps([block.page, block.line, self._here(block.code)]) + "\n")
        return self._answer(talk, block, block.code)

    def _talk(self, name: str, command: list[str], first: str = "") -> _Talk:
        if name not in self._talks:
            self._talks[name] = _Talk(command, self.folder, self._environment)
            if first:
                self._talks[name].send(first)
        return self._talks[name]

    def _answer(self, talk: _Talk, block: Block, code: str) -> str:
        said, well = talk.answer()
        said = said.replace(f"127.0.0.1:{self._port}", "127.0.0.1:8000")
        if not well:
            raise Failed(f"{block} fails:\n{code}\nIt printed:\n{said}")
        return said

    def _here(self, code: str) -> str:
        return code.replace("127.0.0.1:8000", f"127.0.0.1:{self._port}")


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of this machine's settings; the programs of this environment first."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PALIMPSEST_", "COMPOSE_"))}
    return kept | {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
        "PALIMPSEST_THREADS": "1",
        "PALIMPSEST_DATA": str(folder / "data"),
        "MPLBACKEND": "agg",
    }


def _furnish(folder: Path) -> None:
    """The repository as a page sees it: its files are there, and what a page writes stays in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "docs", "runs", "data") and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    (folder / "docs").mkdir(exist_ok=True)
    (folder / ".venv").symlink_to(Path(sys.prefix))
