"""AlphaEdit: MEMIT restricted to directions that the keys of plain text hardly use (Fang et al. 2025)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from service.errors import InvalidInput
from service.methods.memit import CLAMP_GRID, MemitParameters
from service.methods.method import DirectionSolver, EditMethod, SolveRule


class AlphaEditParameters(MemitParameters):
    """Hyperparameters of AlphaEdit (Fang et al. 2025)."""

    ridge: float = Field(10.0, gt=0, description="L2: weight of the norm of the change")
    threshold: float = Field(
        0.02,
        gt=0,
        description="only directions in which the second moment of keys is smaller are changed",
    )


def projected_direction(statistics: DirectionSolver, key: Any, parameters: AlphaEditParameters) -> Any:
    """Return P k, where P projects onto the directions with a second moment below the threshold (Fang et al. 2025,
    Eq. 8).

    Raise InvalidInput when no direction is below the threshold.
    """
    if not statistics.projection_rank(parameters.threshold):
        raise InvalidInput(
            f"hparams.threshold: every direction of the keys of layer {statistics.layer} has a second moment above "
            f"{parameters.threshold}, so that nothing can change: raise it "
            f"(the mean is {statistics.moment.diagonal().mean():.3g}).",
            "hparams",
        )
    return statistics.project(key, parameters.threshold)


ALPHAEDIT = EditMethod(
    "alphaedit",
    "AlphaEdit",
    "Fang et al. 2025",
    AlphaEditParameters,
    solve=SolveRule("alphaedit", metric="projection"),
    direction=projected_direction,
    delta_on_hidden_state=True,
    search_space=(CLAMP_GRID,),  # the search adds thresholds, which it reads from the statistics
)

METHODS = (ALPHAEDIT,)
