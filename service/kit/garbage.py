"""Garbage collection of a process that serves."""

from __future__ import annotations

import gc


def freeze_startup_objects() -> None:
    """Exclude the objects that exist now from garbage collection.

    A full collection visits all objects, and all threads wait for it: with those of the imported modules it takes
    longer than a request.
    """
    gc.collect()
    gc.freeze()
