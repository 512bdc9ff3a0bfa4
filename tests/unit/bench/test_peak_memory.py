"""Peak memory of a function: bench/peak_memory.py."""

from __future__ import annotations

import torch

from bench.peak_memory import peak_bytes


def test_freed_tensors_do_not_count() -> None:
    """Tensors that were freed are not counted: a chain of operations holds two tensors at a time."""
    assert peak_bytes(lambda: torch.zeros(1000)) == 4000
    assert peak_bytes(lambda: torch.zeros(1000).add(1).add(1)) == 8000

    def passing() -> None:
        for _ in range(100):
            torch.zeros(1000).view(10, 100).T.contiguous()

    assert peak_bytes(passing) == 8000


def test_views_and_existing_tensors_do_not_count() -> None:
    """Views and in-place writes are not counted."""
    existing = torch.zeros(1000)
    assert peak_bytes(lambda: existing.view(10, 100).T[3:].add_(1)) == 0


def test_autograd_graph_counts() -> None:
    """Results that only the autograd graph holds are counted."""
    x = torch.zeros(1000, requires_grad=True)

    def work() -> None:
        y = x.exp().exp().exp().exp()
        torch.autograd.grad(y.sum(), x)

    assert peak_bytes(work) >= 4 * 4000
