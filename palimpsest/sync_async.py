"""One implementation for `Client` and `AsyncClient`.

Every endpoint is a coroutine. `AsyncClient` returns it to be awaited. `Client` runs it to completion without an event
loop: its HTTP backend blocks instead of awaiting, so the coroutine never suspends.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast, overload

P = ParamSpec("P")
T = TypeVar("T")
Item = TypeVar("Item")


class SyncMode:
    """Marks a client whose endpoints return results and iterators."""


class AsyncMode:
    """Marks a client whose endpoints return coroutines and async iterators."""


def run_sync(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never suspends, and return its result."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    coroutine.close()
    raise RuntimeError("a blocking backend suspended")


def iterate_sync(items: AsyncIterator[Item]) -> Iterator[Item]:
    """Iterate over an async generator that never suspends; closing the iterator closes the generator."""
    generator = cast(AsyncGenerator[Item, None], items)
    try:
        while True:
            try:
                item = run_sync(generator.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        run_sync(generator.aclose())


class endpoint(Generic[P, T]):
    """A call with one result."""

    def __init__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: SyncMode, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncMode, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self._function if client is None else _bind(self._function, client, run_sync)


class iterable_endpoint(Generic[P, Item]):
    """A call that is iterated over. It sends no request before the first item is requested."""

    def __init__(self, function: Callable[Concatenate[Any, P], AsyncIterator[Item]]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    @overload
    def __get__(self, client: None, owner: type) -> Callable[..., Any]: ...
    @overload
    def __get__(self, client: SyncMode, owner: type) -> Callable[P, Iterator[Item]]: ...
    @overload
    def __get__(self, client: AsyncMode, owner: type) -> Callable[P, AsyncIterator[Item]]: ...
    def __get__(self, client: Any, owner: type) -> Any:
        return self._function if client is None else _bind(self._function, client, iterate_sync)


def _bind(
    function: Callable[..., Any], client: SyncMode | AsyncMode, run: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Return the call as a method of `client`, with the signature and docstring that `help` shows."""

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        result = function(client, *args, **kwargs)
        return run(result) if isinstance(client, SyncMode) else result

    signature = inspect.signature(function)
    _, *parameters = signature.parameters.values()
    returned = str(signature.return_annotation)
    if isinstance(client, SyncMode):
        returned = returned.removeprefix("Async")
    method.__signature__ = signature.replace(parameters=parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return method
