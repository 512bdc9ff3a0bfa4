"""The search for a recipe: hyperparameters with which a model that has none is edited best.

Causal tracing does not tell where a model is edited best (Hase et al. 2023), so the search edits. It varies one group
of hyperparameters after another, starting each stage from the best values so far. All candidates are measured on the
same facts, which the model knows. Every measurement is stored, so that an interrupted search resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from service.datasets.record import Record
from service.editing.context import EditorContext
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.errors import InvalidInput
from service.evaluation.measuring import evenly_spaced, texts_without_edited_facts
from service.kit.artifact_store import ArtifactStore
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.methods.parameters import RomeParameters
from service.methods.registry import METHODS
from service.models.loading import LoadedModel
from service.recipes.default import CHAT_VALUES
from service.recipes.recipe import Recipe
from service.tuning import search_space
from service.tuning.form_search import FormSearch
from service.tuning.objective import Candidate, SearchContext, evaluate_candidate
from service.tuning.search_space import JsonDict, Stage, candidate_layers, layer_ranges_around
from service.tuning.strength_search import MarginSearch

OnCandidate = Callable[[Candidate], None]
NO_EDITABLE_LAYER = (
    "no layer that was tried can be edited with these facts: give other or more facts, with neighbours and paraphrases "
    "that the model knows."
)


@dataclass(frozen=True)
class TuningResult:
    """The recipe, and every candidate that was measured for it."""

    recipe: Recipe
    history: list[Candidate]
    not_tried: tuple[str, ...] = ()  #: what a time budget left out
    can_continue: bool = False  #: whether the same search tries more of it with more time


def tune_recipe(
    model: LoadedModel,
    context: EditorContext,
    records: Sequence[Record],
    plain_statements: Sequence[str],
    store: ArtifactStore,
    prepend_bos: bool,
    methods: Sequence[str] = (),
    batch_records: Sequence[Record] = (),
    on_candidate: OnCandidate = lambda _: None,
) -> Stepper[TuningResult]:
    """Search a recipe on records that the model knows.

    With `batch_records` the search includes the margins that edits need when many of them are active, and the form of
    the edits. `methods` are tuned besides "rome". Plain statements that state an edited fact are not used.
    """
    search = build_search_context(
        model,
        context,
        records,
        [*records, *batch_records],
        plain_statements,
        store,
        search_space.MAX_DAMAGE_TEXTS,
    )
    best, history = yield from search_rome_values(search, on_candidate)
    chosen = next(c for c in history if c.hparams == best)
    chosen_by_count: list[Candidate] = []
    forms: list[Candidate] = []
    if batch_records:
        margin_search = MarginSearch(search, best, batch_records, on_candidate)
        margins, chosen_by_count = yield from margin_search.execute()
        form_search = FormSearch(search, batch_records, on_candidate)
        best, forms = yield from form_search.execute(chosen, chosen_by_count[-1], margins)
        history += margin_search.history + forms
    rome = RomeParameters.model_validate(best)
    search.editor.recipe = Recipe(source="found for rome", rome=rome)
    method_values: dict[str, JsonDict] = {}
    for method in methods:
        method_values[method], method_history = yield from search_method_values(search, method, on_candidate)
        history += method_history
    method_candidates = {
        m: next((c.to_json() for c in history if c.method == m and c.hparams == v), None)
        for m, v in method_values.items()
    }
    figures = {
        "facts": len(records),
        "damage_texts": len(search.damage_texts),
        "corpus": context.corpus.source,
        "chosen": chosen.to_json(),
        "margins": [c.to_json() for c in chosen_by_count],
        "forms": [c.to_json() for c in forms],
        "methods": method_candidates,
    }
    source = f"palimpsest tune, on {len(records)} facts that the model knows"
    return TuningResult(
        Recipe(source=source, rome=rome, methods=method_values, prepend_bos=prepend_bos, figures=figures),
        history,
    )


def build_search_context(
    model: LoadedModel,
    context: EditorContext,
    records: Sequence[Record],
    edited_records: Sequence[Record],
    plain_statements: Sequence[str],
    store: ArtifactStore,
    max_damage_texts: int,
) -> SearchContext:
    """Return what every candidate is measured with. Damage is measured on plain statements that state no edited
    fact."""
    texts = texts_without_edited_facts(plain_statements, edited_records)
    damage_texts = evenly_spaced(texts, max_damage_texts)
    if not damage_texts:
        raise InvalidInput("every plain statement states an edited fact: give more facts.", "facts")
    search = SearchContext(VersionedModel(model, EmptyLedger()), context, records, damage_texts, store)
    context.recipe = Recipe(source="initial values", rome=RomeParameters(layers=(0,)))
    return search


def chat_values(model: LoadedModel) -> JsonDict:
    """Return the hyperparameters that every candidate has because of the model's chat template."""
    return dict(CHAT_VALUES) if model.chat_format is not None else {}


