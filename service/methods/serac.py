"""SERAC: statements that are read before the prompts within their scope (Mitchell et al. 2022)."""

from __future__ import annotations

from service.methods.method import SERAC as IMPLEMENTATION
from service.methods.method import EditMethod
from service.methods.parameters import SeracParameters

SERAC = EditMethod(
    "serac",
    "SERAC",
    "Mitchell et al. 2022",
    SeracParameters,
    IMPLEMENTATION,
    solve=None,
    keeps_records=True,
    default_depth=0.25,
)

METHODS = (SERAC,)
