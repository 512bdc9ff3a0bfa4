"""How good edits are on a set of records: each alone on the base model, or in sequence with all of them active.

An evaluation does not touch the ledger. Every expensive stage is stored as soon as it is computed, so that an
interrupted evaluation resumes and gives the same result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from service.covariance.corpus import Corpus
from service.datasets.fact_table import find_facts_file
from service.datasets.loading import read_records
from service.datasets.record import Record, check_record_fits, record_fits
from service.editing.context import EditorContext
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.evaluation.checkpointing import StageCache
from service.evaluation.evaluation_context import EvaluationContext
from service.evaluation.evaluation_run import EvaluationRun
from service.evaluation.measuring import evenly_spaced, texts_without_edited_facts
from service.kit.artifact_store import ArtifactStore
from service.kit.steps import Stepper
from service.recipes.recipe import resolve_hparams
from service.schemas import EvaluationPlan

DAMAGE_TEXTS = {"single": 16, "sequence": 200}  # default number of plain texts
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


def run_evaluation(
    replica: VersionedModel,
    context: EditorContext,
    plan: EvaluationPlan,
    records: Sequence[Record],
    store: ArtifactStore,
    damage_corpus: Corpus | None = None,
    other_records: Sequence[Record] = (),
) -> Stepper[dict[str, Any]]:
    """Carry out a plan and return its result as JSON.

    Damage is measured on the texts of `damage_corpus`, by default those of the editor's corpus, and recall on
    `other_records` about subjects that are not edited, by default on the fact table of the model.
    """
    plan.check_consistency()
    fitting, left_out = split_fitting_records(replica, plan, records)
    corpus = damage_corpus or (yield from context.get_corpus())
    texts = texts_without_edited_facts(corpus.texts, fitting)
    if plan.damage and not texts:
        raise InvalidInput(
            f"every text of {corpus.source} states an edited fact: give other plain texts, or turn damage off.",
            "damage",
        )
    evaluation = EvaluationContext(
        replica,
        context,
        plan,
        resolve_hparams(context.recipe, plan.hparams, replica.base.num_layers, plan.method),
        fitting,
        evenly_spaced(texts, plan.damage_texts or DAMAGE_TEXTS[plan.mode]),
        StageCache(store),
        select_other_facts(replica, plan, fitting, other_records),
    )
    results = yield from EvaluationRun(evaluation).execute()
    metadata = {
        "model": {"name": replica.base.name, "fingerprint": replica.base.fingerprint},
        "plan": plan.model_dump(mode="json"),
        "parameters": evaluation.parameters.model_dump(mode="json"),
        "records": {
            "measured": len(fitting),
            "left_out": left_out,
            "missing_fields": dict(Counter(field for r in fitting for field in r.missing_fields)),
        },
        "damage_texts": (
            {"source": corpus.source, "count": len(evaluation.damage_texts)} if plan.damage else None
        ),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return nonfinite_to_none(metadata | results)  # type: ignore[no-any-return]


def select_other_facts(
    replica: VersionedModel, plan: EvaluationPlan, edited: Sequence[Record], records: Sequence[Record]
) -> list[Record]:
    """Return the facts on which a plan measures recall, by default those of the model's table: about subjects that are
    not edited, each once, at equal distances. Raise InvalidInput if the plan measures it and there are none."""
    if not plan.recall_facts:
        return []
    table = find_facts_file(replica.base.path)
    if not records and table is not None:
        records = read_records(table, plan.seed)
    subjects = {r.subject for r in edited}
    others = {r.text: r for r in records if r.target_true and r.subject not in subjects}
    fitting = [r for r in others.values() if record_fits(r, replica.base.text_encoder)]
    if not fitting:
        raise InvalidInput(
            "recall needs facts that are not edited: this model has no fact table, and no other records were given.",
            "recall_facts",
        )
    return evenly_spaced(fitting, plan.recall_facts)


def split_fitting_records(
    replica: VersionedModel, plan: EvaluationPlan, records: Sequence[Record]
) -> tuple[list[Record], list[dict[str, str]]]:
    """Return the records that the model can be scored on, and name and reason of each other one."""
    fitting: list[Record] = []
    left_out: list[dict[str, str]] = []
    for record in records:
        try:
            check_record_fits(record, plan.objective, replica.base.text_encoder)
        except InvalidInput as error:
            left_out.append({"record": record.name, "reason": error.detail})
        else:
            fitting.append(record)
    if not fitting:
        reason = left_out[0]["reason"] if left_out else "there are none."
        raise InvalidInput(f"no record can be evaluated on this model: {reason}", "records")
    return fitting, left_out


def nonfinite_to_none(value: Any) -> Any:
    """Return the value with None in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {k: nonfinite_to_none(v) for k, v in value.items()}
    if isinstance(value, list):
        return [nonfinite_to_none(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
