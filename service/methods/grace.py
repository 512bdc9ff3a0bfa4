"""GRACE: a codebook of keys and values beside the weights (Hartvigsen et al. 2023)."""

from __future__ import annotations

from service.methods.method import GRACE as IMPLEMENTATION
from service.methods.method import EditMethod
from service.methods.parameters import GraceParameters

GRACE = EditMethod(
    "grace",
    "GRACE",
    "Hartvigsen et al. 2023",
    GraceParameters,
    IMPLEMENTATION,
    solve=None,
    keeps_codebook=True,
    default_depth=0.5,
    search_space=(
        ({"radius": 0.1}, {"radius": 0.25}, {"radius": 0.4}, {"radius": 0.55}),
        ({"learning_rate": 0.03}, {"learning_rate": 0.3}),
    ),
    searched_layers="late",
)

METHODS = (GRACE,)
