"""What is held at once: bench.peak_memory."""

from __future__ import annotations

import torch

from bench.peak_memory import peak_bytes


def test_freed_tensors_do_not_count() -> None:
    """Of a chain of results two are held at a time, and of a hundred passing ones no more than one and its copy."""
    assert peak_bytes(lambda: torch.zeros(1000)) == 4000
    assert peak_bytes(lambda: torch.zeros(1000).add(1).add(1)) == 8000

    def passing() -> None:
        for _ in range(100):
            torch.zeros(1000).view(10, 100).T.contiguous()

    assert peak_bytes(passing) == 8000


def test_views_and_existing_tensors_do_not_count() -> None:
    """Neither a view of a tensor that is given, nor what is written into it."""
    existing = torch.zeros(1000)
    assert peak_bytes(lambda: existing.view(10, 100).T[3:].add_(1)) == 0


def test_autograd_graph_counts() -> None:
    """Results that nothing but the graph holds on to are held."""
    x = torch.zeros(1000, requires_grad=True)

    def work() -> None:
        y = x.exp().exp().exp().exp()
        torch.autograd.grad(y.sum(), x)

    assert peak_bytes(work) >= 4 * 4000
