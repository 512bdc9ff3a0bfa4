"""Named points at which a test lets a process die on the spot, as a power cut would (`PALIMPSEST_CRASH_AT`).

Each stands between two steps whose order matters; `tests/e2e/test_crash_points.py` kills at every one of them.
"""

from __future__ import annotations

import os
import signal

from service.errors import Misconfigured

CRASH_POINTS = {
    "job.before_commit": "the API has written the row of a job and not committed it",
    "job.after_commit": "the row is committed and its bell has not been rung",
    "job.after_announce": "the bell was rung and the client has no answer",
    "call.after": "a generation was asked for and the client hears nothing",
    "revert.before_commit": "the API has appended a revert and not committed it",
    "revert.after_commit": "the revert is committed and the workers have not been told",
    "take.after": "a worker was given work and has not begun it",
    "start.before_commit": "the attempt is counted and not committed",
    "start.after_commit": "the attempt is committed and nothing is computed",
    "edit.after_compute": "an edit is computed and passed its guard",
    "apply.before_commit": "factors, entry and row are written and not committed",
    "apply.after_commit": "the edit is in the ledger and nobody knows",
    "end.after_publish": "the end was told and the delivery is not acknowledged",
    "done.after": "the delivery is acknowledged",
    "generate.after_admit": "a generation is pinned and has said nothing",
    "generate.after_token": "a generation has said its first token",
    "generate.before_end": "a generation is complete and its end is not told",
    "generate.after_end": "the end of a generation is told and its delivery not acknowledged",
}

_armed_point: str | None = None


def arm(point: str | None) -> None:
    """Die at this point, or nowhere."""
    global _armed_point  # noqa: PLW0603
    if point is not None and point not in CRASH_POINTS:
        raise Misconfigured(f"crash_at {point!r} is no crash point: use one of {', '.join(CRASH_POINTS)}.")
    _armed_point = point


def crash_point(point: str) -> None:
    """This point is reached: the end, if it is the armed one."""
    if point == _armed_point:
        os.kill(os.getpid(), signal.SIGKILL)
