"""UltraEdit: an edit from one forward and one backward pass, all edits solved together (Gu et al. 2026)."""

from __future__ import annotations

from typing import Any

from service.methods.method import DirectionSolver, EditMethod, SolveRule
from service.methods.parameters import MAX_OBJECT_TOKENS, GradientParameters

IMPLEMENTATION = "service.editing.gradient_edits:find_gradient_edits"
SEARCH_SPACE = (
    ({"eta": 3e-5}, {"eta": 1e-4}, {"eta": 3e-4}, {"eta": 1e-3}),
    ({"ridge": 0.3}, {"ridge": 3.0}, {"ridge": 30.0}),
)


def key_direction(_statistics: DirectionSolver | None, key: Any, _parameters: GradientParameters) -> Any:
    """Return h, the direction where lambda I is in the place of lambda C."""
    return key.double().cpu()


ULTRAEDIT = EditMethod(
    "ultraedit",
    "UltraEdit, all edits solved together",
    "Gu et al. 2026",
    GradientParameters,
    IMPLEMENTATION,
    solve=SolveRule("ultraedit"),
    reads_gradients=True,
    max_associations=MAX_OBJECT_TOKENS,
    default_depth=0.5,
    search_space=SEARCH_SPACE,
    searched_layers="late",
)

ULTRAEDIT_IDENTITY = EditMethod(
    "ultraedit-identity",
    "UltraEdit with lambda I, all edits solved together",
    "Gu et al. 2026",
    GradientParameters,
    IMPLEMENTATION,
    solve=SolveRule("ultraedit-identity", metric="identity"),
    direction=key_direction,
    reads_gradients=True,
    max_associations=MAX_OBJECT_TOKENS,
    default_depth=0.5,
    search_space=SEARCH_SPACE,
    searched_layers="late",
)

METHODS = (ULTRAEDIT, ULTRAEDIT_IDENTITY)
