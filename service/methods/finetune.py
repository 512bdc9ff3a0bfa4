"""Fine-tuning of one weight on one statement: FT, FT-L and the late-site edit (Meng et al. 2022; Zhu et al. 2020)."""

from __future__ import annotations

from pydantic import Field

from service.methods.method import FINE_TUNING, EditMethod
from service.methods.parameters import FineTuneParameters


class ConstrainedFineTuneParameters(FineTuneParameters):
    """Hyperparameters of FT-L: no entry moves further than epsilon (Zhu et al. 2020)."""

    epsilon: float | None = Field(5e-4, gt=0, description="maximum change of an entry")


class AttentionFineTuneParameters(FineTuneParameters):
    """Hyperparameters of the late-site edit: the query, key and value projections are trained."""

    learning_rate: float = Field(1e-3, gt=0, le=10, description="Adam's learning rate")
    epsilon: float | None = Field(1e-3, gt=0, description="maximum change of an entry")


FT = EditMethod(
    "ft",
    "fine-tuning of an MLP",
    "Meng et al. 2022",
    FineTuneParameters,
    FINE_TUNING,
    solve=None,
    search_space=(({"learning_rate": 1e-4}, {"learning_rate": 5e-4}, {"learning_rate": 2e-3}),),
    searched_layers="early",
)

FT_L = EditMethod(
    "ft-l",
    "fine-tuning of an MLP, constrained",
    "Zhu et al. 2020",
    ConstrainedFineTuneParameters,
    FINE_TUNING,
    solve=None,
    search_space=(({"epsilon": 5e-4}, {"epsilon": 1e-3}, {"epsilon": 2e-3}, {"epsilon": 8e-3}),),
    searched_layers="early",
)

FT_ATTN = EditMethod(
    "ft-attn",
    "fine-tuning of an attention",
    "Meng et al. 2022",
    AttentionFineTuneParameters,
    FINE_TUNING,
    solve=None,
    trained_part="attention",
    default_depth=0.69,
    search_space=(({"epsilon": 1e-3}, {"epsilon": 2e-3}, {"epsilon": 4e-3}, {"epsilon": 1.6e-2}),),
    searched_layers="late",
)

METHODS = (FT, FT_L, FT_ATTN)
