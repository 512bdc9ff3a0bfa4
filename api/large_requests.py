"""Large requests: how many of a caller are received at the same time, and one at a time is worked on.

A large body costs a multiple of its size in memory while it is parsed, validated and stored, and the threads that do so
compete with the event loop. So one slot of the process serves all large bodies, and a caller waits for it with one of
its requests only: callers take turns.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from api.errors import TooManyUploads

T = TypeVar("T")
MAX_UPLOADS = 4  #: bodies of one caller that are kept in files at the same time


ANSWERS_AT_ONCE = 2  #: of one route, that are read and encoded at the same time


class Turns:
    """Slots that callers take in turn: a caller holds, or waits for, one of them at a time."""

    def __init__(self, slots: int) -> None:
        self._slots = asyncio.Semaphore(slots)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def slot(self, caller: str) -> AsyncIterator[None]:
        """Wait for the turn of the caller, and hold a slot."""
        turn = self._turns.setdefault(caller, asyncio.Lock())
        async with turn, self._slots:
            yield


class LargeRequests:
    """The large requests and answers of a process."""

    def __init__(self) -> None:
        self.encoding = asyncio.Lock()  #: held while a large answer is encoded
        self._bodies = Turns(1)
        # One thread for all bodies: the allocator keeps freed memory for each thread.
        self._thread = ThreadPoolExecutor(1, "large-request-worker")
        self._answers: defaultdict[str, Turns] = defaultdict(lambda: Turns(ANSWERS_AT_ONCE))
        self._uploads: Counter[str] = Counter()

    def slot(self, caller: str) -> AbstractAsyncContextManager[None]:
        """Return the slot in which the work on a large body is done."""
        return self._bodies.slot(caller)

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Return the result of a function, called in the thread of large bodies. The caller holds the slot."""
        call = partial(copy_context().run, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def run_in_slot(self, caller: str, function: Callable[..., T], *arguments: Any) -> T:
        """Wait for the slot, and return the result of a function called in it."""
        async with self.slot(caller):
            return await self.run(function, *arguments)

    def close(self) -> None:
        """End the thread when its work is done."""
        self._thread.shutdown(wait=False)

    def answer_slot(self, route: str, caller: str) -> AbstractAsyncContextManager[None]:
        """Return the slot in which an answer of a route is read and encoded."""
        return self._answers[route].slot(caller)

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
