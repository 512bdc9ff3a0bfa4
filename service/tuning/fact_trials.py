"""The measurement of a candidate on the first facts. What is stored of each fact, a measurement on more facts uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from service.editing.context import EditInput
from service.errors import InvalidInput
from service.evaluation.evaluation_context import EDITS_PER_BATCH
from service.evaluation.metrics import scoring_pairs
from service.kit.artifact_store import (
    content_addressed_name,
    get_json,
    inputs_digest,
    load_or_compute,
    put_json,
)
from service.kit.steps import Stepper
from service.kit.text import fill_prompt, normalize_whitespace
from service.models.budget import group_budget
from service.tuning.objective import (
    Candidate,
    SearchContext,
    compute_objective,
    mean_scores,
    measure_jointly,
    measure_records,
)
from service.tuning.racing import Measurement
from service.tuning.search_space import JsonDict
from service.tuning.time_budget import Clock
from service.weights.factors import EditUpdate, deserialize_updates, serialize_updates

MARGINS = ("EM", "PM", "NM")


class FactTrials:
    """Measures candidates for "rome": each edit alone, then all of them at once."""

    def __init__(
        self, search: SearchContext, clock: Clock, on_candidate: Callable[[Candidate], None] = lambda _: None
    ) -> None:
        self.search, self.clock, self.on_candidate = search, clock, on_candidate
        pairs = [prompt + object_ for r in search.records for prompt, object_ in scoring_pairs(r)]
        self._pairs = len(pairs) / len(search.records)  # of a fact
        self._damage_rows = sum(map(len, search.damage_texts)) / (sum(map(len, pairs)) / len(pairs))
        # On a CPU an edit is computed as fast alone, and less is lost when the run is interrupted.
        self._edits_per_batch = EDITS_PER_BATCH if group_budget(search.replica.base) else 1

    def cost(self, hparams: JsonDict, facts: int, new_facts: float) -> float:
        """Return about how many rows of the length of a scored pair pass through the model: for a new fact forward and
        back in each step for each context, and forward for each pair; for all facts together the pairs again, and the
        plain statements before and after."""
        optimized: int = hparams["steps"] * (hparams["contexts"] + 1)
        alone = 2 * optimized + self._pairs
        return new_facts * alone + facts * self._pairs + 2 * self._damage_rows

    def measure(self, stage: str, hparams: JsonDict, facts: int) -> Stepper[Measurement]:
        """Measure a candidate on the first facts, or load what is stored."""
        trials: list[JsonDict] = []
        for start in range(0, facts, self._edits_per_batch):
            numbers = range(start, min(facts, start + self._edits_per_batch))
            yield from self._measure_alone(hparams, [i for i in numbers if self._stored(hparams, i) is None])
            trials += [self._stored(hparams, i) for i in numbers]
        seconds = sum(trial["seconds"] for trial in trials)
        reason = next((trial["reason"] for trial in trials if "reason" in trial), None)
        if reason is not None:
            self.on_candidate(Candidate(stage, "rome", hparams, 0.0, edits=facts, reason=reason))
            return Measurement(0.0, -math.inf, seconds, reason)
        name = content_addressed_name("joint", [hparams, facts])
        joint = yield from load_or_compute(self.search.store, name, self._measure_jointly(hparams, facts))
        rows = [trial["alone"] for trial in trials]
        figures = {
            "alone": mean_scores(rows),
            "joint": joint["joint"],
            "loss_increase": joint["loss_increase"],
        }
        objective = compute_objective(figures)
        self.on_candidate(Candidate(stage, "rome", hparams, objective, edits=facts, **figures))
        return Measurement(objective, mean_margin(rows), seconds + joint["seconds"])

    def _stored(self, hparams: JsonDict, number: int) -> Any:
        return get_json(self.search.store, _alone_name(hparams, number))

    def _measure_alone(self, hparams: JsonDict, numbers: Sequence[int]) -> Stepper[None]:
        """Edit some facts, measure each edit alone, and store the edits and their measures."""
        if not numbers:
            return
        search, started = self.search, self.clock()
        records = [search.records[i] for i in numbers]
        inputs = [
            EditInput(fill_prompt(r.prompt, r.subject), r.target_new, "rome", hparams, _edit_id(i))
            for i, r in zip(numbers, records, strict=True)
        ]
        try:
            found = yield from search.editor.find_all_factors(inputs)
        except InvalidInput as error:
            trials: list[JsonDict] = [{"reason": error.detail} for _ in numbers]
        else:
            for i, factors in zip(numbers, found, strict=True):
                search.store.put(_factors_name(hparams, i), serialize_updates(factors.updates))
            trials = []
            for i, record in zip(numbers, records, strict=True):
                patch = yield from search.replica.compose_patch_in_steps(self._updates(hparams, i))
                rows = yield from measure_records(search, [record], patch)
                trials.append({"alone": rows[0]})
        seconds = (self.clock() - started) / len(numbers)
        for i, trial in zip(numbers, trials, strict=True):
            put_json(search.store, _alone_name(hparams, i), trial | {"seconds": seconds})

    def _measure_jointly(self, hparams: JsonDict, facts: int) -> Stepper[JsonDict]:
        started = self.clock()
        updates = [u for i in range(facts) for u in self._updates(hparams, i)]
        rows, loss_increase = yield from measure_jointly(self.search, self.search.records[:facts], updates)
        seconds = self.clock() - started
        return {"joint": mean_scores(rows), "loss_increase": loss_increase, "seconds": seconds}

    def _updates(self, hparams: JsonDict, number: int) -> list[EditUpdate]:
        """Return the stored edit of a fact, so that an interrupted search and one that was not see the same numbers."""
        data = self.search.store.get(_factors_name(hparams, number))
        assert data is not None
        subject = normalize_whitespace(self.search.records[number].subject)
        return deserialize_updates(data, _edit_id(number), subject, self.search.editor.find_shared)


def mean_margin(rows: Sequence[JsonDict]) -> float:
    """Return the mean of EM, PM and NM over those that the records have; -inf if a probability is not finite."""
    by_measure = [[row[name] for row in rows if row[name] is not None] for name in MARGINS]
    means = [sum(values) / len(values) for values in by_measure if values]
    mean = sum(means) / len(means) if means else 0.0
    return mean if math.isfinite(mean) else -math.inf


def _alone_name(hparams: JsonDict, number: int) -> str:
    return content_addressed_name("alone", [hparams, number])


def _factors_name(hparams: JsonDict, number: int) -> str:
    return f"factors-{inputs_digest([hparams, number])[:24]}.safetensors"


def _edit_id(number: int) -> str:
    return f"{number:06}"
