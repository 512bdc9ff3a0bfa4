"""The form that edits have by default: in the weights, or gated.

The two forms differ where many edits are active. So they are compared on edits that are active together, the edits in
the weights at the strengths of their schedule. A gated edit is written at one layer and needs no schedule: each layer
of the recipe is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from service.datasets.record import Record
from service.kit.artifact_store import content_addressed_name, load_or_compute
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.tuning.objective import (
    Candidate,
    SearchContext,
    compute_objective,
    evaluate_candidate,
    find_edits,
    mean_scores,
    measure_jointly,
)
from service.tuning.search_space import JsonDict, Stage


class FormChoice(NamedTuple):
    """The hyperparameters of the better form, and a candidate for each form and layer, that of the weights first."""

    hparams: JsonDict
    candidates: list[Candidate]


class FormSearch:
    """The comparison of the forms on some records that are edited together."""

    def __init__(
        self, search: SearchContext, records: Sequence[Record], on_candidate: Callable[[Candidate], None]
    ) -> None:
        self.search, self.records, self.on_candidate = search, records, on_candidate

    def execute(self, alone: Candidate, together: Candidate, margins: JsonDict) -> Stepper[FormChoice]:
        """Return the better form. `alone` is the candidate whose edits were measured one by one, `together` that of
        the weights with all records active, `margins` the hyperparameters with the schedule of strengths."""
        weights = _compared(alone, replace(together, hparams=margins), len(self.records))
        self.on_candidate(weights)
        candidates, best = [weights], (weights.objective, margins)
        layers = alone.hparams["layers"]
        for number, layer in enumerate(layers):
            hparams = alone.hparams | {"layers": [layer], "form": "gated"}
            progress = Progress(Phase.SEARCH, number, len(layers), f"form: gated, layer {layer}")
            candidate = yield from report_as(self._measure_gated(hparams), progress)
            self.on_candidate(candidate)
            candidates.append(candidate)
            if candidate.objective > best[0]:
                best = (candidate.objective, hparams)
        return FormChoice(best[1], candidates)

    def _measure_gated(self, hparams: JsonDict) -> Stepper[Candidate]:
        """Measure the edits one by one on the records of the search, and those of all records together."""
        alone = yield from evaluate_candidate(self.search, Stage.FORM, "rome", hparams)
        if alone.reason is not None:
            return alone
        name = content_addressed_name("gated", [hparams, len(self.records)])
        figures = yield from load_or_compute(self.search.store, name, self._measure_together(hparams))
        together = Candidate(Stage.FORM, "rome", hparams, 0.0, **figures)
        return _compared(alone, together, len(self.records))

    def _measure_together(self, hparams: JsonDict) -> Stepper[JsonDict]:
        groups = yield from find_edits(self.search, "rome", hparams, self.records)
        updates = [u for group in groups for u in group]
        rows, loss_increase = yield from measure_jointly(self.search, self.records, updates)
        return {"joint": mean_scores(rows), "loss_increase": loss_increase}


def _compared(alone: Candidate, together: Candidate, edits: int) -> Candidate:
    """Return the candidate by which a form is chosen: the scores of single edits, and those of all edits together."""
    figures = {"alone": alone.alone, "joint": together.joint, "loss_increase": together.loss_increase}
    candidate = replace(together, stage=Stage.FORM, alone=alone.alone, edits=edits)
    return replace(candidate, objective=compute_objective(figures))
