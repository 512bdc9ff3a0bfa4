"""The strength schedule of a recipe: how large a margin edits need, by how many of them are active.

For several numbers of edits the search finds the greatest required margin that keeps the loss on plain statements
within a limit. A greater margin makes edits stronger, so that more of them hold, and increases the loss. The margin
is therefore found by bisection.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.datasets.record import Record
from service.evaluation.strengths import choose_group_strengths
from service.kit.artifact_store import content_addressed_name, load_or_compute
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.methods.parameters import RomeParameters
from service.recipes.strength_schedule import StrengthSchedule, strength_schedule
from service.tuning import search_space
from service.tuning.objective import Candidate, SearchContext, find_edits, mean_scores, measure_jointly
from service.tuning.search_space import JsonDict, Stage
from service.weights.factors import EditUpdate


class MarginSearch:
    """The search for required margins on some records, with the hyperparameters found for single edits."""

    def __init__(
        self,
        search: SearchContext,
        best: JsonDict,
        records: Sequence[Record],
        on_candidate: Callable[[Candidate], None],
    ) -> None:
        self.search, self.records, self.on_candidate = search, records, on_candidate
        self.history: list[Candidate] = []
        self.base = best | {
            "clamp": min(float(best["clamp"]), search_space.MAX_CLAMP),
            "ridge": max(float(best.get("ridge", 0)), search_space.MIN_RIDGE),
            "strengths": list(search_space.STRENGTH_GRID),
        }
        self._groups: list[list[EditUpdate]] = []  # the updates of each record, once they are needed

    def execute(self) -> Stepper[tuple[JsonDict, list[Candidate]]]:
        """Return the hyperparameters with the margins, and the candidate chosen for each number of edits, fewest
        first.
        """
        chosen: list[Candidate] = []
        for fraction in search_space.BATCH_FRACTIONS:
            count = max(1, round(fraction * len(self.records)))
            candidate, is_greatest = yield from self._bisect(count)
            chosen.insert(0, candidate)
            if is_greatest:
                break  # a smaller number of edits allows the greatest margin as well
        width = self.search.replica.base.intermediate_size
        required_margins = [
            (c.edits / width, c.hparams["required_margins"][0][1]) for c in chosen if c.edits is not None
        ]
        margin = min(c.hparams["margin"] for c in chosen)
        return self.base | {"margin": margin, "required_margins": required_margins}, chosen

    def _bisect(self, count: int) -> Stepper[tuple[Candidate, bool]]:
        """Return the candidate of the greatest margin within the limit, or of the smallest margin if none is.

        The second value says whether it is the greatest margin of the grid.
        """
        grid = search_space.MARGIN_GRID
        tried: dict[float, Candidate] = {}
        low, high = 0, len(grid)  # margins below `low` are within the limit, those from `high` on are not
        while low < high:
            middle = (low + high) // 2
            candidate = yield from self._evaluate_margin(grid[middle], count)
            tried[grid[middle]] = candidate
            self.on_candidate(candidate)
            within = (candidate.loss_increase or 0.0) <= search_space.MAX_LOSS_INCREASE
            low, high = (middle + 1, high) if within else (low, middle)
        self.history += tried.values()
        return tried[grid[max(0, low - 1)]], low == len(grid)

    def _evaluate_margin(self, required_margin: float, count: int) -> Stepper[Candidate]:
        """Measure batches of `count` edits with a required margin.

        The records are split into consecutive batches, because a few hard edits can double the damage of a batch. The
        scores are those of all records, and the increase of the loss is that of the worst batch.
        """
        hparams = self.base | {
            "margin": min(required_margin, search_space.FULL_STRENGTH_MARGIN),
            "required_margins": [(0.0, required_margin)],
        }
        name = content_addressed_name("margin", [hparams, len(self.records), count])
        figures = yield from load_or_compute(
            self.search.store, name, self._measure_batches(hparams, required_margin, count)
        )
        objective = figures["joint"]["S"] or 0.0
        return Candidate(Stage.MARGIN, "rome", hparams, objective, edits=count, **figures)

    def _measure_batches(self, hparams: JsonDict, required_margin: float, count: int) -> Stepper[JsonDict]:
        if not self._groups:
            self._groups = yield from find_edits(self.search, "rome", self.base, self.records)
        starts = range(0, len(self.records) - count + 1, count)
        rows: list[JsonDict] = []
        loss_increases: list[float] = []
        for start in starts:
            batch = slice(start, start + count)
            progress = Progress(
                Phase.SEARCH, len(loss_increases), len(starts), f"{count} edits, margin {required_margin}"
            )
            stepper = self._measure_batch(hparams, self.records[batch], self._groups[batch])
            batch_rows, loss_increase = yield from report_as(stepper, progress)
            rows, loss_increases = rows + batch_rows, [*loss_increases, loss_increase]
        return {
            "joint": mean_scores(rows),
            "loss_increase": max(loss_increases),
            "loss_increases": loss_increases,
        }

    def _measure_batch(
        self, hparams: JsonDict, records: Sequence[Record], groups: Sequence[Sequence[EditUpdate]]
    ) -> Stepper[tuple[list[JsonDict], float]]:
        """Return each record's measures with the edits active at the strengths that the service would choose, and the
        loss increase.
        """
        parameters, replica = RomeParameters.model_validate(hparams), self.search.replica

        def schedule_for(active: int) -> StrengthSchedule:
            return strength_schedule(parameters, parameters.strengths, active, replica.base.intermediate_size)

        strengths = yield from choose_group_strengths(replica, records, groups, [], 0, schedule_for)
        updates = [u.scaled(s) for group, s in zip(groups, strengths, strict=True) for u in group]
        return (yield from measure_jointly(self.search, records, updates))
