"""The sizes of gates (`service/weights/factors.py`), for the code that computes them and for the checks of imports.
Torch-free."""

from __future__ import annotations

SKETCH_SIZE = 256  #: dimensions of a gate space
MAX_KEYS = 8  #: of one gate
MAX_BLOCKED = 16  #: of one gate
