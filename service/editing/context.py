"""What editing methods need in addition to the model: a recipe, contexts, statistics of keys and reference texts.
Cached on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from service.covariance.collect import load_or_collect_statistics
from service.covariance.corpus import Corpus, CorpusSource, default_tokens, load_corpus
from service.covariance.gradient_statistics import (
    GradientStatistics,
    load_or_collect_gradient_statistics,
)
from service.covariance.second_moment import KeyStatistics
from service.datasets.fact_table import find_facts_file
from service.datasets.relation_table import RelationTable, load_relation_table
from service.editing.context_templates import CONTEXT_LENGTHS, TOP_K, sample_contexts
from service.editing.edit_spec import EditFactors, batch_edit_specs, build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.editing.scope_classifiers import CLASSIFIERS_FOLDER, ScopeClassifiers
from service.editing.subject_token import choose_subject_token
from service.errors import InvalidInput
from service.gating.gate_reference import GateReference, collect_gate_reference
from service.kit.files import write_atomically
from service.kit.folder_lock import once_in_folder
from service.kit.steps import Phase, Stepper
from service.kit.text import Statement
from service.kit.time_estimate import with_estimate
from service.kit.work_queue import Task, WorkQueue
from service.methods.parameters import (
    EditForm,
    NeuronParameters,
    Parameters,
    RomeParameters,
    SeracParameters,
)
from service.methods.registry import DEFAULT_METHOD, get_method
from service.models.loading import LoadedModel
from service.recipes.default import default_recipe
from service.recipes.published import published_recipe
from service.recipes.recipe import Recipe, parse_recipe, resolve_hparams
from service.recipes.shipped import ModelShape, shipped_recipe
from service.schemas import Objective
from service.weights.factors import SharedFactors
from service.weights.scope_classifier import ScopeClassifier

log = logging.getLogger(__name__)

REFERENCE_TEXTS = 48  # texts of the corpus on which the guard measures the perplexity
RECIPES_FOLDER = "recipes"  # the folder of tuned recipes, next to that of the statistics
T = TypeVar("T")
PERPLEXITY_CACHE_SIZE = 16  # versions whose perplexity is cached


@dataclass(frozen=True)
class EditInput:
    """An edit of an evaluation, a study or a bench. Updates are sorted by `edit`.

    To erase or amplify, `target` is the true object. With `noise` (n, d) the factors are computed while the noise is
    added to the embeddings of the subject's tokens: fact forcing (`service/editing/subject_noise.py`).
    """

    statement: Statement
    target: str
    method: str = DEFAULT_METHOD
    hparams: dict[str, Any] | None = None
    edit: str = ""
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)


class EditorContext:
    """The recipe, contexts, statistics and reference texts of one base model. Missing ones are computed when first
    needed.

    A long computation is a task of `queue`: all callers that need a corpus or statistics wait for the same task. In a
    worker the engine runs the task between the steps of other work.
    """

    def __init__(
        self,
        model: LoadedModel,
        recipe: Recipe | None,
        corpus: Corpus | CorpusSource,
        folder: Path | None,
        facts: Path | None = None,
        form: EditForm | None = None,
    ) -> None:
        self.model = model
        self._form = form
        self._facts = facts  # the table of facts, of which probes are made
        self._relation_table: RelationTable | None = None
        self.recipe = recipe.with_form(form) if recipe else None
        self.folder = folder
        self.recipes = folder.parent / RECIPES_FOLDER if folder else None
        self.queue = WorkQueue()
        self.statistics: dict[int, KeyStatistics] = {}
        self.gradient_statistics: dict[int, GradientStatistics] = {}
        self.gate_references: dict[int, GateReference] = {}
        self.classifiers = ScopeClassifiers(folder.parent / CLASSIFIERS_FOLDER if folder else None)
        self.contexts: dict[tuple[int, int], list[str]] = {}
        self.perplexities: dict[int, float] = {}  #: version -> perplexity on the reference texts
        self._source = corpus if isinstance(corpus, CorpusSource) else None
        self._corpus = corpus if isinstance(corpus, Corpus) else None
        self._corpus_task: Task[Corpus] | None = None
        self._collecting: dict[int, Task[None]] = {}

    @property
    def corpus(self) -> Corpus:
        """The corpus, which `get_corpus` has loaded."""
        if self._corpus is None:
            raise RuntimeError("the corpus is not loaded: run get_corpus() first")
        return self._corpus

    def cache_perplexity(self, version: int, perplexity: float) -> None:
        """Store the perplexity of a committed version, for the next edit."""
        self.perplexities[version] = perplexity
        while len(self.perplexities) > PERPLEXITY_CACHE_SIZE:
            self.perplexities.pop(next(iter(self.perplexities)))

    @property
    def reference_texts(self) -> Sequence[str]:
        """The texts on which the perplexity is measured, evenly spaced over the corpus."""
        texts = self.corpus.texts
        return texts[:: max(1, len(texts) // REFERENCE_TEXTS)][:REFERENCE_TEXTS]

    def prepare(self) -> Stepper[None]:
        """Compute everything that the recipe needs."""
        yield from self.get_corpus()
        if self.recipe is not None:
            yield from self.get_contexts(self.recipe.rome.contexts, self.recipe.rome.seed)
            yield from self.get_statistics(self.recipe.rome.layers)

    def read_provisional_recipe(self) -> Recipe | None:
        """Return the recipe that the first edit of this model found, in this process or another one, and use it."""
        found = read_provisional_recipe(self.model, self.recipes)
        if found is not None:
            self.recipe = found.with_form(self._form)
        return found

    def keep_provisional_recipe(self, recipe: Recipe) -> None:
        """Use a recipe that an edit found, and store it for other workers and the next start."""
        self.recipe = recipe
        if self.recipes is not None:
            # the setting decides about the form at each start, so that the file does not have it
            stored = recipe if self._form is None else recipe.with_form("weights")
            write_atomically(
                provisional_recipe_path(self.model, self.recipes), stored.model_dump_json(indent=1)
            )

    def prepare_in_background(self) -> None:
        """Let the engine compute what the recipe needs. Whoever needs it earlier waits."""
        self.queue.in_background = True
        if self.recipe is None:
            self._submit_corpus()
        else:
            self.queue.submit(self.get_contexts(self.recipe.rome.contexts, self.recipe.rome.seed))
            self._submit_statistics(self.recipe.candidate_layers or self.recipe.rome.layers)

    def get_corpus(self) -> Stepper[Corpus]:
        """Return the corpus, loaded or sampled at the first call."""
        if self._corpus is None:
            loading: list[Task[Any]] = [task for task in self._collecting.values() if not task.ended]
            task = loading[0] if loading else self._submit_corpus()
            yield from self.queue.wait_until(task, lambda: self._corpus is not None)
        return self.corpus

    def get_relation_table(self) -> Stepper[RelationTable | None]:
        """Return the table of facts by relation, read at the first call; None where there is none, or none that can be
        read."""
        if self._relation_table is None and self._facts is not None:
            try:
                self._relation_table = yield from load_relation_table(self._facts)
            except InvalidInput as error:
                log.warning("the table of facts is not used", extra={"detail": error.detail})
                self._facts = None
        return self._relation_table

    def get_statistics(self, layers: Sequence[int]) -> Stepper[dict[int, KeyStatistics]]:
        """Return the statistics of keys of the layers, and collect the missing ones."""
        while missing := [x for x in layers if x not in self.statistics]:
            yield from self.queue.wait_for(self._submit_statistics(missing))
        return {x: self.statistics[x] for x in layers}

    def get_gradient_statistics(self, layers: Sequence[int]) -> Stepper[dict[int, GradientStatistics]]:
        """Return the statistics of keys and gradients of the layers, and collect the missing ones."""
        missing = [x for x in layers if x not in self.gradient_statistics]
        if missing:
            corpus = yield from self.get_corpus()
            collected = yield from load_or_collect_gradient_statistics(
                self.model, missing, corpus, self.folder
            )
            self.gradient_statistics = self.gradient_statistics | collected
        return {x: self.gradient_statistics[x] for x in layers}

    def prepare_method(self, method: str, parameters: Parameters) -> Stepper[list[str]]:
        """Compute what the search for an edit reads of the base model besides statistics of keys, and return its
        contexts."""
        contexts: list[str] = []
        if isinstance(parameters, (RomeParameters, NeuronParameters)):
            contexts = yield from self.get_contexts(parameters.contexts, parameters.seed)
        if get_method(method).reads_gradients:
            yield from self.get_gradient_statistics(parameters.layers)
        return contexts

    def get_gate_reference(self, parameters: Parameters) -> Stepper[GateReference | None]:
        """Return the reference keys of the layer of a gated edit, collected at the first call; None for an edit in the
        weights."""
        if not isinstance(parameters, RomeParameters) or parameters.form == "weights":
            return None
        (layer,) = parameters.layers
        if layer not in self.gate_references:
            statistics = yield from self.get_statistics([layer])
            corpus = yield from self.get_corpus()
            table = yield from self.get_relation_table()
            collected = yield from collect_gate_reference(
                self.model, statistics[layer], corpus.texts, table.subjects() if table else ()
            )
            self.gate_references = self.gate_references | {layer: collected}
        return self.gate_references[layer]

    def get_scope_classifier(self, parameters: Parameters) -> ScopeClassifier | None:
        """Return the newest classifier of the layer of an edit that is a statement; None for other edits. Raise
        InvalidInput if none is trained."""
        if not isinstance(parameters, SeracParameters):
            return None
        (layer,) = parameters.layers
        trained = self.classifiers.newest(self.model.fingerprint, layer)
        if trained is None:
            raise InvalidInput(
                f"no scope classifier is trained for layer {layer} of this model: run `palimpsest train serac` or POST "
                "/trainings, or name the layer of one in hparams.layers.",
                "method",
            )
        return trained.classifier

    def find_shared(self, digest: str) -> SharedFactors:
        """Return what the factors of this context's edits name by a digest. Raise KeyError for another one."""
        spaces: dict[str, SharedFactors] = {r.space.digest: r.space for r in self.gate_references.values()}
        return (spaces | self.classifiers.known)[digest]

    def _submit_corpus(self) -> Task[Corpus]:
        """Return the task that loads the corpus: the one that runs, or a new one."""
        if self._corpus_task is None or self._corpus_task.ended:
            self._corpus_task = self.queue.submit(self._once(self._load_corpus(), ()))
        return self._corpus_task

    def _submit_statistics(self, layers: Sequence[int]) -> Task[None]:
        """Return the task that collects the first of the layers, together with those that nothing collects yet."""
        for layer, task in list(self._collecting.items()):
            if task.ended:
                del self._collecting[layer]
        uncollected = [x for x in layers if x not in self.statistics and x not in self._collecting]
        if uncollected:
            task = self.queue.submit(self._once(self._collect(uncollected), uncollected))
            self._collecting |= dict.fromkeys(uncollected, task)
        return next(self._collecting[x] for x in layers if x in self._collecting)

    def _once(self, steps: Stepper[T], layers: Sequence[int]) -> Stepper[T]:
        """Run steps in one process of those that share the folder, with an estimate of the time left."""
        model = self.model
        passes = (max(layers) + 1) / model.num_layers if layers else 0.0
        costs = {Phase.CORPUS: 0.0 if self._corpus else 1.0, Phase.STATISTICS: passes}
        lock = self.folder / f"preparing-{model.fingerprint[:32]}.lock" if self.folder else None
        return once_in_folder(lock, with_estimate(steps, costs))

    def _load_corpus(self) -> Stepper[Corpus]:
        if self._corpus is None:
            assert self._source is not None
            source = self._source
            self._corpus = yield from load_corpus(
                self.model, source.max_tokens, source.file, source.seed, self.folder
            )
        return self._corpus

    def _collect(self, layers: Sequence[int]) -> Stepper[None]:
        corpus = yield from self._load_corpus()
        collected = yield from load_or_collect_statistics(self.model, layers, corpus, self.folder)
        self.statistics = self.statistics | collected  # a new one: other threads read it

    def find_all_factors(self, inputs: Sequence[EditInput]) -> Stepper[list[EditFactors]]:
        """Return the factors of edits on the model with its current weights, in batches within the compute budget of
        a step."""
        specs = []
        for number, edit_input in enumerate(inputs):
            parameters = resolve_hparams(
                self.recipe, edit_input.hparams, self.model.num_layers, edit_input.method
            )
            contexts = yield from self.prepare_method(edit_input.method, parameters)
            yield from self.get_statistics(get_method(edit_input.method).statistics_layers(parameters))
            tokens_after = yield from choose_subject_token(self.model, edit_input.statement, parameters)
            edit_id = edit_input.edit or f"{number:06}"
            spec_arguments = (
                edit_input.statement,
                edit_input.target,
                parameters,
                edit_id,
                edit_input.method,
                edit_input.objective,
                edit_input.noise,
            )
            gate_reference = yield from self.get_gate_reference(parameters)
            specs.append(
                build_edit_spec(
                    self.model,
                    contexts,
                    *spec_arguments,
                    tokens_after=tokens_after,
                    gate_reference=gate_reference,
                    gradient_statistics=self.gradient_statistics,
                    classifier=self.get_scope_classifier(parameters),
                )
            )
        factors: list[EditFactors] = []
        for batch in batch_edit_specs(self.model, specs):
            factors += yield from find_batch_factors(self.model, self.statistics, batch)
        return factors

    def find_factors(
        self,
        statement: Statement,
        target: str,
        method: str = DEFAULT_METHOD,
        hparams: dict[str, Any] | None = None,
        edit: str = "",
        objective: Objective = "write",
        noise: Tensor | None = None,
    ) -> Stepper[EditFactors]:
        """Return the factors of one edit on the model with its current weights."""
        edit_input = EditInput(statement, target, method, hparams, edit, objective, noise)
        (factors,) = yield from self.find_all_factors([edit_input])
        return factors

    def get_contexts(self, count: int, seed: int) -> Stepper[list[str]]:
        """Return contexts sampled from the base model, cached under a key of everything that they depend on."""
        if (count, seed) not in self.contexts:
            path = self._contexts_path(count, seed)
            if path is not None and path.exists():
                self.contexts[count, seed] = json.loads(path.read_text(encoding="utf-8"))
            else:
                self.contexts[count, seed] = yield from sample_contexts(self.model, count, seed)
                if path is not None:
                    write_atomically(path, json.dumps(self.contexts[count, seed]))
        return self.contexts[count, seed]

    def _contexts_path(self, count: int, seed: int) -> Path | None:
        key = hashlib.sha256(
            f"{self.model.fingerprint} {count} {seed} {CONTEXT_LENGTHS} {TOP_K}".encode()
        ).hexdigest()[:32]
        return self.folder / f"contexts-{key}.json" if self.folder else None

    def info(self) -> dict[str, Any]:
        """Return the part of GET /models about the recipe, the corpus and the statistics."""
        return {
            "recipe": self.recipe.model_dump(mode="json") if self.recipe else None,
            "corpus": {"source": self.corpus.source, "digest": self.corpus.digest} if self._corpus else None,
            "statistics": {
                str(x): {"tokens": s.count, "digest": s.digest} for x, s in sorted(self.statistics.items())
            },
        }


