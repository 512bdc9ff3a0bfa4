"""Division of one thread's time between callers whose work runs in steps: start-time fair queueing by measured time.

Each active caller has a virtual time: the seconds that its steps took, divided by their weights. The caller with the
least virtual time runs next. A caller that becomes active starts at max(V - h, F). V is the least virtual time of the
active callers, h the head start, and F its own virtual time when it was last active. So a caller that was idle runs
first for at most h seconds, and a caller that becomes active again and again has no more than its share and h.
"""

from __future__ import annotations


class VirtualTimes:
    """The virtual times of the active callers, and of those that were active and are ahead of their start."""

    def __init__(self, head_start: float) -> None:
        self._head_start = head_start  # seconds
        self._active: dict[str, float] = {}
        self._inactive: dict[str, float] = {}

    def activate(self, caller: str) -> None:
        """Add a caller that has work. Has no effect on an active one."""
        if caller in self._active:
            return
        start = min(self._active.values(), default=0.0) - self._head_start
        self._inactive = {other: time for other, time in self._inactive.items() if time > start}
        self._active[caller] = max(start, self._inactive.pop(caller, start))

    def deactivate(self, caller: str) -> None:
        """Remove a caller that has no work. When none is active, all start anew."""
        if caller in self._active:
            self._inactive[caller] = self._active.pop(caller)
        if not self._active:
            self._inactive = {}

    def add(self, caller: str, seconds: float, weight: float = 1.0) -> None:
        """Record a step of an active caller."""
        self._active[caller] += seconds / weight

    def first(self) -> str:
        """Return the active caller with the least virtual time; of equal ones the one that has waited longer."""
        return min(self._active, key=self._active.__getitem__)
