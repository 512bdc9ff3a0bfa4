"""A recipe for a model that nobody tuned: edits of facts that it knows are tried, one knob after another, and the best is written down.

Tracing does not tell where a model is edited best (Hase et al. 2023), so layers are found by editing. A candidate is tried on the same
facts as all others: each edit alone, then all of them active at once, and what that does to plain statements. Its merit is the harmonic
mean of S alone, S together and, twice, 1 - rise of the loss. Stages follow one another, and each starts from the best of those before it.
Whatever was tried is kept by name, so that an interrupted preparation goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from service.datasets.record import Record, check_record_fits
from service.editing.context import EditInput, EditorContext
from service.engine.versioned_model import EmptyLedger, VersionedModel, WeightOverrides
from service.errors import InvalidInput
from service.evaluation.composition import choose_group_strengths
from service.evaluation.measuring import texts_without_edited_facts
from service.evaluation.metrics import RecordScores, scoring_pairs, summarize
from service.kit.artifact_store import ArtifactStore, get_json, put_json
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.methods.registry import METHODS
from service.models.loading import LoadedModel, with_bos
from service.models.scoring import measure_drift, score_targets
from service.recipes.recipe import Recipe
from service.recipes.strength_schedule import strength_schedule
from service.scores.scores import harmonic_mean
from service.weights.factors import EditUpdate

MIN_FACTS = 8  # facts that a recipe can be chosen by
MAX_LAYERS_TRIED = 12  # single layers that are tried at most
MAX_DEPTH_FRACTION = 0.75  # of the layers: above, an edit comes too late for what reads the subject
MAX_DAMAGE_TEXTS = 150  # plain statements on which damage is measured
EDITS_PER_BATCH = 8  # edits found between two signs of progress

JsonDict = dict[str, Any]

#: where the search starts: small steps and a wide clamp find small changes; a few contexts stand for what may come before
START_VALUES: JsonDict = {
    "steps": 60, "learning_rate": 0.1, "weight_decay": 1e-3, "clamp": 4.0, "contexts": 2, "anchor": "own",
}  # fmt: skip

#: the knobs that are turned once the layers are found: name of the stage -> what is tried
STAGES: dict[str, tuple[JsonDict, ...]] = {
    "restraint": (
        {"weight_decay": 0.5, "stop_loss": 0.1},
        {"weight_decay": 0.5, "stop_loss": 0.2},
        {"weight_decay": 2.0, "stop_loss": 0.1},
    ),
    "key": ({"bare_weight": 0.5}, {"bare_keys": True, "bare_weight": 0.7}),
    "pace": ({"steps": 25, "learning_rate": 0.5}, {"steps": 40, "learning_rate": 0.2}),
    "ridge": ({"ridge": 0.05}, {"ridge": 0.5}),
}

#: what is tried of an edit's strength once there are many, weakest first
STRENGTH_GRID = (0.3, 0.36, 0.43, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
MAX_CLAMP = 1.6  # at most: what only the hardest edits reach costs most
MIN_RIDGE = 0.5  # at least: isolating many subjects from each other costs more than it saves
MARGIN_GRID = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0)
FULL_STRENGTH_MARGIN = 0.5  # nats that are lead enough for an edit at full strength
BATCH_FRACTIONS = (1.0, 0.5, 0.25)  # shares of the many facts for which a lead is found
MAX_LOSS_INCREASE = (
    0.09  # of the loss on plain statements, that many edits may bring; on other facts it may be a tenth
)


@dataclass(frozen=True)
class SearchContext:
    """What every candidate is tried on."""

    replica: VersionedModel
    editor: EditorContext
    records: Sequence[Record]
    damage_texts: Sequence[str]
    store: ArtifactStore


# which facts, and how the model wants to be asked


def select_known_records(model: LoadedModel, records: Sequence[Record], limit: int) -> Stepper[list[Record]]:
    """The first `limit` records of different subjects whose true object is the model's own answer."""
    known_records: dict[str, Record] = {}
    for start in range(0, len(records), 32):
        batch = [
            r
            for r in records[start : start + 32]
            if r.subject not in known_records and can_score_record(model, r)
        ]
        scores = yield from score_targets(model, [(r.text, str(r.target_true)) for r in batch])
        known_records |= {r.subject: r for r, s in zip(batch, scores, strict=True) if s.is_greedy}
        yield Progress(Phase.PROBE, min(len(known_records), limit), limit)
        if len(known_records) >= limit:
            break
    if len(known_records) < MIN_FACTS:
        raise InvalidInput(
            f"the model knows {len(known_records)} of {len(records)} facts by heart, and a recipe needs {MIN_FACTS} at least: give a file of facts "
            "that it knows.",
            "facts",
        )
    return list(known_records.values())[:limit]


