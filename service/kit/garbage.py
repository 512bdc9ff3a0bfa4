"""Garbage collection of a process that serves."""

from __future__ import annotations

import gc


def exclude_from_collection() -> None:
    """Exclude the objects that exist now, such as modules and a model, from garbage collection.

    A full collection visits all objects, and all threads wait for it: streams would stop for up to half a second.
    """
    gc.collect()
    gc.freeze()