def search_rome_values(
    search: SearchContext, on_candidate: OnCandidate
) -> Stepper[tuple[JsonDict, list[Candidate]]]:
    """Return the best hyperparameters for "rome", and every candidate."""
    stages = _StageRunner(search, "rome", on_candidate)
    count = search.replica.base.num_layers
    layers = candidate_layers(count)
    start = search_space.START_VALUES | chat_values(search.replica.base)
    best = yield from stages.run(Stage.LAYER, start, [{"layers": [x]} for x in layers])
    if "layers" not in best:
        raise InvalidInput(NO_EDITABLE_LAYER, "facts")
    (layer,) = best["layers"]
    ranges = [{"layers": list(run)} for run in layer_ranges_around(layer, count)]
    best = yield from stages.run(Stage.LAYER_RANGE, best, ranges)
    for stage, changes in search_space.STAGES.items():
        best = yield from stages.run(stage, best, changes)
    return best, stages.history


def search_method_values(
    search: SearchContext, method: str, on_candidate: OnCandidate
) -> Stepper[tuple[JsonDict, list[Candidate]]]:
    """Return the best hyperparameters of another method besides those that it takes from the recipe, and every
    candidate.
    """
    best: JsonDict = {}
    runner = _StageRunner(search, method, on_candidate, untried_objective=-1.0)
    count = search.replica.base.num_layers
    edit_method = METHODS[method]
    stages: tuple[tuple[JsonDict, ...], ...] = edit_method.search_space
    if edit_method.searches_value:
        best = {"contexts": search_space.START_VALUES["contexts"]}
    if "threshold" in edit_method.parameters.model_fields:
        stages = ((yield from threshold_candidates(search)), *stages)
    if edit_method.searched_layers is not None:
        upper_half = range(count // 2, count)
        layers = _single_layer_values(
            upper_half if edit_method.searched_layers == "late" else candidate_layers(count)
        )
        if edit_method.searches_value:  # start from the deepest layer of the recipe
            stages, best = (*stages, layers), best | {"layers": [max(_recipe(search).rome.layers)]}
        else:
            stages = (layers, *stages)
    for changes in stages:
        best = yield from runner.run(method, best, changes)
    return best, runner.history


class _StageRunner:
    """Runs stages of one method and records their candidates."""

    def __init__(
        self,
        search: SearchContext,
        method: str,
        on_candidate: OnCandidate,
        untried_objective: float = 0.0,
    ) -> None:
        self.search, self.method, self.on_candidate = search, method, on_candidate
        self.untried_objective = untried_objective  # of start values that are no candidate themselves
        self.history: list[Candidate] = []

    def run(self, stage: str, base: JsonDict, changes: Sequence[JsonDict]) -> Stepper[JsonDict]:
        """Return the best of the base values and of the values with each change."""
        best = base
        for number, change in enumerate(changes):
            values = base | change
            description = ", ".join(f"{k} {v}" for k, v in change.items())
            progress = Progress(Phase.SEARCH, number, len(changes), f"{stage}: {description}")
            stepper = evaluate_candidate(self.search, stage, self.method, values)
            candidate = yield from report_as(stepper, progress)
            self.history.append(candidate)
            self.on_candidate(candidate)
            if candidate.objective > recorded_objective(self.history, best, self.untried_objective):
                best = values
        return best


def recorded_objective(history: Sequence[Candidate], hparams: JsonDict, untried: float = 0.0) -> float:
    """Return the objective of hyperparameters in the history, or `untried` if they are not in it."""
    return next((c.objective for c in history if c.hparams == hparams), untried)


def _single_layer_values(layers: Iterable[int]) -> tuple[JsonDict, ...]:
    return tuple({"layers": [x]} for x in layers)


def _recipe(search: SearchContext) -> Recipe:
    assert search.editor.recipe is not None
    return search.editor.recipe


def threshold_candidates(search: SearchContext) -> Stepper[tuple[JsonDict, ...]]:
    """Return AlphaEdit thresholds below which a half, three quarters and nine tenths of the eigenvalues of the key
    statistics lie.
    """
    layers = _recipe(search).rome.layers
    statistics = yield from search.editor.get_statistics(layers)
    values = statistics[max(layers)].spectrum[0].clamp(min=0)
    return tuple(
        {"threshold": float(values[int(share * (len(values) - 1))]), "ridge": ridge}
        for share, ridge in ((0.5, 0.1), (0.75, 0.1), (0.9, 0.1), (0.9, 1.0))
    )
