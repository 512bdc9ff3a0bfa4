"""ROME with one averaged key, and r-ROME as published (Meng et al. 2022; Gupta et al. 2024, "Rebuilding ROME")."""

from __future__ import annotations

from service.methods.method import EditMethod
from service.methods.parameters import RomeParameters

ROME = EditMethod(
    "rome", "ROME with one key, solved jointly", "Meng et al. 2022; Gupta et al. 2024", RomeParameters
)

R_ROME = EditMethod(
    "r-rome",
    "r-ROME as published",
    "Gupta et al. 2024",
    RomeParameters,
    fixed_hparams={
        "anchor": "bare",
        "bare_keys": False,
        "bare_weight": None,
        "strength": 1.0,
        "compat": None,
        "ridge": 1e-3,
    },
    search_space=(
        (
            {"steps": 60, "learning_rate": 0.1, "weight_decay": 1e-3, "stop_loss": 0.05, "clamp": 4.0},
            {"steps": 40, "learning_rate": 0.2, "weight_decay": 1e-3, "stop_loss": 0.05, "clamp": 4.0},
            {"steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "stop_loss": 0.05, "clamp": 4.0},
        ),
    ),
    searched_layers="early",
)

METHODS = (ROME, R_ROME)