def can_score_record(model: LoadedModel, record: Record) -> bool:
    if record.target_true is None:
        return False
    try:
        check_record_fits(record, "write", model.tokenizer.backend_tokenizer, model.max_positions)
    except InvalidInput:
        return False
    return True


def score_with_and_without_bos(model: LoadedModel, records: Sequence[Record]) -> Stepper[dict[str, float]]:
    """The mean log-probability of true objects, on the prompts and paraphrases, with and without a start token before the text."""
    pairs = [
        (p, str(r.target_true))
        for r in records
        if can_score_record(model, r)
        for p in (r.text, *r.paraphrases)
    ]
    log_probs = {}
    for name, variant in (("as it is", model), ("after the start token", with_bos(model))):
        scores = yield from score_targets(variant, pairs)
        log_probs[name] = sum(s.log_p for s in scores) / max(1, len(scores))
    return log_probs


def prefers_bos(model: LoadedModel, log_probs: dict[str, float]) -> bool:
    """Whether the model reads facts better after its start token; not where its tokenizer puts one there already."""
    better = log_probs["after the start token"] > log_probs["as it is"]
    return better and with_bos(model) is not model


# one candidate


def evaluate_candidate(search: SearchContext, method: str, values: JsonDict) -> Stepper[JsonDict]:
    """Try a candidate: its figures. One that cannot be carried out has the merit 0, and the reason."""
    name = _artifact_name("tried", [method, values])
    figures: JsonDict | None = get_json(search.store, name)
    if figures is None:
        try:
            figures = yield from _measure_candidate(search, method, values)
        except InvalidInput as error:
            figures = {"reason": error.detail}
        put_json(search.store, name, figures)
    return {"method": method, "hparams": values} | figures | {"merit": compute_objective(figures)}


def _artifact_name(kind: str, inputs: Any) -> str:
    """Under which something is kept: a digest of all that it depends on."""
    return f"{kind}-{hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]}"


def _find_edits(
    search: SearchContext, method: str, values: JsonDict, records: Sequence[Record]
) -> Stepper[list[list[EditUpdate]]]:
    """The pieces of each record's edit."""
    updates: list[list[EditUpdate]] = []
    for start in range(0, len(records), EDITS_PER_BATCH):
        specs = [
            EditInput(fill_prompt(r.prompt, r.subject), r.target_new, method, values, f"{start + i:06}")
            for i, r in enumerate(records[start : start + EDITS_PER_BATCH])
        ]
        factors = yield from report_as(
            search.editor.find_all_factors(specs), Progress(Phase.FIND, start, len(records))
        )
        updates += [f.updates for f in factors]
    return updates


def _measure_jointly(
    search: SearchContext, records: Sequence[Record], updates: Sequence[EditUpdate]
) -> Stepper[tuple[list[JsonDict], float]]:
    """With all of these pieces active: each record's measures, and by how much the loss on plain statements rises."""
    weights = search.replica.compose_weights(updates)
    rows = yield from _measure_records(search, records, weights)
    drift = yield from measure_drift(
        search.replica.base, search.damage_texts, partial(search.replica.use_weights, weights)
    )
    return rows, drift.loss_after / drift.loss_before - 1


def _measure_candidate(search: SearchContext, method: str, values: JsonDict) -> Stepper[JsonDict]:
    records = search.records
    updates = yield from _find_edits(search, method, values, records)
    alone = []
    for i, (record, group) in enumerate(zip(records, updates, strict=True)):
        alone += yield from report_as(
            _measure_records(search, [record], search.replica.compose_weights(group)),
            Progress(Phase.MEASURE, i, len(records)),
        )
    all_updates = [p for group in updates for p in group]
    together, loss_increase = yield from _measure_jointly(search, records, all_updates)
    return {"alone": mean_scores(alone), "together": mean_scores(together), "rise": loss_increase}