def find_recipe(model: LoadedModel, recipes: Path | None = None) -> Recipe | None:
    """Return the tuned recipe of the model, else `recipe.json` in the model's folder, else the shipped and else the
    published recipe of a model of its shape, else the one that its first edit found, else None."""
    tuned = recipe_path(model, recipes) if recipes else None
    bundled = model.companion_file("recipe.json")
    for path in (tuned, bundled):
        if path is not None and path.exists():
            return parse_recipe(path.read_text(encoding="utf-8"))
    return (
        shipped_recipe(model_shape(model), model.name)
        or published_recipe(
            model.model.config.model_type, model.num_layers, model.hidden_size, model.intermediate_size
        )
        or read_provisional_recipe(model, recipes)
    )


def model_shape(model: LoadedModel) -> ModelShape:
    """Return the shape by which a shipped recipe is found."""
    return ModelShape(
        model_type=model.model.config.model_type,
        layers=model.num_layers,
        width=model.hidden_size,
        inner_width=model.intermediate_size,
        vocabulary=model.vocabulary_size,
        positions=model.max_positions,
    )


def recipe_path(model: LoadedModel, recipes: Path) -> Path:
    """Return the path of a model's tuned recipe, named by the fingerprint of the loaded files."""
    return recipes / f"{model.loaded_fingerprint or model.fingerprint}.json"


