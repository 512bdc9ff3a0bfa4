"""A call as steps: what to send and what to make of the answer, without any input or output of its own.

A call is a generator, a *flow*: it gives a step and gets what came of it. So each call is written once, and `Client` and
`AsyncClient` differ only in how a step is taken.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Request:
    """Send a request; what comes of it is an `Answer`.

    `body` is sent as JSON, `content` as it is. `again`: to send it twice does no more than once. `streamed`: leave the body of a good answer to `Line`s.
    """

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    idempotent: bool = True
    streamed: bool = False


@dataclass(frozen=True)
class Response:
    """A status, headers in lower case, and the body where it was read."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""


@dataclass(frozen=True)
class ReadLine:
    """Read a line of the answer that is streamed; None at its end."""


@dataclass(frozen=True)
class Sleep:
    """Let some seconds pass."""

    seconds: float


@dataclass(frozen=True)
class Emit(Generic[Item]):
    """Hand something to whoever iterates over the call."""

    item: Item


class ConnectionLost(Exception):
    """The connection broke. `silent`: somebody was there, and did not answer in time; `nobody`: there was none to begin with."""

    def __init__(self, message: str, *, timed_out: bool = False, never_connected: bool = False) -> None:
        super().__init__(message)
        self.timed_out = timed_out
        self.never_connected = never_connected


Step: TypeAlias = Request | ReadLine | Sleep
#: a call with one result
Flow: TypeAlias = Generator[Step, Any, T]
#: a call that says many things
Listing: TypeAlias = Generator[Step | Emit[Item], Any, None]


class FlowRunner(Generic[T]):
    """A flow on its way: it says the next step, and is told what came of it."""

    result: T

    def __init__(self, flow: Generator[Step | Emit[Any], Any, T]) -> None:
        self._flow = flow
        self._value: Any = None
        self._error: ConnectionLost | None = None

    def next(self) -> Step | Emit[Any] | None:
        """The next step; None at the end, when `result` is there."""
        value, error = self._value, self._error
        self._value = self._error = None
        try:
            return self._flow.throw(error) if error else self._flow.send(value)
        except StopIteration as end:
            self.result = end.value
            return None

    def resume_with(self, value: Any) -> None:
        self._value = value

    def resume_with_error(self, error: ConnectionLost) -> None:
        self._error = error
