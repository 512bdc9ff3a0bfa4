"""What is held at once: bench.peak."""

from __future__ import annotations

import torch

from bench.peak import peak_bytes


def test_what_is_freed_counts_no_longer() -> None:
    """Of a chain of results two are held at a time, and of a hundred passing ones no more than one and its copy."""
    assert peak_bytes(lambda: torch.zeros(1000)) == 4000
    assert peak_bytes(lambda: torch.zeros(1000).add(1).add(1)) == 8000

    def passing() -> None:
        for _ in range(100):
            torch.zeros(1000).view(10, 100).T.contiguous()

    assert peak_bytes(passing) == 8000


def test_views_and_what_was_there_before_weigh_nothing() -> None:
    """Neither a view of a tensor that is given, nor what is written into it."""
    given = torch.zeros(1000)
    assert peak_bytes(lambda: given.view(10, 100).T[3:].add_(1)) == 0


def test_what_only_a_gradient_needs_is_weighed() -> None:
    """Results that nothing but the graph holds on to are held."""
    x = torch.zeros(1000, requires_grad=True)

    def work() -> None:
        y = x.exp().exp().exp().exp()
        torch.autograd.grad(y.sum(), x)

    assert peak_bytes(work) >= 4 * 4000