def provisional_recipe_path(model: LoadedModel, recipes: Path) -> Path:
    """Return the path of the recipe that the first edit of a model found."""
    return recipe_path(model, recipes).with_suffix(".provisional.json")


def read_provisional_recipe(model: LoadedModel, recipes: Path | None) -> Recipe | None:
    """Return the recipe that the first edit of a model found."""
    path = provisional_recipe_path(model, recipes) if recipes else None
    return parse_recipe(path.read_text(encoding="utf-8")) if path is not None and path.exists() else None


def open_editor_context(
    model: LoadedModel,
    folder: Path | None = None,
    corpus: Path | None = None,
    tokens: int | None = None,
    recipe: Recipe | None = None,
    facts: Path | None = None,
    form: EditForm | None = None,
) -> EditorContext:
    """Return a context for which nothing is computed yet. Raise Misconfigured when its corpus cannot be read.

    `folder`: of the statistics; the folder of recipes is next to it. `tokens`: of the corpus, by default as many as
    the statistics of this model need. `facts`: the table of facts, by default that of the model. `form`: of edits that
    name none, by default that of the recipe.
    """
    source = CorpusSource(corpus, tokens or default_tokens(model))
    source.check(model)
    chosen_recipe = (
        recipe
        or find_recipe(model, folder.parent / RECIPES_FOLDER if folder else None)
        or default_recipe(
            model.model.config.model_type, model.num_layers, is_chat=model.chat_format is not None
        )
    )
    return EditorContext(model, chosen_recipe, source, folder, facts or find_facts_file(model.path), form)


def build_editor_context(
    model: LoadedModel,
    folder: Path | None = None,
    corpus: Path | None = None,
    tokens: int | None = None,
    recipe: Recipe | None = None,
    facts: Path | None = None,
) -> Stepper[EditorContext]:
    """Load or compute everything that the recipe needs, and store it in the folder: see `open_editor_context`."""
    context = open_editor_context(model, folder, corpus, tokens, recipe, facts)
    yield from context.prepare()
    return context
