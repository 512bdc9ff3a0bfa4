"""Peak memory of a function: counted exactly on the CPU, read from the allocator on an accelerator.

On the CPU the storage of every tensor that an operation returns is counted until it is freed, including storages that
only the autograd graph holds. Memory that a kernel allocates and frees internally is not counted.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class AllocationTracker(TorchDispatchMode):
    """Track the bytes of storages created within the context."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.current = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._allocates: dict[Any, bool] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func not in self._allocates:  # views and in-place results allocate nothing
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
    """Return the peak bytes of `work` beyond those allocated before, its result included."""
    if device.startswith("cuda"):
        gc.collect()  # the allocator counts garbage; the tracker counts only what `work` creates
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = work()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)
    tracker = AllocationTracker()
    with tracker:
        result = work()
        del result
    return tracker.peak
