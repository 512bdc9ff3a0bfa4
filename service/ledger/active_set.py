"""The active edits of a ledger, entry by entry.

`service.ledger.ledger.active_entries` is the definition; it reads all entries for one version. This is the same for
every version in turn, in time that depends on what an entry changes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

from service.ledger.ledger import APPLY, Entry, canonical_json, hash_encoded_state, weights_key


class ActiveSet:
    """The active edits after the entries that were added, in the canonical order of their ids."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._applied: dict[str, Entry] = {}  # edits that are not reverted
        self._edits_of_fact: dict[str, list[str]] = {}  # of those, oldest first
        self._superseded: Counter[str] = Counter()  # how many of those supersede an edit
        self._reverted: set[str] = set()

    def add(self, entry: Entry) -> None:
        """Add the next entry of the ledger."""
        changed = self._apply(entry) if entry.kind == APPLY else self._revert(entry.edit_id)
        for edit in changed:
            self._update(edit)

    def _apply(self, entry: Entry) -> set[str]:
        if entry.edit_id in self._reverted:
            return set()
        self._applied[entry.edit_id] = entry
        edits = self._edits_of_fact.setdefault(entry.fact, [])
        edits.append(entry.edit_id)
        self._superseded.update(entry.supersedes)
        return {*edits[-2:], *entry.supersedes}

    def _revert(self, edit: str) -> set[str]:
        self._reverted.add(edit)
        entry = self._applied.pop(edit, None)
        if entry is None:
            return set()
        edits = self._edits_of_fact[entry.fact]
        edits.remove(edit)
        self._superseded.subtract(entry.supersedes)
        return {edit, *edits[-1:], *entry.supersedes}

    def _update(self, edit: str) -> None:
        """Insert an edit into the active ones, or remove it."""
        entry = self._applied.get(edit)
        active = (
            entry is not None and self._edits_of_fact[entry.fact][-1] == edit and self._superseded[edit] <= 0
        )
        at = bisect_left(self.ids, edit)
        present = at < len(self.ids) and self.ids[at] == edit
        if active and not present:
            self.ids.insert(at, edit)
        elif present and not active:
            del self.ids[at]


def state_hashes(fingerprint: str, chain: Sequence[Entry], after: int = 0) -> Iterator[tuple[Entry, str]]:
    """Yield each entry after a version with the state hash of its version.

    Each equals `state_hash` of the active entries of that version. Every edit is encoded once.
    """
    encoded: dict[str, bytes] = {}
    active = ActiveSet()
    for entry in chain:
        if entry.kind == APPLY:
            encoded[entry.edit_id] = canonical_json(weights_key(entry))
        active.add(entry)
        if entry.version > after:
            yield entry, hash_encoded_state(fingerprint, (encoded[edit] for edit in active.ids))
