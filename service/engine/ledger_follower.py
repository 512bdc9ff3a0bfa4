"""Keeps a replica at the head of its ledger: builds and attests the newest version, then measures its capacity.

Both are done in bounded steps between the engine's decode steps.
"""

from __future__ import annotations

import logging
import time
from typing import Protocol

from service.engine.versioned_model import VersionedModel
from service.errors import DigestMismatch, Unavailable
from service.kit.steps import Stepper, StepperResult, advance

log = logging.getLogger(__name__)


class VersionReporter(Protocol):
    """Where a worker reports the version that it serves."""

    def heartbeat(self, version: int, digest: str | None = None) -> None: ...

    def record_capacity(self, version: int, capacity: dict[int, float]) -> None: ...


class LedgerFollower:
    """Follows the head of the ledger. `served_version` is the newest version that the replica serves, with its
    digest."""

    def __init__(self, replica: VersionedModel, reporter: VersionReporter, poll_interval: float) -> None:
        self.served_version: tuple[int, str] | None = None
        self._replica = replica
        self._reporter = reporter
        self._poll_interval = poll_interval
        self._last_poll = float("-inf")
        self._target: int | None = None  # the version that is being built
        self._capacity: tuple[int, Stepper[dict[int, float]]] | None = None

    @property
    def pending(self) -> bool:
        """Whether there is a step to run."""
        return self._target is not None or self._capacity is not None

    def poll_soon(self) -> None:
        """Read the head at the next `poll`: it has probably moved."""
        self._last_poll = float("-inf")

    def poll(self) -> None:
        """Read the head of the ledger when the poll interval has passed."""
        now = time.monotonic()
        if self._target is not None or now - self._last_poll < self._poll_interval:
            return
        self._last_poll = now
        head = self._replica.head()
        if self.served_version is None or self.served_version[0] != head:
            self._target = head

    def step(self) -> None:
        """Run one step. Raises Unavailable, to be called again, and DigestMismatch."""
        if self._target is not None:
            self._advance_build(self._target)
        elif self._capacity is not None:
            self._advance_capacity(*self._capacity)

    def _advance_build(self, version: int) -> None:
        try:
            if not self._replica.advance_build(version):
                return
        except (Unavailable, DigestMismatch):
            raise
        except Exception:
            # Older versions can still be served; readiness shows that this replica is not at head.
            log.exception("version cannot be built", extra={"version": version})
            self._target = None
            return
        digest = self._replica.attested_digest(version)
        self._reporter.heartbeat(version, digest)
        self._target = None
        self.served_version = (version, digest)
        self._capacity = (version, self._replica.remaining_capacity_in_steps(version))
        log.info("version reached", extra={"version": version, "digest": digest})

    def _advance_capacity(self, version: int, stepper: Stepper[dict[int, float]]) -> None:
        try:
            outcome = advance(stepper)
            if isinstance(outcome, StepperResult):
                self._reporter.record_capacity(version, outcome.result)
                self._capacity = None
        except Unavailable:
            # A stepper cannot go on after an error, and has no second result when recording the first one failed.
            self._capacity = (version, self._replica.remaining_capacity_in_steps(version))
            raise
        except Exception:
            log.exception("capacity cannot be measured", extra={"version": version})
            self._capacity = None
