"""Quotas of a caller: what it has open at the same time, and the tokens that its calls may need per minute."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool

from api.errors import RateLimitExceeded
from api.rate_limits import RateLimiter
from service.application.caller import Caller
from service.errors import InvalidInput

RETRY_AFTER = 1  #: seconds after which a caller with too much open may retry


class ConcurrencyLimiter:
    """Counts the open calls and streams of each caller in this process. Used in the event loop only."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    @contextmanager
    def slot(self, caller: Caller) -> Iterator[Caller]:
        """Count one more while the context is open. Raises RateLimitExceeded above the limit of the caller."""
        limit = caller.limits.max_concurrent
        if limit is not None and self._open[caller.actor] >= limit:
            raise RateLimitExceeded(
                f"This API key has {limit} calls and event streams open, the most that it may have: close one first.",
                retry_after=RETRY_AFTER,
            )
        self._open[caller.actor] += 1
        try:
            yield caller
        finally:
            self._open[caller.actor] -= 1
            if not self._open[caller.actor]:
                del self._open[caller.actor]


@dataclass(frozen=True)
class CallQuota:
    """A caller that has a slot until its response has been sent."""

    caller: Caller
    rate_limiter: RateLimiter

    async def charge(self, tokens: int) -> None:
        """Count the tokens that a request may need. Raises RateLimitExceeded above the quota of the caller."""
        quota = self.caller.limits.tokens_per_minute
        if quota is None:
            return
        if tokens > quota:
            raise InvalidInput(
                f"the request may need {tokens} tokens and this API key may use {quota} per minute: ask for fewer new tokens, or "
                "send fewer prompts at once.",
                "max_new_tokens",
            )
        await run_in_threadpool(self.rate_limiter.check_tokens, self.caller.actor, quota, tokens)


def slot_of_caller(request: Request) -> AbstractContextManager[Caller]:
    """Return the slot of the caller of a request."""
    limiter: ConcurrencyLimiter = request.app.state.concurrency_limiter
    return limiter.slot(Caller(request.state.actor, request.state.limits))


async def _call_quota(request: Request) -> AsyncIterator[CallQuota]:
    with slot_of_caller(request) as caller:  # FastAPI closes it after the response has been sent
        yield CallQuota(caller, request.app.state.rate_limiter)


CallQuotaDep = Annotated[CallQuota, Depends(_call_quota)]
