"""Division of one thread's time between foreground and background steps."""

from __future__ import annotations


class TimeShare:
    """Background work is due when the foreground has had its share of the time since the last background step.

    After a background step of t seconds the foreground is owed t s / (1 - s) seconds, where s is its share. So the
    foreground has at least the share s whenever it always has work, whatever the durations of the steps are.

    Background steps that run while the foreground has no work count too, up to `head_start` seconds: foreground work
    that begins then runs alone for at most this long. Over a longer time the background keeps its share.
    """

    def __init__(self, foreground_share: float, head_start: float = 0.0) -> None:
        self.foreground_share = foreground_share
        self._head_start = head_start  # seconds
        self._debt = 0.0  # seconds that the foreground is owed

    @property
    def background_is_due(self) -> bool:
        """Whether a background step may run beside foreground work."""
        return self._debt <= 0

    def add_foreground(self, seconds: float) -> None:
        """Record a step of the foreground."""
        self._debt = max(0.0, self._debt - seconds)

    def add_background(self, seconds: float, foreground_has_work: bool = True) -> None:
        """Record a step of the background."""
        self._debt += seconds * self.foreground_share / (1 - self.foreground_share)
        if not foreground_has_work:
            self._debt = min(self._debt, self._head_start)
