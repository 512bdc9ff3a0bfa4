"""How a call becomes a method: of `Client` one that returns, of `AsyncClient` one that is awaited; both with the call's own types."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, overload

from palimpsest.flow import Answer, Course, Flow, Item, Line, Listing, Lost, Pause, Say, Send, Step, T

P = ParamSpec("P")


class Hands(Protocol):
    """Takes steps of one call, and lets go of its connection at the end."""

    def send(self, send: Send) -> Answer: ...
    def line(self) -> str | None: ...
    def pause(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class AsyncHands(Protocol):
    """The same, awaited."""

    async def send(self, send: Send) -> Answer: ...
    async def line(self) -> str | None: ...
    async def pause(self, seconds: float) -> None: ...
    async def close(self) -> None: ...


class Blocking:
    """Takes the steps of a call one after the other."""

    def _hands(self) -> Hands:
        raise NotImplementedError

    def _iterate(self, flow: Listing[Item]) -> Iterator[Item]:
        return self._said(Course(flow))

    def _said(self, course: Course[Any]) -> Iterator[Any]:
        """Everything that a call says, on the way to its end."""
        hands = self._hands()
        try:
            while (step := course.next()) is not None:
                if isinstance(step, Say):
                    yield step.item
                    continue
                try:
                    course.came(self._taken(step, hands))
                except Lost as lost:
                    course.failed(lost)
        finally:
            hands.close()

    @staticmethod
    def _taken(step: Step, hands: Hands) -> Any:
        match step:
            case Send():
                return hands.send(step)
            case Line():
                return hands.line()
            case Pause():
                return hands.pause(step.seconds)

    def _run(self, flow: Flow[T]) -> T:
        course = Course(flow)
        for _ in self._said(course):
            pass
        return course.result


class Awaiting:
    """The same without blocking the event loop."""

    def _hands(self) -> AsyncHands:
        raise NotImplementedError

    def _iterate(self, flow: Listing[Item]) -> AsyncIterator[Item]:
        return self._said(Course(flow))

    async def _said(self, course: Course[Any]) -> AsyncIterator[Any]:
        """Everything that a call says, on the way to its end."""
        hands = self._hands()
        try:
            while (step := course.next()) is not None:
                if isinstance(step, Say):
                    yield step.item
                    continue
                try:
                    course.came(await self._taken(step, hands))
                except Lost as lost:
                    course.failed(lost)
        finally:
            await hands.close()

    @staticmethod
    async def _taken(step: Step, hands: AsyncHands) -> Any:
        match step:
            case Send():
                return await hands.send(step)
            case Line():
                return await hands.line()
            case Pause():
                return await hands.pause(step.seconds)

    async def _run(self, flow: Flow[T]) -> T:
        course = Course(flow)
        async for _ in self._said(course):
            pass
        return course.result


class call(Generic[P, T]):
    """A call with one result."""

    def __init__(self, asked: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self._asked = asked
        self.__doc__ = asked.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self._asked if client is None else _bound(self._asked, client, client._run)


class listing(Generic[P, Item]):
    """A call that is iterated over. Nothing is asked before the first item is."""

    def __init__(self, asked: Callable[Concatenate[Any, P], Listing[Item]]) -> None:
        self._asked = asked
        self.__doc__ = asked.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: Blocking, owner: type) -> Callable[P, Iterator[Item]]: ...
    @overload
    def __get__(self, client: Awaiting, owner: type) -> Callable[P, AsyncIterator[Item]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self._asked if client is None else _bound(self._asked, client, client._iterate)


def _bound(asked: Callable[..., Any], client: object, take: Callable[[Any], Any]) -> Callable[..., Any]:
    """The call as a method of this client: signed and documented, so that `help` shows what can be given."""

    @functools.wraps(asked)
    def method(*args: Any, **kwargs: Any) -> Any:
        return take(asked(client, *args, **kwargs))

    signature = inspect.signature(asked)
    _, *parameters = signature.parameters.values()
    returned = str(signature.return_annotation).removeprefix("Flow[").replace("Listing[", "Iterator[")
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters,
        return_annotation=returned if returned.startswith("Iterator") else returned[:-1],
    )
    return method