def mean_scores(rows: Sequence[JsonDict]) -> JsonDict:
    """ES, PS, NS and S over records."""
    means = summarize(rows, 0)
    return {m: (means[m] or {}).get("mean") for m in ("ES", "PS", "NS", "S")}


def compute_objective(figures: JsonDict) -> float:
    """The harmonic mean of S alone, S together and, as often as these, what is left of the loss; 0 without figures."""
    if "together" not in figures:
        return 0.0
    loss_term = min(1.0, 1 - figures["rise"])
    return harmonic_mean(
        (figures["alone"]["S"] or 0.0, figures["together"]["S"] or 0.0, loss_term, loss_term)
    )


def _measure_records(
    search: SearchContext, records: Sequence[Record], weights: WeightOverrides
) -> Stepper[list[JsonDict]]:
    """The measures of each record with these weights in place."""
    pairs = [pair for r in records for pair in scoring_pairs(r)]
    scores = yield from search.replica.step_with_weights(weights, score_targets(search.replica.base, pairs))
    score_iterator = iter(scores)
    return [
        RecordScores.from_scores(r, [next(score_iterator) for _ in scoring_pairs(r)]).measures()
        for r in records
    ]


# stages


def candidate_layers(layers: int) -> list[int]:
    """Single layers, evenly from the first on, as deep as edits can be expected to take."""
    deepest = max(1, round(MAX_DEPTH_FRACTION * layers))
    step = -(-deepest // MAX_LAYERS_TRIED)
    return list(range(0, deepest, step))


def layer_ranges_around(layer: int, layers: int) -> list[tuple[int, ...]]:
    """Runs of two and three layers that hold a layer."""
    runs = [tuple(range(first, first + n)) for n in (2, 3) for first in range(layer - n + 1, layer + 1)]
    return [run for run in runs if run[0] >= 0 and run[-1] < layers]


def _run_stage(
    search: SearchContext,
    method: str,
    history: list[JsonDict],
    on_candidate: Callable[[str, JsonDict], None],
    name: str,
    base: JsonDict,
    changes: Sequence[JsonDict],
    untried: float = 0.0,
) -> Stepper[JsonDict]:
    """The best of some values and what each change makes of them; what was tried joins the history."""
    best = base
    for number, change in enumerate(changes):
        values = base | change
        description = ", ".join(f"{k} {v}" for k, v in change.items())
        phase = Progress(Phase.SEARCH, number, len(changes), f"{name}: {description}")
        candidate = yield from report_as(evaluate_candidate(search, method, values), phase)
        history.append({"stage": name} | candidate)
        on_candidate(name, candidate)
        if candidate["merit"] > recorded_objective(history, best, untried):
            best = values
    return best


def search_rome_values(
    search: SearchContext, on_candidate: Callable[[str, JsonDict], None]
) -> Stepper[tuple[JsonDict, list[JsonDict]]]:
    """The best values for "rome", and everything that was tried. `told` hears of each candidate."""
    history: list[JsonDict] = []
    stage = partial(_run_stage, search, "rome", history, on_candidate)
    count = search.replica.base.num_layers
    best = yield from stage("layer", START_VALUES, [{"layers": [x]} for x in candidate_layers(count)])
    if "layers" not in best:
        raise InvalidInput(
            f"no layer from 0 to {max(candidate_layers(count))} takes edits of these facts: give others, more of them, or facts with "
            "neighbours and paraphrases that the model knows.",
            "facts",
        )
    (layer,) = best["layers"]
    best = yield from stage(
        "spread", best, [{"layers": list(run)} for run in layer_ranges_around(layer, count)]
    )
    for name, changes in STAGES.items():
        best = yield from stage(name, best, changes)
    return best, history


def recorded_objective(history: Sequence[JsonDict], values: JsonDict, untried: float = 0.0) -> float:
    """Of what was tried; of what was not, where nothing else is said, 0."""
    return next((float(h["merit"]) for h in history if h["hparams"] == values), untried)


def tune_required_margins(
    search: SearchContext,
    best: JsonDict,
    records: Sequence[Record],
    on_candidate: Callable[[str, JsonDict], None],
) -> Stepper[tuple[JsonDict, list[JsonDict], list[JsonDict]]]:
    """How strong edits are to be when there are many: the values, what was tried, and what of it was kept. For some numbers of edits,
    the greatest lead that keeps them within what plain statements may lose.

    All land together, each with the first strength at which it leads so; thus the layer's room is given to those that need it. A greater
    lead costs more of the loss and lets more edits hold, so that the greatest is looked for by halving.
    """
    history: list[JsonDict] = []
    base = best | {
        "clamp": min(float(best["clamp"]), MAX_CLAMP),
        "ridge": max(float(best.get("ridge", 0)), MIN_RIDGE),
        "strengths": list(STRENGTH_GRID),
    }
    groups: list[list[EditUpdate]] = []
    chosen: list[JsonDict] = []  # of each number of edits, fewest first
    for share in BATCH_FRACTIONS:
        count = max(1, round(share * len(records)))
        tried: dict[float, JsonDict] = {}
        low, high = 0, len(MARGIN_GRID)  # LEADS[low - 1] fits, as far as is known, and LEADS[high] does not
        while low < high:
            middle = (low + high) // 2
            candidate = yield from _evaluate_required_margin(
                search, base, MARGIN_GRID[middle], records, count, groups
            )
            tried[MARGIN_GRID[middle]] = {"stage": "many"} | candidate
            on_candidate("many", tried[MARGIN_GRID[middle]])
            low, high = (middle + 1, high) if candidate["rise"] <= MAX_LOSS_INCREASE else (low, middle)
        history += tried.values()
        chosen.insert(0, tried[MARGIN_GRID[max(0, low - 1)]])
        if low == len(MARGIN_GRID):
            break  # fewer have room for as much
    width = search.replica.base.intermediate_size
    required_margins = [(h["edits"] / width, h["hparams"]["required_margins"][0][1]) for h in chosen]
    margin = min(h["hparams"]["margin"] for h in chosen)
    return base | {"margin": margin, "required_margins": required_margins}, history, chosen


def _evaluate_required_margin(
    search: SearchContext,
    base: JsonDict,
    required_margin: float,
    records: Sequence[Record],
    count: int,
    groups: list[list[EditUpdate]],
) -> Stepper[JsonDict]:
    """Let so many edits land together, each as strong as it takes to lead so: one crowd of the records after another, since a few
    hard edits can double what a crowd costs. S is of all records, the rise of the loss that of the worst crowd. Pieces are in
    `groups`, or come to be there."""
    values = base | {
        "margin": min(required_margin, FULL_STRENGTH_MARGIN),
        "required_margins": [(0.0, required_margin)],
    }
    name = _artifact_name("many", [values, len(records), count])
    candidate: JsonDict | None = get_json(search.store, name)
    if candidate is not None:
        return candidate
    if not groups:
        groups += yield from _find_edits(search, "rome", base, records)
    starts = range(0, len(records) - count + 1, count)
    rows: list[JsonDict] = []
    loss_increases: list[float] = []
    for start in starts:
        batch = slice(start, start + count)
        phase = Progress(
            Phase.SEARCH, len(loss_increases), len(starts), f"{count} edits, margin {required_margin}"
        )
        stepper = _evaluate_batch(search, values, records[batch], groups[batch])
        batch_rows, loss_increase = yield from report_as(stepper, phase)
        rows, loss_increases = rows + batch_rows, [*loss_increases, loss_increase]
    means = mean_scores(rows)
    candidate = {
        "method": "rome",
        "hparams": values,
        "edits": count,
        "together": means,
        "rise": max(loss_increases),
        "rises": loss_increases,
        "merit": means["S"] or 0.0,
    }
    put_json(search.store, name, candidate)
    return candidate


def _evaluate_batch(
    search: SearchContext, values: JsonDict, records: Sequence[Record], groups: Sequence[Sequence[EditUpdate]]
) -> Stepper[tuple[list[JsonDict], float]]:
    """Land some edits together: each record's measures, and the rise of the loss."""
    parameters = RomeParameters.model_validate(values)
    schedule = strength_schedule(
        parameters, parameters.strengths, len(records), search.replica.base.intermediate_size
    )
    strengths = yield from choose_group_strengths(search.replica, records, groups, [], schedule)
    updates = [p.scaled(s) for group, s in zip(groups, strengths, strict=True) for p in group]
    return (yield from _measure_jointly(search, records, updates))


def search_method_values(
    search: SearchContext, method: str, on_candidate: Callable[[str, JsonDict], None]
) -> Stepper[tuple[JsonDict, list[JsonDict]]]:
    """The best values of another method beside what it takes from the recipe."""
    best: JsonDict = {}
    history: list[JsonDict] = []
    count = search.replica.base.num_layers
    edit_method = METHODS[method]
    stages: tuple[tuple[JsonDict, ...], ...] = edit_method.search_space
    if edit_method.needs_covariance:
        best = {"contexts": START_VALUES["contexts"]}
    if "threshold" in edit_method.parameters.model_fields:
        stages = ((yield from threshold_candidates(search)), *stages)
    if edit_method.searched_layers is not None:
        upper_half = range(count // 2, count)
        layers = _single_layer_values(
            upper_half if edit_method.searched_layers == "late" else candidate_layers(count)
        )
        if edit_method.needs_covariance:  # start with the highest layer of the recipe's
            stages, best = (*stages, layers), best | {"layers": [max(_recipe(search).rome.layers)]}
        else:
            stages = (layers, *stages)
    for changes in stages:
        best = yield from _run_stage(
            search, method, history, on_candidate, method, best, changes, untried=-1.0
        )
    return best, history


def _single_layer_values(layers: Iterable[int]) -> tuple[JsonDict, ...]:
    return tuple({"layers": [x]} for x in layers)


def _recipe(search: SearchContext) -> Recipe:
    assert search.editor.recipe is not None
    return search.editor.recipe


def threshold_candidates(search: SearchContext) -> Stepper[tuple[JsonDict, ...]]:
    """Thresholds below which half, three quarters and nine tenths of the directions of the edited layers lie."""
    layers = _recipe(search).rome.layers
    statistics = yield from search.editor.get_statistics(layers)
    values = statistics[max(layers)].spectrum[0].clamp(min=0)
    return tuple(
        {"threshold": float(values[int(share * (len(values) - 1))]), "ridge": ridge}
        for share, ridge in ((0.5, 0.1), (0.75, 0.1), (0.9, 0.1), (0.9, 1.0))
    )


# the whole


@dataclass(frozen=True)
class TuningResult:
    """What a preparation came to."""

    recipe: Recipe
    history: list[JsonDict]


def tune_recipe(
    model: LoadedModel,
    context: EditorContext,
    records: Sequence[Record],
    plain_statements: Sequence[str],
    store: ArtifactStore,
    prepend_bos: bool,
    methods: Sequence[str] = (),
    batch_records: Sequence[Record] = (),
    on_candidate: Callable[[str, JsonDict], None] = lambda *_: None,
) -> Stepper[TuningResult]:
    """Find a recipe on records that the model knows; with `many` of them, also how strong edits are to be when there are many.
    `others` are plain statements; what is edited is left out of them."""
    damage_texts = texts_without_edited_facts(plain_statements, [*records, *batch_records])
    damage_texts = damage_texts[:: max(1, len(damage_texts) // MAX_DAMAGE_TEXTS)][:MAX_DAMAGE_TEXTS]
    if not damage_texts:
        raise InvalidInput(
            "there are no plain statements beside the facts that are edited: give more facts.", "facts"
        )
    search = SearchContext(VersionedModel(model, EmptyLedger()), context, records, damage_texts, store)
    search.editor.recipe = Recipe(source="a first guess", rome=RomeParameters(layers=(0,)))
    best, history = yield from search_rome_values(search, on_candidate)
    chosen = next(h for h in history if h["hparams"] == best)
    chosen_by_count: list[JsonDict] = []
    if batch_records:
        best, method_history, chosen_by_count = yield from tune_required_margins(
            search, best, batch_records, on_candidate
        )
        history += method_history
    rome = RomeParameters.model_validate(best)
    search.editor.recipe = Recipe(source="found for rome", rome=rome)
    method_values: dict[str, JsonDict] = {}
    for method in methods:
        method_values[method], method_history = yield from search_method_values(search, method, on_candidate)
        history += method_history
    figures = {
        "facts": len(records),
        "plain": len(damage_texts),
        "corpus": context.corpus.source,
        "chosen": chosen,
        "many": chosen_by_count,
        "methods": {
            m: next((h for h in history if h["method"] == m and h["hparams"] == v), None)
            for m, v in method_values.items()
        },
    }
    source = f"palimpsest prepare, on {len(records)} facts that the model knows"
    return TuningResult(
        Recipe(source=source, rome=rome, methods=method_values, prepend_bos=prepend_bos, figures=figures),
        history,
    )
