"""A TCP proxy that misbehaves on demand: it resets connections, lets nothing pass, lets nobody in."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
HERE = "127.0.0.1"
CHUNK = 1 << 16
RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: closing sends RST and drops what is unsent


class Proxy:
    """Forwards a free port of this machine to `target`. It runs in a thread with an event loop of its own."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._open: set[asyncio.StreamWriter] = set()
        self._door: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy of {target}", daemon=True)
        self._thread.start()
        self.port = self._do(self._listen(0))

    # what it can do to those who pass

    def cut(self) -> int:
        """Reset every connection; returns how many ends that were."""
        return self._do(self._cut())

    def stall(self) -> None:
        """Let nothing pass: whoever is connected stays so and hears nothing."""
        self._loop.call_soon_threadsafe(self._flowing.clear)

    def refuse(self) -> None:
        """Reset every connection and let nobody in."""
        self._do(self._shut())

    def heal(self) -> None:
        """Behave again. What was held up passes now."""
        self._do(self._heal())

    def close(self) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # in the loop

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self, port: int) -> int:
        self._door = await asyncio.start_server(self._pass, HERE, port)
        return int(self._door.sockets[0].getsockname()[1])

    async def _cut(self) -> int:
        ends = list(self._open)
        for writer in ends:
            _reset(writer)
        return len(ends)

    async def _shut(self) -> None:
        if self._door is not None:
            self._door.close()
            self._door = None
        await self._cut()

    async def _heal(self) -> None:
        self._flowing.set()
        if self._door is None:
            await self._listen(self.port)

    async def _end(self) -> None:
        await self._shut()
        passing = asyncio.all_tasks() - {asyncio.current_task()}
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, both ways, until either end is gone."""
        ends = {writer}
        self._open |= ends
        try:
            await self._flowing.wait()
            there_reader, there = await asyncio.open_connection(HERE, self.target)
            ends |= {there}
            self._open |= ends
            if writer.transport.is_closing():  # cut while we knocked
                _reset(there)
            await asyncio.gather(self._pump(reader, there), self._pump(there_reader, writer))
        except OSError:
            _reset(writer)
        except asyncio.CancelledError:
            pass  # the proxy ends; a cancelled callback would only be logged
        finally:
            self._open -= ends
            for end in ends:
                end.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK):
                await self._flowing.wait()
                sink.write(data)
                await sink.drain()
            sink.write_eof()
        except (OSError, RuntimeError):
            _reset(sink)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close at once, so that the other side meets an error and no orderly end."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
