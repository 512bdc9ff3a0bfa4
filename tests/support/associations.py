"""The updates of edits that consist of associations."""

from __future__ import annotations

from collections.abc import Iterable

from service.weights.factors import Association, EditUpdate


def associations_of(updates: Iterable[EditUpdate]) -> list[Association]:
    """Return the updates as associations. Fails if an update is dense."""
    associations = []
    for update in updates:
        assert isinstance(update, Association), update
        associations.append(update)
    return associations
