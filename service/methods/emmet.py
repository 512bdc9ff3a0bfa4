"""EMMET: MEMIT with equality constraints (Gupta et al. 2024, "A Unified Framework for Model Editing")."""

from __future__ import annotations

from pydantic import Field

from service.methods.memit import CLAMP_GRID, MemitParameters
from service.methods.method import EditMethod, SolveRule


class EmmetParameters(MemitParameters):
    """Hyperparameters of EMMET."""

    ridge: float = Field(
        0.1, gt=0, description="ridge that keeps the system well conditioned when keys nearly coincide"
    )


EMMET = EditMethod(
    "emmet",
    "EMMET",
    "Gupta et al. 2024",
    EmmetParameters,
    solve=SolveRule("emmet", exact_alone=True),
    delta_on_hidden_state=True,
    search_space=(CLAMP_GRID, ({"ridge": 0.1}, {"ridge": 10.0})),
)

METHODS = (EMMET,)
