"""Division of one thread's time between foreground and background steps."""

from __future__ import annotations


class TimeShare:
    """Background work is due when the foreground has had its share of the time since the last background step.

    After a background step of t seconds the foreground is owed t s / (1 - s) seconds, where s is its share. So the
    foreground has at least the share s whenever it always has work, whatever the durations of the steps are.
    """

    def __init__(self, foreground_share: float) -> None:
        self._ratio = foreground_share / (1 - foreground_share)
        self._debt = 0.0  # seconds that the foreground is owed

    @property
    def background_is_due(self) -> bool:
        return self._debt <= 0

    def add_foreground(self, seconds: float) -> None:
        """Record a step of the foreground."""
        self._debt = max(0.0, self._debt - seconds)

    def add_background(self, seconds: float) -> None:
        """Record a step of the background."""
        self._debt += seconds * self._ratio

    def reset(self) -> None:
        """Forget the debt: the foreground has no work."""
        self._debt = 0.0
