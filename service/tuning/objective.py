"""The objective of the search for a recipe, and the measurement of one candidate.

A candidate edits each record alone, then all records at once. Its objective is the harmonic mean of S alone, S at
once and, twice, one minus the relative increase of the loss on plain statements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from service.datasets.record import Record
from service.editing.context import EditInput, EditorContext
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.evaluation.evaluation_context import EDITS_PER_BATCH
from service.evaluation.measuring import score_records
from service.evaluation.metrics import summarize
from service.kit.artifact_store import ArtifactStore, content_addressed_name, load_or_compute
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.kit.text import fill_prompt
from service.models.scoring import measure_drift
from service.patches.patch import PatchSet
from service.scores.scores import harmonic_mean
from service.tuning.search_space import JsonDict
from service.weights.factors import EditUpdate

Scores = dict[str, float | None]  #: ES, PS, NS and S


@dataclass(frozen=True)
class Candidate:
    """A set of hyperparameters that was tried. One that cannot be carried out has a reason and no scores."""

    stage: str  #: a `Stage` of "rome", or the name of another method
    method: str
    hparams: JsonDict
    objective: float
    alone: Scores | None = None  #: each edit alone
    joint: Scores | None = None  #: all edits active at once
    loss_increase: float | None = (
        None  #: with all edits active: relative, on plain statements; of several batches the greatest
    )
    #: the number of edits, where it differs between candidates; in the margin stage that of a batch
    edits: int | None = None
    loss_increases: list[float] | None = None  #: in the margin stage: of each batch
    reason: str | None = None

    def to_json(self) -> JsonDict:
        """Return the fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class SearchContext:
    """What every candidate is measured with."""

    replica: VersionedModel
    editor: EditorContext
    records: Sequence[Record]
    damage_texts: Sequence[str]
    store: ArtifactStore


def evaluate_candidate(
    search: SearchContext, stage: str, method: str, hparams: JsonDict
) -> Stepper[Candidate]:
    """Measure a candidate, or load its measurement."""
    name = content_addressed_name("candidate", [method, hparams])
    figures = yield from load_or_compute(search.store, name, _measure_or_reason(search, method, hparams))
    return Candidate(stage, method, hparams, compute_objective(figures), **figures)


def _measure_or_reason(search: SearchContext, method: str, hparams: JsonDict) -> Stepper[JsonDict]:
    try:
        return (yield from _measure_candidate(search, method, hparams))
    except InvalidInput as error:
        return {"reason": error.detail}


def _measure_candidate(search: SearchContext, method: str, hparams: JsonDict) -> Stepper[JsonDict]:
    records = search.records
    updates = yield from find_edits(search, method, hparams, records)
    alone = []
    for i, (record, group) in enumerate(zip(records, updates, strict=True)):
        patch = yield from search.replica.compose_patch_in_steps(group)
        progress = Progress(Phase.MEASURE, i, len(records))
        alone += yield from report_as(measure_records(search, [record], patch), progress)
    joint, loss_increase = yield from measure_jointly(
        search, records, [u for group in updates for u in group]
    )
    return {"alone": mean_scores(alone), "joint": mean_scores(joint), "loss_increase": loss_increase}


def compute_objective(figures: JsonDict) -> float:
    """Return the objective of a candidate's figures, 0 if it could not be carried out."""
    if "joint" not in figures:
        return 0.0
    loss_term = min(1.0, 1 - figures["loss_increase"])
    return harmonic_mean((figures["alone"]["S"] or 0.0, figures["joint"]["S"] or 0.0, loss_term, loss_term))


def find_edits(
    search: SearchContext, method: str, hparams: JsonDict, records: Sequence[Record]
) -> Stepper[list[list[EditUpdate]]]:
    """Return the updates of each record's edit."""
    updates: list[list[EditUpdate]] = []
    for start in range(0, len(records), EDITS_PER_BATCH):
        inputs = [
            EditInput(fill_prompt(r.prompt, r.subject), r.target_new, method, hparams, f"{start + i:06}")
            for i, r in enumerate(records[start : start + EDITS_PER_BATCH])
        ]
        factors = yield from report_as(
            search.editor.find_all_factors(inputs), Progress(Phase.FIND, start, len(records))
        )
        updates += [f.updates for f in factors]
    return updates


def measure_jointly(
    search: SearchContext, records: Sequence[Record], updates: Sequence[EditUpdate]
) -> Stepper[tuple[list[dict[str, Any]], float]]:
    """Return each record's measures with all updates active, and the relative increase of the loss on plain
    statements.
    """
    patch = yield from search.replica.compose_patch_in_steps(updates)
    rows = yield from measure_records(search, records, patch)
    drift = yield from measure_drift(
        search.replica.base, search.damage_texts, partial(search.replica.use_patch, patch)
    )
    return rows, drift.loss_after / drift.loss_before - 1


def measure_records(
    search: SearchContext, records: Sequence[Record], patch: PatchSet
) -> Stepper[list[dict[str, Any]]]:
    """Return the measures of each record with these weights."""
    scores = yield from score_records(search.replica, records, patch)
    return [s.measures() for s in scores]


def mean_scores(rows: Sequence[JsonDict]) -> Scores:
    """Return ES, PS, NS and S over records."""
    means = summarize(rows, 0)
    return {m: (means[m] or {}).get("mean") for m in ("ES", "PS", "NS", "S")}
