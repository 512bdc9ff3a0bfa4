"""MEMIT: many associations written at once, spread over several layers (Meng et al. 2023)."""

from __future__ import annotations

from pydantic import Field

from service.methods.method import EditMethod, SolveRule
from service.methods.parameters import RomeParameters

#: of the hidden state's norm, for methods that change the hidden state
CLAMP_GRID = ({"clamp": 0.75}, {"clamp": 1.6}, {"clamp": 3.2})


class MemitParameters(RomeParameters):
    """Hyperparameters of MEMIT (Meng et al. 2023): a change of the hidden state, spread over the layers."""

    clamp: float = Field(0.75, gt=0, description="maximum |delta| as a multiple of the hidden state's norm")
    contexts: int = Field(5, ge=0, le=100, description="sampled contexts in addition to the bare prompt")
    bare_weight: float | None = Field(
        0.5, ge=0, le=1, description="weight of the text without a context in the mean key"
    )
    ridge: float = Field(
        15_000.0,
        gt=0,
        description="lambda: the number of average keys that the statistics weigh against one edit",
    )


MEMIT = EditMethod(
    "memit",
    "MEMIT",
    "Meng et al. 2023",
    MemitParameters,
    solve=SolveRule("memit"),
    delta_on_hidden_state=True,
    search_space=(({"ridge": 3.0}, {"ridge": 30.0}, {"ridge": 300.0}), CLAMP_GRID),
)

METHODS = (MEMIT,)
