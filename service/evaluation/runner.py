"""How good edits are on a set of records: each alone on the base model, or one after another with all of them active.

Nothing is written to the ledger. What is expensive is kept as soon as it is known, under names that hold its place: an
evaluation that was interrupted goes on where it was, and comes to the same result.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from service.covariance.corpus import Corpus
from service.datasets.records import Record, check_askable, wanted_object
from service.editing.context import Asking, Toolkit
from service.engine.decoding import Batch, Row, row
from service.engine.versioned_model import Replica, Weights
from service.errors import InvalidInput
from service.evaluation.checkpointing import Stages
from service.evaluation.metrics import Answers, Measures, ask, changes, summary
from service.kit.artifact_store import Kept
from service.kit.steps import Progress, Steps, within
from service.kit.text import fill, words
from service.models.score import Score
from service.models.scoring import drift_steps, score_steps
from service.recipes.recipe import Climb, Parameters, RomeParameters, climb, resolve
from service.schemas import EvaluationPlan, Sampling
from service.scores.text_metrics import TfIdf, fluency
from service.weights.composition import Piece, compose, pack, rebuild, unpack

SIDE_BY_SIDE = 16  # edits that are found at once
MEASURED = 32  # records whose prompts are measured at once
EARLIER = (10, 100)  # how many of the first edits are looked at again
PLAIN = {"single": 16, "sequence": 200}  # plain texts
WRITTEN = 100  # tokens of a generated text, those of its prompt included, and how it is drawn, as published
TOP_K = 5
ROWS = 32  # texts generated side by side
BASE: Weights = {}  # the weights of a model without edits
LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "safetensors")


def evaluate_steps(
    replica: Replica,
    toolkit: Toolkit,
    plan: EvaluationPlan,
    records: Sequence[Record],
    kept: Kept,
    plain: Corpus | None = None,
) -> Steps[dict[str, Any]]:
    """Carry out a plan; the result is JSON. Damage is measured on `plain` texts, the toolkit's corpus when left out."""
    usable, left_out = sort_out(replica, plan, records)
    corpus = plain or toolkit.corpus
    texts = plain_texts(corpus.texts, usable)
    if plan.damage and not texts:
        raise InvalidInput(
            f"every text of {corpus.source} speaks of a fact that is edited: give other plain texts, or leave damage out.",
            "damage",
        )
    most = plan.plain or PLAIN[plan.mode]
    run = Run(replica, toolkit, plan, usable, kept, texts[:: max(1, len(texts) // most)][:most])
    found = yield from run.steps()
    about = {
        "model": {"name": replica.base.name, "fingerprint": replica.base.fingerprint},
        "plan": plan.model_dump(mode="json"),
        "parameters": run.parameters.model_dump(mode="json"),
        "records": {
            "measured": len(usable),
            "left_out": left_out,
            "lacking": dict(Counter(what for r in usable for what in r.lacks)),
        },
        "plain": {"source": corpus.source, "texts": len(run.plain)} if plan.damage else None,
        "libraries": {name: version(name) for name in LIBRARIES},
    }
    return finite(about | found)  # type: ignore[no-any-return]


def sort_out(
    replica: Replica, plan: EvaluationPlan, records: Sequence[Record]
) -> tuple[list[Record], list[dict[str, str]]]:
    """The records that this model can be asked, and why the others cannot be."""
    usable: list[Record] = []
    left_out: list[dict[str, str]] = []
    tokenizer, positions = replica.base.tokenizer.backend_tokenizer, replica.base.positions
    for record in records:
        try:
            check_askable(record, plan.objective, tokenizer, positions)
        except InvalidInput as error:
            left_out.append({"record": record.name, "reason": error.detail})
        else:
            usable.append(record)
    if not usable:
        why = left_out[0]["reason"] if left_out else "there are none."
        raise InvalidInput(f"no record can be evaluated on this model: {why}", "records")
    return usable, left_out


def plain_texts(texts: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The texts that do not speak of an edited fact: none that names a record's subject and its true object (or, where none
    is known, its subject)."""
    told = [(r.subject, r.target_true or r.subject) for r in records]
    return [t for t in texts if not any(subject in t and said in t for subject, said in told)]


def finite(value: Any) -> Any:
    """As JSON has it: what is no finite number is nothing."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Run:
    """One evaluation of records that the model can be asked."""

    def __init__(
        self,
        replica: Replica,
        toolkit: Toolkit,
        plan: EvaluationPlan,
        records: Sequence[Record],
        kept: Kept,
        plain: Sequence[str],
    ) -> None:
        plan.check()
        self.replica, self.model, self.toolkit, self.plan = replica, replica.base, toolkit, plan
        self.records, self.plain = records, plain
        self.stages = Stages(kept)
        self.parameters: Parameters = resolve(toolkit.recipe, plan.hparams, self.model.layers, plan.method)
        self.company = plan.together or (SIDE_BY_SIDE if plan.found_on == "base" else 1)
        self.before: list[Answers] = []
        self._tf_idf = TfIdf([t for r in records for t in r.reference_texts])

    def steps(self) -> Steps[dict[str, Any]]:
        """Base, edits, and what they come to."""
        self.stages.claim(
            {
                "plan": self.plan.model_dump(mode="json"),
                "parameters": self.parameters.model_dump(mode="json"),
                "model": self.model.fingerprint,
                "corpus": self.toolkit.corpus.digest,
                "records": [asdict(r) for r in self.records],
                "plain": self.plain,
            }
        )
        yield from self._ready_steps()
        self.before = yield from self._answers_steps("base", "measure the base", len(self.records), {})
        work = self._single_steps if self.plan.mode == "single" else self._sequence_steps
        found = yield from work()
        return found | self._speed()

    def _ready_steps(self) -> Steps[None]:
        """Contexts and statistics are the base model's, whatever stands while edits are found."""
        if isinstance(self.parameters, RomeParameters):
            yield from self.toolkit.contexts_steps(self.parameters.contexts, self.parameters.seed)
            yield from self.toolkit.statistics_steps(self.parameters.layers)

    def _speed(self) -> dict[str, Any]:
        """Seconds by what they were spent on, over all tries together, and edits per minute."""
        seconds = {kind: round(s, 3) for kind, s in self.stages.seconds.items()}
        find, measure = self.stages.seconds["find"], self.stages.seconds["measure"]
        rate = {"find": find, "find and measure": find + measure, "all": sum(self.stages.seconds.values())}
        minutes = {name: round(60 * len(self.records) / s, 2) for name, s in rate.items() if s > 0}
        return {"seconds": seconds, "edits_per_minute": minutes}

    # Each alone

    def _single_steps(self) -> Steps[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        while len(rows) < len(self.records):
            groups, notes = yield from self.found_steps(len(rows) // self.company, {})
            for pieces, note in zip(groups, notes, strict=True):
                i = len(rows)
                progress = Progress("measure each edit", i, len(self.records))
                rows.append((yield from within(self._alone_steps(i, pieces), progress)) | note)
        parts = ("before", "after", "changes", "norm", *(["damage"] if self.plan.damage else []))
        return (
            {"damage": None}
            | (yield from self._collected_steps(rows, parts))
            | {
                "strengthened": sum(r["strength"] != self.plan.strengths[0] for r in rows),
                "rows": rows,
            }
        )

    def _alone_steps(self, i: int, pieces: list[Piece]) -> Steps[dict[str, Any]]:
        """The row of a record whose edit alone is active."""
        record = self.records[i]
        tried = yield from self.stages.once(f"alone-{i:06}", "measure", self.tried_steps(record, [], pieces))
        after = Answers.of(record, [Score(*s) for s in tried["scores"]])
        weights = self.replica.composed(p.scaled(tried["strength"]) for p in pieces)
        found = self._row(i, after) | {"strength": tried["strength"], "norm": norms(self.replica, weights)}
        if self.plan.damage:
            found["damage"] = yield from self.stages.once(
                f"damage-{i:06}", "damage", self._damage_steps(weights)
            )
        if self.plan.generation:
            for when, standing in (("before", BASE), ("after", weights)):
                found[when] |= yield from self._written_steps(f"written-{when}-{i:06}", record, standing)
        return found

    def tried_steps(
        self, record: Record, others: Sequence[Piece], pieces: Sequence[Piece]
    ) -> Steps[dict[str, Any]]:
        """The first strength with which an edit takes beside the others, else the last; and the scores with it."""
        scores: list[Score] = []
        strength = self.plan.strengths[0]
        ways = self.climb(1)
        for strength in ways.strengths:
            weights = self.replica.composed([*others, *(p.scaled(strength) for p in pieces)])
            yield Progress("compose", 1, 1)
            scores = yield from self.replica.standing(weights, score_steps(self.model, ask(record)))
            if self.plan.objective != "write" or Answers.of(record, scores).leads(ways.enough(strength)):
                break
        return {"strength": strength, "scores": scores}

    def climb(self, active: int) -> Climb:
        """What is tried in turn when so many edits will be active."""
        return climb(self.parameters, self.plan.strengths, active, self.model.inner_width)

    # One after another

    def _sequence_steps(self) -> Steps[dict[str, Any]]:
        growth = Composed(self) if self.plan.found_on == "base" else Added(self)
        tables: list[dict[str, Any]] = []
        answers: list[Answers] = []
        weights: Weights = {}
        for count in growth.checkpoints():
            weights = yield from growth.steps(count)
            earlier, phase = answers, f"measure {count} edits"
            answers = yield from self._answers_steps(f"after-{count:06}", phase, count, weights)
            tables.append((yield from self._checkpoint_steps(count, weights, earlier, answers)))
        rows = [self._row(i, a) | growth.notes[i] for i, a in enumerate(answers)]
        if self.plan.generation:
            for i, found in enumerate(rows):
                progress, record = Progress("write texts", i, len(rows)), self.records[i]
                for when, standing in (("before", BASE), ("after", weights)):
                    steps = self._written_steps(f"written-{when}-{i:06}", record, standing)
                    found[when] |= yield from within(steps, progress)
        last = tables[-1]
        return (yield from self._collected_steps(rows, ("before", "after", "changes"))) | {
            "damage": last["damage"],
            "norm": last["norm"],
            "strengthened": sum(n["strength"] != self.plan.strengths[0] for n in growth.notes),
            "checkpoints": tables,
            "rows": rows,
        }

    def _checkpoint_steps(
        self, count: int, weights: Weights, earlier: Sequence[Answers], answers: Sequence[Answers]
    ) -> Steps[dict[str, Any]]:
        """What there is to say of a model with so many edits."""
        damage = None
        if self.plan.damage:
            damage = yield from self.stages.once(f"damage-{count:06}", "damage", self._damage_steps(weights))
        rows = [a.measures() for a in answers]
        then = [i for i, a in enumerate(earlier) if a.holds]
        retention = []
        for first in sorted({*EARLIER, len(earlier)}):
            if 0 < first < count:
                retention.append({"first": first} | (yield from self._summed_steps(rows[:first])))
        return {
            "edits": count,
            "measures": (yield from self._summed_steps(rows)),
            "changes": (yield from self._summed_steps([self._changes(i, a) for i, a in enumerate(answers)])),
            "retention": retention,
            "still": {"held_before": len(then), "hold": sum(answers[i].holds for i in then)},
            "damage": damage,
            "norm": norms(self.replica, weights),
        }

    # What both are made of

    def found_steps(
        self, company: int, weights: Weights
    ) -> Steps[tuple[list[list[Piece]], list[dict[str, Any]]]]:
        """The pieces of some successive edits, found at once on the model with these weights, and how they were found."""
        first = company * self.company
        places = range(first, min(first + self.company, len(self.records)))
        steps = self.replica.standing(weights, self._find_steps(places))
        stage = self.stages.once(f"found-{company:06}", "find", steps)
        notes = yield from within(stage, Progress("find edits", first, len(self.records)))
        groups: list[list[Piece]] = []
        for i in places:
            data = self.stages.kept.get(f"piece-{i:06}")
            assert data is not None
            groups.append(unpack(data, f"{i:06}", words(self.records[i].subject)))
        return groups, notes

    def _find_steps(self, places: Sequence[int]) -> Steps[list[dict[str, Any]]]:
        """Find edits on the model as it stands and keep their pieces."""
        found = yield from self.toolkit.find_together_steps([self._asking(i) for i in places])
        for i, one in zip(places, found, strict=True):
            self.stages.kept.put(f"piece-{i:06}", pack(one.pieces))
        return [{"loss": f.losses[-1] if f.losses else None, "steps": len(f.losses)} for f in found]

    def _asking(self, i: int) -> Asking:
        record, plan = self.records[i], self.plan
        statement, target = fill(record.prompt, record.subject), wanted_object(record, plan.objective)
        return Asking(statement, target, plan.method, plan.hparams, f"{i:06}", plan.objective)

    def _answers_steps(self, name: str, phase: str, count: int, weights: Weights) -> Steps[list[Answers]]:
        """What the model says with these weights in place to the prompts of the first records, of many at once."""
        found: list[Answers] = []
        for at in range(0, count, MEASURED):
            some = self.records[at : min(at + MEASURED, count)]
            pairs = [pair for r in some for pair in ask(r)]
            steps = self.replica.standing(weights, score_steps(self.model, pairs))
            stage = self.stages.once(f"{name}-{at:06}", "measure", steps)
            scores = yield from within(stage, Progress(phase, at, count))
            said = iter(scores)
            found += [Answers.of(r, [Score(*next(said)) for _ in ask(r)]) for r in some]
        return found

    def _damage_steps(self, weights: Weights) -> Steps[dict[str, float]]:
        """What the weights do to plain texts."""
        drift = yield from drift_steps(self.model, self.plain, partial(self.replica.stand, weights))
        return {
            "loss_before": drift.before,
            "loss_after": drift.after,
            "loss_rise": drift.after / drift.before - 1 if drift.before else 0.0,
            "perplexity_before": _exp(drift.before),
            "perplexity_after": _exp(drift.after),
            "drift": drift.kl,
        }

    def _written_steps(self, name: str, record: Record, weights: Weights) -> Steps[Measures]:
        """GE, and RS where there are reference texts, of what the model writes."""
        prompts = record.generation_prompts
        texts: list[str] = yield from self.stages.once(
            name, "write", self.replica.standing(weights, write_steps(self.replica, prompts, self.plan.seed))
        )
        return {"GE": fluency(texts), "RS": self._tf_idf.similarity(texts, record.reference_texts)}

    def _row(self, i: int, after: Answers) -> dict[str, Any]:
        """What there is to say of one record."""
        r = self.records[i]
        return {
            "record": r.name,
            "subject": r.subject,
            "prompt": r.prompt,
            "target_new": r.target_new,
            "target_true": r.target_true,
            "relation": r.relation,
            "lacks": list(r.lacks),
            "before": self.before[i].measures(),
            "after": after.measures(),
            "changes": self._changes(i, after),
        }

    def _changes(self, i: int, after: Answers) -> Measures:
        return changes(self.before[i], after, self.plan.objective)

    def _collected_steps(self, rows: Sequence[dict[str, Any]], parts: Sequence[str]) -> Steps[dict[str, Any]]:
        """Means over all records of some parts of their rows."""
        found = {}
        for part in parts:
            found[part] = yield from self._summed_steps([r[part] for r in rows])
        return found

    def _summed_steps(self, rows: Sequence[Measures]) -> Steps[dict[str, Any]]:
        """Means over records with their intervals: a step of its own, since many draws take a while."""
        found = summary(rows, self.plan.seed)
        yield Progress("sum up", 1, 1)
        return found


class Composed:
    """Edits found on the base model, all active ones solved together, as the service does it: those that are found at once land at
    once, each with the first strength at which it takes beside the others."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.notes: list[dict[str, Any]] = []  #: of the edits that have landed
        self._landed: list[Piece] = []

    def checkpoints(self) -> list[int]:
        return _checkpoints(self.run, 1)

    def steps(self, count: int) -> Steps[Weights]:
        """The weights with so many edits. A company that a checkpoint cuts in two lands in two parts."""
        run = self.run
        while len(self.notes) < count:
            first = len(self.notes)
            company = first // run.company
            groups, said = yield from run.found_steps(company, {})
            some = slice(
                first - company * run.company, min(count, (company + 1) * run.company) - company * run.company
            )
            landing = run.stages.once(
                f"landed-{first:06}-{count:06}", "land", self._land_steps(first, groups[some])
            )
            strengths = yield from within(landing, Progress("land edits", first, len(run.records)))
            for group, note, strength in zip(groups[some], said[some], strengths, strict=True):
                self._landed += [p.scaled(strength) for p in group]
                self.notes.append(note | {"strength": strength})
        yield Progress("compose", count, count)
        return run.replica.composed(self._landed)

    def _land_steps(self, first: int, groups: Sequence[list[Piece]]) -> Steps[list[float]]:
        """The strengths with which some edits take beside those before them and each other."""
        run = self.run
        ways = run.climb(first + len(groups))
        if len(ways.strengths) == 1 or run.plan.objective != "write":
            return [ways.strengths[0]] * len(groups)
        records = run.records[first : first + len(groups)]
        return (yield from landing_steps(run.replica, records, groups, self._landed, ways))


def landing_steps(
    replica: Replica,
    records: Sequence[Record],
    groups: Sequence[Sequence[Piece]],
    landed: Sequence[Piece],
    ways: Climb,
) -> Steps[list[float]]:
    """The first strength of each edit with which it takes beside those that have landed and the others: whoever does not is raised,
    all at once, until nobody can be."""
    strengths, places = ways.strengths, [0] * len(groups)
    bare = [replace(r, paraphrases=(), neighbours=()) for r in records]
    asked = [pair for r in bare for pair in ask(r)]
    while True:
        mine = [p.scaled(strengths[at]) for group, at in zip(groups, places, strict=True) for p in group]
        weights = replica.composed([*landed, *mine])
        yield Progress("compose", 1, 1)
        scores = iter((yield from replica.standing(weights, score_steps(replica.base, asked))))
        answers = [Answers.of(r, [next(scores) for _ in ask(r)]) for r in bare]
        short = [i for i, a in enumerate(answers) if not a.leads(ways.enough(strengths[places[i]]))]
        raised = [i for i in short if places[i] + 1 < len(strengths)]
        if not raised:
            return [strengths[at] for at in places]
        for i in raised:
            places[i] += 1


class Added:
    """Edits found on the model as those before left it, and added to its weights, as published."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.notes: list[dict[str, Any]] = []
        self._weights: Weights = {}

    def checkpoints(self) -> list[int]:
        return _checkpoints(self.run, self.run.company)

    def steps(self, count: int) -> Steps[Weights]:
        """The weights with so many edits."""
        run, strength = self.run, self.run.plan.strengths[0]
        while len(self.notes) < count:
            groups, notes = yield from run.found_steps(len(self.notes) // run.company, self._weights)
            self._weights = added(
                run.replica, self._weights, [p.scaled(strength) for group in groups for p in group]
            )
            self.notes += [note | {"strength": strength} for note in notes]
        return self._weights


def _checkpoints(run: Run, company: int) -> list[int]:
    """Those asked for, at the end of a company each, and the end."""
    most = len(run.records)
    ends = {math.ceil(c / company) * company for c in run.plan.checkpoints}
    return sorted({min(c, most) for c in ends if c < most + company} | {most})


def added(replica: Replica, weights: Weights, pieces: Sequence[Piece]) -> Weights:
    """Weights with the change added that these pieces come to by themselves."""
    conv1d = replica.base.architecture.conv1d
    with replica.stand(weights) as model:
        more = {s: rebuild(model.parameter(s).data, change, conv1d) for s, change in compose(pieces).items()}
    return {**weights, **more}


def norms(replica: Replica, weights: Weights) -> dict[str, float]:
    """|W - W0| / |W0| of every edited weight."""
    return {
        f"{site.layer}.{site.part}": _distance(weights[site], replica.base.parameter(site).data)
        for site in sorted(weights)
    }


def _distance(edited: Tensor, base: Tensor) -> float:
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    return float(norm(edited.float() - base.float()) / norm(base))


def write_steps(replica: Replica, prompts: Sequence[str], seed: int) -> Steps[list[str]]:
    """A text for each prompt, the prompt included, drawn from the most probable tokens with a seed."""
    model = replica.base
    texts: list[str] = []
    for at in range(0, len(prompts), ROWS):
        some = prompts[at : at + ROWS]
        rows: list[Row] = []
        for i, prompt in enumerate(some, at):
            room = max(1, WRITTEN - len(model.encode(prompt)[0]))
            rows.append(
                row(model, prompt, Sampling(max_new_tokens=room, temperature=1, top_k=TOP_K, seed=seed + i))
            )
        batch = Batch(model, rows)
        while len(batch):
            batch.step()
            yield Progress("write", at, len(prompts))
        texts += [prompt + r.text for prompt, r in zip(some, rows, strict=True)]
    return texts


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
