"""The most memory that a piece of work holds at once: counted exactly on the CPU, asked of the allocator on an accelerator.

On the CPU every tensor that an operation gives is weighed when it appears and forgotten when its storage is freed, those
included that only the gradient's graph holds. What a kernel takes and frees within itself is not seen.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class AllocationTracker(TorchDispatchMode):
    """Within the context, weighs the storages that come to be."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._allocates: dict[Any, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            func not in self._allocates
        ):  # what is a view of an argument, or is written into one, is nothing new
            self._allocates[func] = all(r.alias_info is None for r in func._schema.returns)
        if self._allocates[func]:
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: object) -> None:
            self._storages.pop(key, None)
            self.current -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.current += size
        self.peak = max(self.peak, self.current)


def peak_bytes(work: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes that `work` holds at once beyond what was held before, its result included."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)
    with AllocationTracker() as tracker:
        result = work()
        del result
    return tracker.peak
