"""Rendering of untrusted templates in a process with limits, `service.kit.template_process`."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

from service.errors import InvalidInput, Unavailable

CPU_SECONDS = 2.0  #: processor time of one rendering
MAX_MEMORY = 512 * 2**20  #: bytes of address space
#: seconds that a rendering may take by the clock; only a machine without processor time for it reaches them
WALL_SECONDS = 30.0
#: seconds that a rendering waits for those before it
QUEUE_SECONDS = 10.0
#: renderings in a row that may exceed the limits; then all are refused for PAUSE_SECONDS, so that they hold no threads
MAX_FAILURES = 3
PAUSE_SECONDS = 60.0
_MODULE = "service.kit.template_process"


class TemplateRenderer:
    """Renders one template at a time. The process starts with the first one and ends with this object. Thread-safe."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS, max_memory: int = MAX_MEMORY) -> None:
        self._cpu_seconds, self._max_memory = cpu_seconds, max_memory
        self._lock = threading.Lock()
        self._failures = 0  # renderings in a row that exceeded the limits
        self._paused_until = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize[..., TemplateRenderer] | None = None

    def render(self, source: str, variables: Mapping[str, Any], field: str = "") -> str:
        """Return the text of a template.

        Raise InvalidInput if the template fails or needs too much, and Unavailable if too many others are waiting.
        """
        request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        self._check_pause()
        if not self._lock.acquire(timeout=QUEUE_SECONDS):
            raise Unavailable("too many conversations wait for the chat template: try again.")
        try:
            self._check_pause()
            line = self._exchange(request)
            self._record_outcome(bool(line))
        finally:
            self._lock.release()
        if not line:
            raise InvalidInput(
                f"the model's chat template does not render these messages in {self._cpu_seconds:g} s of processor time and "
                f"{self._max_memory // 2**20} MiB of memory: send fewer or shorter messages.",
                field,
            )
        answer = json.loads(line)
        if "refusal" in answer:
            raise InvalidInput(f"the model's chat template refuses the messages: {answer['refusal']}", field)
        if "error" in answer:
            raise InvalidInput(f"the model's chat template fails on these messages: {answer['error']}", field)
        return str(answer["text"])

    def _check_pause(self) -> None:
        if time.monotonic() < self._paused_until:
            raise Unavailable(
                "the model's chat template took too long several times in a row: try again in a minute, or serve another "
                "model."
            )

    def _record_outcome(self, has_answer: bool) -> None:
        self._failures = 0 if has_answer else self._failures + 1
        if self._failures >= MAX_FAILURES:
            self._failures, self._paused_until = 0, time.monotonic() + PAUSE_SECONDS

    def close(self) -> None:
        """End the process. It starts again when it is needed."""
        with self._lock:
            self._end()

    def _exchange(self, request: bytes) -> bytes:
        """Return the answer line of the process; empty if it has ended or did not answer."""
        process = self._running_process()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request)
            process.stdin.flush()
            line = _read_line(process.stdout, time.monotonic() + WALL_SECONDS)
        except BrokenPipeError:
            line = b""
        if not line:
            self._end()
        return line

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(self._cpu_seconds), str(self._max_memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={
                    "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))
                },  # nothing of the service's own
            )
            self._stop = weakref.finalize(self, _end_process, self._process)
        return self._process

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _read_line(stream: IO[bytes], deadline: float) -> bytes:
    """Return a line; empty at the end of the stream and after the deadline."""
    parts: list[bytes] = []
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while (remaining := deadline - time.monotonic()) > 0:
            if not selector.select(remaining):
                continue
            if not (part := os.read(stream.fileno(), 1 << 20)):
                return b""
            parts.append(part)
            if part.endswith(b"\n"):
                return b"".join(parts)
    return b""


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # a request that the process did not read
                stream.close()
    process.wait()
