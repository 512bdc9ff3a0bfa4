"""At which tokens of its probes the gate of a gated edit opens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from service.gating.gate_reference import keys_of_rows
from service.gating.gate_table import GateTable
from service.gating.gated_rows import new_gated_rows
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.weights.factors import Association, EditUpdate


def find_openings(
    model: LoadedModel, updates: Sequence[EditUpdate], prompts: Sequence[str]
) -> Stepper[list[list[str]] | None]:
    """Return the tokens of each prompt at which the gate of an edit opens, by itself; None for an edit in the weights.

    Keys are those of the base model. With other gated edits active, a key that is nearer to another subject opens
    that one instead.
    """
    gated = [u for u in updates if isinstance(u, Association) and u.gate is not None]
    if not gated or gated[0].gate is None:
        return None
    table = GateTable(gated[0].gate.space, torch.device("cpu"))
    rows = new_gated_rows(table, [table.row(u) for u in gated])
    openings: list[list[str]] = []
    for number, prompt in enumerate(prompts):
        ids = model.encode(prompt)[0][: model.max_positions]
        progress = Progress(Phase.MEASURE, number, len(prompts))
        keys = yield from keys_of_rows(model, rows.layer, [ids], progress)
        openings.append([model.decode([ids[position]]) for position, _ in rows.open_subjects(keys)])
    return openings
