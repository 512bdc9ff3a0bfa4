"""Where prompts become token sequences: what is read before a prompt, as a version decides it.

The patches of a version put a router in place (`service/patches/record_patch.py`). Generation and scoring ask it once
for each prompt, when the prompt becomes a sequence of tokens. Without a router every prompt is read as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol


class PromptRoute(NamedTuple):
    """The tokens that are read with a prompt, and the edit whose statement they are."""

    edit: str
    statement_ids: tuple[int, ...]
    place: int  #: the index in the prompt at which they stand: after the tokens that begin every text

    def insert(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the prompt with the statement."""
        return [*prompt_ids[: self.place], *self.statement_ids, *prompt_ids[self.place :]]


class PromptRouter(Protocol):
    """Decides which statement is read before a prompt."""

    def route(self, prompt_ids: Sequence[int]) -> PromptRoute | None:
        """Return the route of a prompt; None for one that is read as it is."""


@dataclass(eq=False)
class PromptRouting:
    """The router that is in place on a loaded model, and the readers of features that routers share."""

    router: PromptRouter | None = None
    readers: dict[int, Any] = field(default_factory=dict, repr=False)  #: by layer (`prompt_features.py`)

    def route(self, prompt_ids: Sequence[int]) -> PromptRoute | None:
        """Return the route of a prompt by the router in place."""
        return None if self.router is None or not prompt_ids else self.router.route(prompt_ids)
