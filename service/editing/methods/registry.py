"""From an edit that is wanted to its pieces: every method behind one door.

Nothing here or below touches a weight of the model for longer than a step: the answer is a list of pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from service.covariance.second_moment import Statistics
from service.editing.edit_spec import Asked, Training, Wanted, want
from service.editing.methods.finetune import train_steps
from service.editing.methods.rome import Found, associate_steps
from service.kit.steps import Steps
from service.kit.text import Statement
from service.models.loading import LoadedModel
from service.recipes.recipe import Parameters
from service.schemas import Objective


def find_together_steps(
    model: LoadedModel, statistics: Mapping[int, Statistics], edits: Sequence[Asked]
) -> Steps[list[Found]]:
    """The pieces of a batch of edits (`wanted.batches`), each as it would be found alone."""
    searched = [e for e in edits if isinstance(e, Wanted)]
    found = (yield from associate_steps(model, statistics, searched)) if searched else []
    for e in edits:  # a batch is either searched for or trained
        if isinstance(e, Training):
            found.append((yield from train_steps(model, e)))
    return found


def find_steps(
    model: LoadedModel,
    statistics: Mapping[int, Statistics],
    contexts: Sequence[str],
    statement: Statement,
    target: str,
    parameters: Parameters,
    edit: str = "",
    method: str = "rome",
    objective: Objective = "write",
    noise: Tensor | None = None,
) -> Steps[Found]:
    """The pieces of one edit."""
    wanted = want(model, contexts, statement, target, parameters, edit, method, objective, noise)
    (found,) = yield from find_together_steps(model, statistics, [wanted])
    return found
