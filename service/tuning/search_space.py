"""What the search for a recipe tries: start values, changes, layers, strengths and margins.

The changes that it tries for methods other than "rome" are in the registry of methods (`EditMethod.search_space`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

JsonDict = dict[str, Any]

MIN_FACTS = 8  # facts that a search needs
MAX_LAYERS_TRIED = 12  # single layers
MAX_DEPTH_FRACTION = (
    0.75  # deepest layer tried, as a share of all layers: deeper edits come after the subject was read
)
MAX_DAMAGE_TEXTS = 150  # plain statements on which damage is measured


class Stage(StrEnum):
    """The stages of the search for "rome". Each starts from the best values of those before it."""

    LAYER = "layer"  #: a single layer
    VALUES = "values"  #: rate, steps, clamp and contexts, in a search with a time budget
    LAYER_RANGE = "layer_range"  #: two or three layers that include the best one
    REGULARIZATION = "regularization"
    KEY = "key"  #: the texts that the key is averaged over
    OPTIMIZER = "optimizer"
    RIDGE = "ridge"
    MARGIN = "margin"  #: the required margin when many edits are active
    FORM = "form"  #: whether edits are written into the weights or gated


#: small steps and a wide clamp find small changes, and a few contexts represent what may precede the prompt
START_VALUES: JsonDict = {
    "steps": 60, "learning_rate": 0.1, "weight_decay": 1e-3, "clamp": 4.0, "contexts": 2, "anchor": "own",
}  # fmt: skip

#: stages after the layers are chosen -> the changes that each tries
STAGES: dict[Stage, tuple[JsonDict, ...]] = {
    Stage.REGULARIZATION: (
        {"weight_decay": 0.5, "stop_loss": 0.1},
        {"weight_decay": 0.5, "stop_loss": 0.2},
        {"weight_decay": 2.0, "stop_loss": 0.1},
    ),
    Stage.KEY: ({"bare_weight": 0.5}, {"bare_keys": True, "bare_weight": 0.7}),
    Stage.OPTIMIZER: ({"steps": 25, "learning_rate": 0.5}, {"steps": 40, "learning_rate": 0.2}),
    Stage.RIDGE: ({"ridge": 0.05}, {"ridge": 0.5}),
}

#: strengths of an edit when many are active, in increasing order
STRENGTH_GRID = (0.3, 0.36, 0.43, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
MAX_CLAMP = 1.6  # when many edits are active: changes that only the hardest edits reach do the most damage
MIN_RIDGE = 0.5  # when many edits are active: strict isolation of many subjects costs more than it saves
#: required margins, in nats of mean log-probability
MARGIN_GRID = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0)
FULL_STRENGTH_MARGIN = 0.5  # the greatest margin required of an edit at full strength, in nats
BATCH_FRACTIONS = (1.0, 0.5, 0.25)  # shares of the records for which a margin is chosen
MAX_LOSS_INCREASE = 0.09  # of the loss on plain statements, relative; on other facts it may reach a tenth

RACE_LAYERS = 8  # layers that a search with a time budget tries, from the first to two fifths of the depth
RACE_DAMAGE_TEXTS = 8  # plain statements on which a search with a time budget measures damage
#: start values of a search with a time budget: an edit takes few steps
RACE_START_VALUES = START_VALUES | {"steps": 20, "learning_rate": 0.5}
#: the changes of a search with a time budget: each pace with each clamp and number of contexts, the start values first
RACE_VALUES: tuple[JsonDict, ...] = tuple(
    {"learning_rate": rate, "steps": steps, "clamp": clamp, "contexts": contexts}
    for contexts in (2, 6)
    for clamp in (4.0, 1.0)
    for rate, steps in ((0.5, 20), (0.2, 30), (0.1, 40))
)


def candidate_layers(layers: int) -> list[int]:
    """Return single layers at equal distances, from the first to the deepest one tried."""
    deepest = max(1, round(MAX_DEPTH_FRACTION * layers))
    step = -(-deepest // MAX_LAYERS_TRIED)
    return list(range(0, deepest, step))


def layer_ranges_around(layer: int, layers: int) -> list[tuple[int, ...]]:
    """Return the ranges of two and three layers that include a layer."""
    runs = [tuple(range(first, first + n)) for n in (2, 3) for first in range(layer - n + 1, layer + 1)]
    return [run for run in runs if run[0] >= 0 and run[-1] < layers]
