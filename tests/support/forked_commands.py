"""Processes of the command line, forked from a server that has imported the service and torch.

The imports take most of the start of a process. A forked process has its own process id, environment, standard streams
and signals, as one that a shell starts. tests/e2e/test_processes.py starts processes without the server.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.paths import ROOT

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.forked_commands_preload"])


class ForkedCommand:
    """`palimpsest ARGUMENTS` with exactly this environment and its output in files; used like `subprocess.Popen`."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path
    ) -> None:
        command = (list(arguments), dict(environment), str(stdout), str(stderr))
        self._process = _CONTEXT.Process(target=_run_command, args=command, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Wait for the process to exit. Return the exit code; after a signal, its negative number."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"process {self.pid} runs after {timeout:.0f} s"
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if the process runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_command(arguments: list[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    from cli.main import main

    sys.exit(main(arguments))
