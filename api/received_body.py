"""The body of a request as it is received: in memory, or in a temporary file if it is large."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import IO

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from api.errors import PayloadTooLarge

MAX_IN_MEMORY = 1_000_000  #: bytes of a body that is kept in memory


@dataclass(frozen=True)
class ReceivedBody:
    """A body, and where it is kept."""

    size: int  #: bytes
    file: IO[bytes]
    is_in_memory: bool

    def read(self) -> bytes:
        """Return the whole body."""
        self.file.seek(0)
        return self.file.read()


@asynccontextmanager
async def receive_body(
    request: Request, limit: int, count_upload: Callable[[], AbstractContextManager[None]]
) -> AsyncIterator[ReceivedBody]:
    """Receive the body. Raises PayloadTooLarge as soon as it exceeds `limit` bytes.

    `count_upload` is entered before a body is kept in a file, until the context ends.
    """
    too_large = PayloadTooLarge(f"The body is larger than {limit} bytes: send less at once.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 12 or int(length) > limit):
        raise too_large
    with ExitStack() as stack:
        file: IO[bytes] = BytesIO()
        waiting, size = BytesIO(), 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise too_large
            waiting.write(chunk)
            if waiting.tell() > MAX_IN_MEMORY:
                if isinstance(file, BytesIO):
                    stack.enter_context(count_upload())
                    file = stack.enter_context(tempfile.TemporaryFile())
                await run_in_threadpool(file.write, waiting.getvalue())
                waiting = BytesIO()
        file.write(waiting.getvalue())
        file.seek(0)
        yield ReceivedBody(size, file, isinstance(file, BytesIO))
