"""The shell and the Python interpreter that run the blocks of one page. Both keep their state between blocks."""

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

from tests.support.page_blocks import PYTHON_LANGUAGES, Block
from tests.support.paths import ROOT

BLOCK_TIMEOUT = 600.0  # seconds for one block
END_MARK = "\x1eended\x1e"

PYTHON_LOOP = f"""
import json, sys
names = {{"__name__": "__main__"}}
for line in sys.stdin:
    page, first, code = json.loads(line)
    exec(compile("\\n" * first + code, page, "exec"), names)
    print({END_MARK!r}, end="", flush=True)
"""
#: a failing command ends the shell; for curl, a status of 400 and above is a failure. A setup may wait until the
#: service has `settled`, since jobs on a loaded machine take longer than the Prefer header waits
SHELL_PRELUDE = """set -e -o pipefail
curl() { command curl --fail-with-body "$@"; }
settled() { while command curl -sS "$PALIMPSEST_URL/models" | grep -q '"queued":[1-9]\\|"running":[1-9]'; do sleep 0.2; done; }
"""


class BlockFailed(AssertionError):
    """A block failed; the message has its output."""


class _Interpreter:
    """A process that runs code and reports when it has ended."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def send(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode())
        self._process.stdin.flush()

    def read_output(self) -> tuple[str, bool]:
        """Run code. Return its output and whether it succeeded."""
        output, deadline = b"", time.monotonic() + BLOCK_TIMEOUT
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as ready:
            ready.register(self._process.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                if not ready.select(timeout=1.0):
                    continue
                chunk = os.read(self._process.stdout.fileno(), 65536)
                output += chunk
                if not chunk or END_MARK.encode() in output:
                    text, ended, _ = output.decode(errors="replace").partition(END_MARK)
                    return text, bool(ended)
        return f"{output.decode(errors='replace')}\n(not ended after {BLOCK_TIMEOUT:.0f} s)", False

    def close(self) -> None:
        """End the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


class DocSession:
    """A folder in which the blocks of a page run, with the programs of this environment and the files of the
    repository."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, port: int = 8000) -> None:
        self.folder, self._port = folder, port
        self._interpreters: dict[str, _Interpreter] = {}
        self._environment = _environment(folder) | dict(environment or {})
        _link_repository(folder)

    def __enter__(self) -> DocSession:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for interpreter in self._interpreters.values():
            interpreter.close()

    def run(self, block: Block) -> str:
        """Run a block and return its output, with the port of the documentation. Raises BlockFailed."""
        if block.setup:
            self._shell(block.setup, block)
        if block.language in PYTHON_LANGUAGES:
            return self._python(block)
        return self._shell(block.code, block)

    def _shell(self, code: str, block: Block) -> str:
        interpreter = self._interpreter("shell", ["bash", "--noprofile", "--norc"], SHELL_PRELUDE)
        script = self.folder / ".block.sh"
        script.write_text(self._with_port(code), encoding="utf-8")
        interpreter.send(
            f". {script} < /dev/null; printf %s $'{END_MARK.encode('unicode_escape').decode()}'\n"
        )
        return self._output_of(interpreter, block, code)

    def _python(self, block: Block) -> str:
        interpreter = self._interpreter("python", [sys.executable, "-u", "-c", PYTHON_LOOP])
        interpreter.send(json.dumps([block.page, block.line, self._with_port(block.code)]) + "\n")
        return self._output_of(interpreter, block, block.code)

    def _interpreter(self, name: str, command: list[str], prelude: str = "") -> _Interpreter:
        if name not in self._interpreters:
            self._interpreters[name] = _Interpreter(command, self.folder, self._environment)
            if prelude:
                self._interpreters[name].send(prelude)
        return self._interpreters[name]

    def _output_of(self, interpreter: _Interpreter, block: Block, code: str) -> str:
        output, succeeded = interpreter.read_output()
        output = output.replace(f"127.0.0.1:{self._port}", "127.0.0.1:8000")
        if not succeeded:
            raise BlockFailed(f"{block} fails:\n{code}\nIt printed:\n{output}")
        return output

    def _with_port(self, code: str) -> str:
        return code.replace("127.0.0.1:8000", f"127.0.0.1:{self._port}")


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment without the settings of the machine, with the programs of this environment first in
    PATH."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PALIMPSEST_", "COMPOSE_"))}
    return inherited | {
        "HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
        "NO_COLOR": "1",
        "PALIMPSEST_PROGRESS": "none",  # lines of progress depend on the speed of the machine
        "OMP_NUM_THREADS": "1",
        "PALIMPSEST_THREADS": "1",
        "PALIMPSEST_DATA_DIR": str(folder / "data"),
        "MPLBACKEND": "agg",
    }


def _link_repository(folder: Path) -> None:
    """Link the files of the repository into a folder; files that a page writes stay in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in ROOT.iterdir():
        if entry.name not in (".git", ".venv", "docs", "runs", "data") and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    (folder / "docs").mkdir(exist_ok=True)
    (folder / ".venv").symlink_to(Path(sys.prefix))
