"""How a call becomes a method: of `Client` one that returns, of `AsyncClient` one that is awaited; both with the call's own types."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, overload

from palimpsest.flow import (
    ConnectionLost,
    Emit,
    Flow,
    FlowRunner,
    Item,
    Listing,
    ReadLine,
    Request,
    Response,
    Sleep,
    Step,
    T,
)

P = ParamSpec("P")


class IOBackend(Protocol):
    """Takes steps of one call, and lets go of its connection at the end."""

    def send(self, request: Request) -> Response: ...
    def read_line(self) -> str | None: ...
    def sleep(self, seconds: float) -> None: ...
    def close(self) -> None: ...


class AsyncIOBackend(Protocol):
    """The same, awaited."""

    async def send(self, request: Request) -> Response: ...
    async def read_line(self) -> str | None: ...
    async def sleep(self, seconds: float) -> None: ...
    async def close(self) -> None: ...


class SyncRunner:
    """Takes the steps of a call one after the other."""

    def _io_backend(self) -> IOBackend:
        raise NotImplementedError

    def _iterate(self, flow: Listing[Item]) -> Iterator[Item]:
        return self._drive(FlowRunner(flow))

    def _drive(self, flow_runner: FlowRunner[Any]) -> Iterator[Any]:
        """Everything that a call says, on the way to its end."""
        backend = self._io_backend()
        try:
            while (step := flow_runner.next()) is not None:
                if isinstance(step, Emit):
                    yield step.item
                    continue
                try:
                    flow_runner.resume_with(self._perform(step, backend))
                except ConnectionLost as loss:
                    flow_runner.resume_with_error(loss)
        finally:
            backend.close()

    @staticmethod
    def _perform(step: Step, backend: IOBackend) -> Any:
        match step:
            case Request():
                return backend.send(step)
            case ReadLine():
                return backend.read_line()
            case Sleep():
                return backend.sleep(step.seconds)

    def _run(self, flow: Flow[T]) -> T:
        flow_runner = FlowRunner(flow)
        for _ in self._drive(flow_runner):
            pass
        return flow_runner.result


class AsyncRunner:
    """The same without blocking the event loop."""

    def _io_backend(self) -> AsyncIOBackend:
        raise NotImplementedError

    def _iterate(self, flow: Listing[Item]) -> AsyncIterator[Item]:
        return self._drive(FlowRunner(flow))

    async def _drive(self, flow_runner: FlowRunner[Any]) -> AsyncIterator[Any]:
        """Everything that a call says, on the way to its end."""
        backend = self._io_backend()
        try:
            while (step := flow_runner.next()) is not None:
                if isinstance(step, Emit):
                    yield step.item
                    continue
                try:
                    flow_runner.resume_with(await self._perform(step, backend))
                except ConnectionLost as loss:
                    flow_runner.resume_with_error(loss)
        finally:
            await backend.close()

    @staticmethod
    async def _perform(step: Step, backend: AsyncIOBackend) -> Any:
        match step:
            case Request():
                return await backend.send(step)
            case ReadLine():
                return await backend.read_line()
            case Sleep():
                return await backend.sleep(step.seconds)

    async def _run(self, flow: Flow[T]) -> T:
        flow_runner = FlowRunner(flow)
        async for _ in self._drive(flow_runner):
            pass
        return flow_runner.result


class endpoint(Generic[P, T]):
    """A call with one result."""

    def __init__(self, function: Callable[Concatenate[Any, P], Flow[T]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: SyncRunner, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncRunner, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self._function if client is None else _bind(self._function, client, client._run)


class iterable_endpoint(Generic[P, Item]):
    """A call that is iterated over. Nothing is asked before the first item is."""

    def __init__(self, function: Callable[Concatenate[Any, P], Listing[Item]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: SyncRunner, owner: type) -> Callable[P, Iterator[Item]]: ...
    @overload
    def __get__(self, client: AsyncRunner, owner: type) -> Callable[P, AsyncIterator[Item]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self._function if client is None else _bind(self._function, client, client._iterate)


def _bind(function: Callable[..., Any], client: object, run: Callable[[Any], Any]) -> Callable[..., Any]:
    """The call as a method of this client: signed and documented, so that `help` shows what can be given."""

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return run(function(client, *args, **kwargs))

    signature = inspect.signature(function)
    _, *parameters = signature.parameters.values()
    returned = str(signature.return_annotation).removeprefix("Flow[").replace("Listing[", "Iterator[")
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters,
        return_annotation=returned if returned.startswith("Iterator") else returned[:-1],
    )
    return method
