"""A TCP proxy that can reset connections, stall them, or refuse new ones."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
LOCALHOST = "127.0.0.1"
CHUNK_SIZE = 1 << 16
LINGER_RESET = struct.pack("ii", 1, 0)  # SO_LINGER of zero seconds: close sends RST and drops unsent data


class Proxy:
    """Forwards a free local port to `target`. Runs in a thread with its own event loop."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._flow_allowed = asyncio.Event()
        self._flow_allowed.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy of {target}", daemon=True)
        self._thread.start()
        self.port = self._run_in_loop(self._listen(0))

    # faults

    def cut(self) -> int:
        """Reset every connection. Return the number of sockets closed."""
        return self._run_in_loop(self._cut())

    def stall(self) -> None:
        """Stop forwarding data; connections stay open."""
        self._loop.call_soon_threadsafe(self._flow_allowed.clear)

    def refuse(self) -> None:
        """Reset every connection and refuse new ones."""
        self._run_in_loop(self._refuse())

    def heal(self) -> None:
        """Resume normal operation. Stalled data is forwarded."""
        self._run_in_loop(self._heal())

    def close(self) -> None:
        self._run_in_loop(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # on the event loop

    def _run_in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _listen(self, port: int) -> int:
        self._server = await asyncio.start_server(self._forward, LOCALHOST, port)
        return int(self._server.sockets[0].getsockname()[1])

    async def _cut(self) -> int:
        writers = list(self._writers)
        for writer in writers:
            _reset(writer)
        return len(writers)

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _heal(self) -> None:
        self._flow_allowed.set()
        if self._server is None:
            await self._listen(self.port)

    async def _shut_down(self) -> None:
        await self._refuse()
        forwarding = asyncio.all_tasks() - {asyncio.current_task()}
        for task in forwarding:
            task.cancel()
        await asyncio.gather(*forwarding, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward one connection in both directions until either side closes it."""
        writers = {writer}
        self._writers |= writers
        try:
            await self._flow_allowed.wait()
            upstream_reader, upstream = await asyncio.open_connection(LOCALHOST, self.target)
            writers |= {upstream}
            self._writers |= writers
            if writer.transport.is_closing():  # reset during the connect
                _reset(upstream)
            await asyncio.gather(self._pump(reader, upstream), self._pump(upstream_reader, writer))
        except OSError:
            _reset(writer)
        except asyncio.CancelledError:
            pass  # the proxy is closing; asyncio would log the cancelled callback
        finally:
            self._writers -= writers
            for end in writers:
                end.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(CHUNK_SIZE):
                await self._flow_allowed.wait()
                sink.write(data)
                await sink.drain()
            sink.write_eof()
        except (OSError, RuntimeError):
            _reset(sink)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST, so that the peer gets an error instead of an orderly shutdown."""
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    writer.transport.abort()
