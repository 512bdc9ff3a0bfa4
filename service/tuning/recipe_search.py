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

from service.datasets.records import Record, check_askable
from service.editing.context import Asking, Toolkit
from service.engine.versioned_model import NoLedger, Replica, Weights
from service.errors import InvalidInput
from service.evaluation.metrics import Answers, ask, summary
from service.evaluation.runner import landing_steps, plain_texts
from service.kit.artifact_store import Kept, get_json, put_json
from service.kit.steps import Progress, Steps, within
from service.kit.text import fill
from service.models.loading import LoadedModel, with_start
from service.models.scoring import drift_steps, score_steps
from service.recipes.recipe import METHODS, FineTuneParameters, Recipe, RomeParameters, climb
from service.scores.scores import harmonic_mean
from service.weights.composition import Piece

LEAST = 8  # facts that a recipe can be chosen by
TRIED = 12  # single layers that are tried at most
DEEPEST = 0.75  # of the layers: above, an edit comes too late for what reads the subject
PLAIN = 150  # plain statements on which damage is measured
COMPANY = 8  # edits found between two signs of progress

Values = dict[str, Any]

#: where the search starts: small steps and a wide clamp find small changes; a few contexts stand for what may come before
START: Values = {
    "steps": 60, "learning_rate": 0.1, "weight_decay": 1e-3, "clamp": 4.0, "contexts": 2, "anchor": "own",
}  # fmt: skip

