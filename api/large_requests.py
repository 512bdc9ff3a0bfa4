"""Large requests: how many of a caller are received at the same time, and one at a time is worked on.

A large body costs a multiple of its size in memory while it is parsed, validated and stored, and the threads that do so
compete with the event loop. So one slot of the process serves all large bodies, and a caller waits for it with one of
its requests only: callers take turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from weakref import WeakValueDictionary

from api.errors import TooManyUploads

MAX_UPLOADS = 4  #: bodies of one caller that are kept in files at the same time


class LargeRequests:
    """The large requests of a process."""

    def __init__(self) -> None:
        self.encoding = asyncio.Lock()  #: held while a large answer is encoded
        self._slot = asyncio.Lock()
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._uploads: Counter[str] = Counter()

    @asynccontextmanager
    async def slot(self, caller: str) -> AsyncIterator[None]:
        """Wait for the turn of the caller, and hold the slot."""
        turn = self._turns.setdefault(caller, asyncio.Lock())
        async with turn, self._slot:
            yield

    @contextmanager
    def upload(self, caller: str) -> Iterator[None]:
        """Count a body that is kept in a file. Raises TooManyUploads if the caller has too many."""
        if self._uploads[caller] >= MAX_UPLOADS:
            raise TooManyUploads(
                f"{MAX_UPLOADS} large requests of yours are in progress: send this one when one of them has ended."
            )
        self._uploads[caller] += 1
        try:
            yield
        finally:
            self._uploads[caller] -= 1
            if not self._uploads[caller]:
                del self._uploads[caller]
