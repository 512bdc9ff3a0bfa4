"""Named points at which a test kills the process with SIGKILL (`PALIMPSEST_CRASH_AT`).

Each point is between two steps whose order matters. `tests/e2e/test_crash_points.py` kills a process at every one.
"""

from __future__ import annotations

import os
import signal

from service.errors import Misconfigured

CRASH_POINTS = {
    "job.before_commit": "the API has inserted the row of a job and has not committed",
    "job.after_commit": "the row is committed and no worker is notified",
    "job.after_announce": "the workers are notified and the client has no response",
    "call.after": "a generation is sent to the broker and the client has no response",
    "revert.before_commit": "the API has appended a revert and has not committed",
    "revert.after_commit": "the revert is committed and the workers are not woken",
    "take.after": "a worker has received a delivery and has not begun it",
    "start.before_commit": "the attempt is counted and the claim is not committed",
    "start.after_commit": "the claim is committed and nothing is computed",
    "edit.after_compute": "an edit is computed and passed its guard",
    "apply.before_commit": "factors, ledger entry and row are written and not committed",
    "apply.after_commit": "the edit is committed and its end is not published",
    "end.after_publish": "the end of a job is published and the worker continues",
    "done.after": "a delivery is acknowledged",
    "generate.after_admit": "a generation is pinned to a version and has no output",
    "generate.after_token": "a generation has published its first token",
    "generate.before_end": "a generation is complete and its end is not published",
    "generate.after_end": "the end of a generation is published and its delivery is not acknowledged",
}

_armed_point: str | None = None


def arm(point: str | None) -> None:
    """Kill the process at this point; None disarms."""
    global _armed_point  # noqa: PLW0603
    if point is not None and point not in CRASH_POINTS:
        raise Misconfigured(f"crash_at {point!r} is not a crash point: use one of {', '.join(CRASH_POINTS)}.")
    _armed_point = point


def crash_point(point: str) -> None:
    """Kill this process if the point is armed."""
    if point == _armed_point:
        os.kill(os.getpid(), signal.SIGKILL)