#: the knobs that are turned once the layers are found: name of the stage -> what is tried
STAGES: dict[str, tuple[Values, ...]] = {
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
WEAK = (0.3, 0.36, 0.43, 0.5, 0.6, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
CLAMP = 1.6  # at most: what only the hardest edits reach costs most
RIDGE = 0.5  # at least: isolating many subjects from each other costs more than it saves
LEADS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0)
FIRM = 0.5  # nats that are lead enough for an edit at full strength
CROWDS = (1.0, 0.5, 0.25)  # shares of the many facts for which a lead is found
RISE = 0.09  # of the loss on plain statements, that many edits may bring; on other facts it may be a tenth

#: of the hidden state's norm, for methods that change that
CLAMPS: tuple[Values, ...] = ({"clamp": 0.75}, {"clamp": 1.6}, {"clamp": 3.2})

#: the knobs of the other methods; those that associate take layers and search from the recipe that was found for "rome"
KNOBS: dict[str, tuple[tuple[Values, ...], ...]] = {
    "r-rome": (
        (
            {"steps": 60, "learning_rate": 0.1, "weight_decay": 1e-3, "stop_loss": 0.05, "clamp": 4.0},
            {"steps": 40, "learning_rate": 0.2, "weight_decay": 1e-3, "stop_loss": 0.05, "clamp": 4.0},
            {"steps": 20, "learning_rate": 0.5, "weight_decay": 0.5, "stop_loss": 0.05, "clamp": 4.0},
        ),
    ),
    "memit": (({"ridge": 3.0}, {"ridge": 30.0}, {"ridge": 300.0}), CLAMPS),
    "emmet": (CLAMPS, ({"ridge": 0.1}, {"ridge": 10.0})),
    "alphaedit": (CLAMPS,),  # and thresholds, which are read from the statistics
    "ft": (({"learning_rate": 1e-4}, {"learning_rate": 5e-4}, {"learning_rate": 2e-3}),),
    "ft-l": (({"epsilon": 5e-4}, {"epsilon": 1e-3}, {"epsilon": 2e-3}, {"epsilon": 8e-3}),),
    "ft-attn": (({"epsilon": 1e-3}, {"epsilon": 2e-3}, {"epsilon": 4e-3}, {"epsilon": 1.6e-2}),),
}


@dataclass(frozen=True)
class Bench:
    """What every candidate is tried on."""

    replica: Replica
    toolkit: Toolkit
    records: Sequence[Record]
    plain: Sequence[str]
    kept: Kept


# which facts, and how the model wants to be asked


def known_steps(model: LoadedModel, records: Sequence[Record], limit: int) -> Steps[list[Record]]:
    """The first `limit` records of different subjects whose true object is the model's own answer."""
    known: dict[str, Record] = {}
    for at in range(0, len(records), 32):
        some = [r for r in records[at : at + 32] if r.subject not in known and askable(model, r)]
        scores = yield from score_steps(model, [(r.text, str(r.target_true)) for r in some])
        known |= {r.subject: r for r, s in zip(some, scores, strict=True) if s.says}
        yield Progress("ask for facts", min(len(known), limit), limit)
        if len(known) >= limit:
            break
    if len(known) < LEAST:
        raise InvalidInput(
            f"the model knows {len(known)} of {len(records)} facts by heart, and a recipe needs {LEAST} at least: give a file of facts "
            "that it knows.",
            "facts",
        )
    return list(known.values())[:limit]


def askable(model: LoadedModel, record: Record) -> bool:
    if record.target_true is None:
        return False
    try:
        check_askable(record, "write", model.tokenizer.backend_tokenizer, model.positions)
    except InvalidInput:
        return False
    return True


def reading_steps(model: LoadedModel, records: Sequence[Record]) -> Steps[dict[str, float]]:
    """The mean log-probability of true objects, on the prompts and paraphrases, with and without a start token before the text."""
    pairs = [(p, str(r.target_true)) for r in records if askable(model, r) for p in (r.text, *r.paraphrases)]
    found = {}
    for name, reader in (("as it is", model), ("after the start token", with_start(model))):
        scores = yield from score_steps(reader, pairs)
        found[name] = sum(s.log_p for s in scores) / max(1, len(scores))
    return found


def wants_start(model: LoadedModel, reading: dict[str, float]) -> bool:
    """Whether the model reads facts better after its start token; not where its tokenizer puts one there already."""
    better = reading["after the start token"] > reading["as it is"]
    return better and with_start(model) is not model


# one candidate


def tried_steps(bench: Bench, method: str, values: Values) -> Steps[Values]:
    """Try a candidate: its figures. One that cannot be carried out has the merit 0, and the reason."""
    name = _name("tried", [method, values])
    figures: Values | None = get_json(bench.kept, name)
    if figures is None:
        try:
            figures = yield from _figures_steps(bench, method, values)
        except InvalidInput as error:
            figures = {"reason": error.detail}
        put_json(bench.kept, name, figures)
    return {"method": method, "hparams": values} | figures | {"merit": merit_of(figures)}


def _name(kind: str, about: Any) -> str:
    """Under which something is kept: a digest of all that it depends on."""
    return f"{kind}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]}"


def _found_steps(
    bench: Bench, method: str, values: Values, records: Sequence[Record]
) -> Steps[list[list[Piece]]]:
    """The pieces of each record's edit."""
    pieces: list[list[Piece]] = []
    for at in range(0, len(records), COMPANY):
        asked = [
            Asking(fill(r.prompt, r.subject), r.target_new, method, values, f"{at + i:06}")
            for i, r in enumerate(records[at : at + COMPANY])
        ]
        found = yield from within(
            bench.toolkit.find_together_steps(asked), Progress("find", at, len(records))
        )
        pieces += [f.pieces for f in found]
    return pieces


def _together_steps(
    bench: Bench, records: Sequence[Record], pieces: Sequence[Piece]
) -> Steps[tuple[list[Values], float]]:
    """With all of these pieces active: each record's measures, and by how much the loss on plain statements rises."""
    weights = bench.replica.composed(pieces)
    rows = yield from _measured_steps(bench, records, weights)
    drift = yield from drift_steps(bench.replica.base, bench.plain, partial(bench.replica.stand, weights))
    return rows, drift.after / drift.before - 1


def _figures_steps(bench: Bench, method: str, values: Values) -> Steps[Values]:
    records = bench.records
    pieces = yield from _found_steps(bench, method, values, records)
    alone = []
    for i, (record, group) in enumerate(zip(records, pieces, strict=True)):
        alone += yield from within(
            _measured_steps(bench, [record], bench.replica.composed(group)),
            Progress("measure", i, len(records)),
        )
    everything = [p for group in pieces for p in group]
    together, rise = yield from _together_steps(bench, records, everything)
    return {"alone": means_of(alone), "together": means_of(together), "rise": rise}


def means_of(rows: Sequence[Values]) -> Values:
    """ES, PS, NS and S over records."""
    means = summary(rows, 0)
    return {m: (means[m] or {}).get("mean") for m in ("ES", "PS", "NS", "S")}


def merit_of(figures: Values) -> float:
    """The harmonic mean of S alone, S together and, as often as these, what is left of the loss; 0 without figures."""
    if "together" not in figures:
        return 0.0
    left = min(1.0, 1 - figures["rise"])
    return harmonic_mean((figures["alone"]["S"] or 0.0, figures["together"]["S"] or 0.0, left, left))


def _measured_steps(bench: Bench, records: Sequence[Record], weights: Weights) -> Steps[list[Values]]:
    """The measures of each record with these weights in place."""
    pairs = [pair for r in records for pair in ask(r)]
    scores = yield from bench.replica.standing(weights, score_steps(bench.replica.base, pairs))
    said = iter(scores)
    return [Answers.of(r, [next(said) for _ in ask(r)]).measures() for r in records]


# stages


def layers_tried(layers: int) -> list[int]:
    """Single layers, evenly from the first on, as deep as edits can be expected to take."""
    deepest = max(1, round(DEEPEST * layers))
    step = -(-deepest // TRIED)
    return list(range(0, deepest, step))


def spreads_around(layer: int, layers: int) -> list[tuple[int, ...]]:
    """Runs of two and three layers that hold a layer."""
    runs = [tuple(range(first, first + n)) for n in (2, 3) for first in range(layer - n + 1, layer + 1)]
    return [run for run in runs if run[0] >= 0 and run[-1] < layers]


def _stage_steps(
    bench: Bench,
    method: str,
    history: list[Values],
    told: Callable[[str, Values], None],
    name: str,
    base: Values,
    changes: Sequence[Values],
    untried: float = 0.0,
) -> Steps[Values]:
    """The best of some values and what each change makes of them; what was tried joins the history."""
    best = base
    for number, change in enumerate(changes):
        values = base | change
        words = ", ".join(f"{k} {v}" for k, v in change.items())
        phase = Progress(f"{name}: {words}", number, len(changes))
        found = yield from within(tried_steps(bench, method, values), phase)
        history.append({"stage": name} | found)
        told(name, found)
        if found["merit"] > merit(history, best, untried):
            best = values
    return best


def search_steps(bench: Bench, told: Callable[[str, Values], None]) -> Steps[tuple[Values, list[Values]]]:
    """The best values for "rome", and everything that was tried. `told` hears of each candidate."""
    history: list[Values] = []
    stage = partial(_stage_steps, bench, "rome", history, told)
    count = bench.replica.base.layers
    best = yield from stage("layer", START, [{"layers": [x]} for x in layers_tried(count)])
    if "layers" not in best:
        raise InvalidInput(
            f"no layer from 0 to {max(layers_tried(count))} takes edits of these facts: give others, more of them, or facts with "
            "neighbours and paraphrases that the model knows.",
            "facts",
        )
    (layer,) = best["layers"]
    best = yield from stage("spread", best, [{"layers": list(run)} for run in spreads_around(layer, count)])
    for name, changes in STAGES.items():
        best = yield from stage(name, best, changes)
    return best, history


def merit(history: Sequence[Values], values: Values, untried: float = 0.0) -> float:
    """Of what was tried; of what was not, where nothing else is said, 0."""
    return next((float(h["merit"]) for h in history if h["hparams"] == values), untried)


def room_steps(
    bench: Bench, best: Values, records: Sequence[Record], told: Callable[[str, Values], None]
) -> Steps[tuple[Values, list[Values], list[Values]]]:
    """How strong edits are to be when there are many: the values, what was tried, and what of it was kept. For some numbers of edits,
    the greatest lead that keeps them within what plain statements may lose.

    All land together, each with the first strength at which it leads so; thus the layer's room is given to those that need it. A greater
    lead costs more of the loss and lets more edits hold, so that the greatest is looked for by halving.
    """
    history: list[Values] = []
    base = best | {
        "clamp": min(float(best["clamp"]), CLAMP),
        "ridge": max(float(best.get("ridge", 0)), RIDGE),
        "strengths": list(WEAK),
    }
    groups: list[list[Piece]] = []
    kept: list[Values] = []  # of each number of edits, fewest first
    for share in CROWDS:
        count = max(1, round(share * len(records)))
        tried: dict[float, Values] = {}
        low, high = 0, len(LEADS)  # LEADS[low - 1] fits, as far as is known, and LEADS[high] does not
        while low < high:
            at = (low + high) // 2
            found = yield from _many_steps(bench, base, LEADS[at], records, count, groups)
            tried[LEADS[at]] = {"stage": "many"} | found
            told("many", tried[LEADS[at]])
            low, high = (at + 1, high) if found["rise"] <= RISE else (low, at)
        history += tried.values()
        kept.insert(0, tried[LEADS[max(0, low - 1)]])
        if low == len(LEADS):
            break  # fewer have room for as much
    width = bench.replica.base.inner_width
    leads = [(h["edits"] / width, h["hparams"]["leads"][0][1]) for h in kept]
    margin = min(h["hparams"]["margin"] for h in kept)
    return base | {"margin": margin, "leads": leads}, history, kept


def _many_steps(
    bench: Bench,
    base: Values,
    lead: float,
    records: Sequence[Record],
    count: int,
    groups: list[list[Piece]],
) -> Steps[Values]:
    """Let so many edits land together, each as strong as it takes to lead so: one crowd of the records after another, since a few
    hard edits can double what a crowd costs. S is of all records, the rise of the loss that of the worst crowd. Pieces are in
    `groups`, or come to be there."""
    values = base | {"margin": min(lead, FIRM), "leads": [(0.0, lead)]}
    name = _name("many", [values, len(records), count])
    found: Values | None = get_json(bench.kept, name)
    if found is not None:
        return found
    if not groups:
        groups += yield from _found_steps(bench, "rome", base, records)
    crowds = range(0, len(records) - count + 1, count)
    rows: list[Values] = []
    rises: list[float] = []
    for at in crowds:
        crowd = slice(at, at + count)
        phase = Progress(f"{count} edits, a lead of {lead}", len(rises), len(crowds))
        steps = _crowd_steps(bench, values, records[crowd], groups[crowd])
        more, rise = yield from within(steps, phase)
        rows, rises = rows + more, [*rises, rise]
    together = means_of(rows)
    found = {
        "method": "rome",
        "hparams": values,
        "edits": count,
        "together": together,
        "rise": max(rises),
        "rises": rises,
        "merit": together["S"] or 0.0,
    }
    put_json(bench.kept, name, found)
    return found


def _crowd_steps(
    bench: Bench, values: Values, records: Sequence[Record], groups: Sequence[Sequence[Piece]]
) -> Steps[tuple[list[Values], float]]:
    """Land some edits together: each record's measures, and the rise of the loss."""
    parameters = RomeParameters.model_validate(values)
    ways = climb(parameters, parameters.strengths, len(records), bench.replica.base.inner_width)
    chosen = yield from landing_steps(bench.replica, records, groups, [], ways)
    landed = [p.scaled(s) for group, s in zip(groups, chosen, strict=True) for p in group]
    return (yield from _together_steps(bench, records, landed))


def method_steps(
    bench: Bench, method: str, told: Callable[[str, Values], None]
) -> Steps[tuple[Values, list[Values]]]:
    """The best values of another method beside what it takes from the recipe."""
    best: Values = {}
    history: list[Values] = []
    count = bench.replica.base.layers
    stages = KNOBS[method]
    if METHODS[method].associates:
        best = {"contexts": START["contexts"]}
    if method == "alphaedit":
        stages = ((yield from thresholds_steps(bench)), *stages)
    if method == "ft-attn":
        stages = (_alone(range(count // 2, count)), *stages)
    elif issubclass(METHODS[method].parameters, FineTuneParameters):
        stages = (_alone(layers_tried(count)), *stages)
    elif method == "r-rome":  # one layer, as published, and a search of its own: the recipe's is for several
        stages = (*stages, _alone(layers_tried(count)))
        best |= {"layers": [max(_recipe(bench).rome.layers)]}
    for changes in stages:
        best = yield from _stage_steps(bench, method, history, told, method, best, changes, untried=-1.0)
    return best, history


def _alone(layers: Iterable[int]) -> tuple[Values, ...]:
    return tuple({"layers": [x]} for x in layers)


def _recipe(bench: Bench) -> Recipe:
    assert bench.toolkit.recipe is not None
    return bench.toolkit.recipe


def thresholds_steps(bench: Bench) -> Steps[tuple[Values, ...]]:
    """Thresholds below which half, three quarters and nine tenths of the directions of the edited layers lie."""
    layers = _recipe(bench).rome.layers
    statistics = yield from bench.toolkit.statistics_steps(layers)
    values = statistics[max(layers)].spectrum[0].clamp(min=0)
    return tuple(
        {"threshold": float(values[int(share * (len(values) - 1))]), "ridge": ridge}
        for share, ridge in ((0.5, 0.1), (0.75, 0.1), (0.9, 0.1), (0.9, 1.0))
    )


# the whole


@dataclass(frozen=True)
class Preparation:
    """What a preparation came to."""

    recipe: Recipe
    history: list[Values]


def recipe_steps(
    model: LoadedModel,
    toolkit: Toolkit,
    records: Sequence[Record],
    others: Sequence[str],
    kept: Kept,
    start: bool,
    methods: Sequence[str] = (),
    many: Sequence[Record] = (),
    told: Callable[[str, Values], None] = lambda *_: None,
) -> Steps[Preparation]:
    """Find a recipe on records that the model knows; with `many` of them, also how strong edits are to be when there are many.
    `others` are plain statements; what is edited is left out of them."""
    plain = plain_texts(others, [*records, *many])
    plain = plain[:: max(1, len(plain) // PLAIN)][:PLAIN]
    if not plain:
        raise InvalidInput(
            "there are no plain statements beside the facts that are edited: give more facts.", "facts"
        )
    bench = Bench(Replica(model, NoLedger()), toolkit, records, plain, kept)
    bench.toolkit.recipe = Recipe(source="a first guess", rome=RomeParameters(layers=(0,)))
    best, history = yield from search_steps(bench, told)
    chosen = next(h for h in history if h["hparams"] == best)
    crowds: list[Values] = []
    if many:
        best, more, crowds = yield from room_steps(bench, best, many, told)
        history += more
    rome = RomeParameters.model_validate(best)
    bench.toolkit.recipe = Recipe(source="found for rome", rome=rome)
    own: dict[str, Values] = {}
    for method in methods:
        own[method], more = yield from method_steps(bench, method, told)
        history += more
    figures = {
        "facts": len(records),
        "plain": len(plain),
        "corpus": toolkit.corpus.source,
        "chosen": chosen,
        "many": crowds,
        "methods": {
            m: next((h for h in history if h["method"] == m and h["hparams"] == v), None)
            for m, v in own.items()
        },
    }
    source = f"palimpsest prepare, on {len(records)} facts that the model knows"
    return Preparation(Recipe(source=source, rome=rome, methods=own, start=start, figures=figures), history)
