"""What editing methods need in addition to the model: a recipe, contexts, statistics of keys and reference texts.
Cached on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from service.covariance.collect import load_or_collect_statistics
from service.covariance.corpus import Corpus, load_corpus
from service.covariance.second_moment import KeyStatistics
from service.editing.context_templates import CONTEXT_LENGTHS, TOP_K, sample_contexts
from service.editing.edit_spec import EditFactors, batch_edit_specs, build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.kit.files import write_atomically
from service.kit.steps import Stepper
from service.kit.text import Statement
from service.methods.parameters import RomeParameters
from service.methods.registry import DEFAULT_METHOD
from service.models.loading import LoadedModel
from service.recipes.published import published_recipe
from service.recipes.recipe import Recipe, parse_recipe, resolve_hparams
from service.recipes.shipped import ModelShape, shipped_recipe
from service.schemas import Objective

REFERENCE_TEXTS = 48  # texts of the corpus on which the guard measures the perplexity
RECIPES_FOLDER = "recipes"  # the folder of tuned recipes, next to that of the statistics
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


@dataclass
class EditorContext:
    """The recipe, contexts, statistics and reference texts of one base model. Missing ones are computed when first
    needed."""

    model: LoadedModel
    recipe: Recipe | None
    corpus: Corpus
    folder: Path | None
    statistics: dict[int, KeyStatistics] = field(default_factory=dict)
    contexts: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    perplexities: dict[int, float] = field(
        default_factory=dict
    )  #: version -> perplexity on the reference texts

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

    def get_statistics(self, layers: Sequence[int]) -> Stepper[dict[int, KeyStatistics]]:
        """Return the statistics of keys of the layers, and collect the missing ones."""
        missing = [x for x in layers if x not in self.statistics]
        if missing:
            self.statistics |= yield from load_or_collect_statistics(
                self.model, missing, self.corpus, self.folder
            )
        return {x: self.statistics[x] for x in layers}

    def find_all_factors(self, inputs: Sequence[EditInput]) -> Stepper[list[EditFactors]]:
        """Return the factors of edits on the model with its current weights, in batches within the compute budget of
        a step."""
        specs = []
        for number, edit_input in enumerate(inputs):
            parameters = resolve_hparams(
                self.recipe, edit_input.hparams, self.model.num_layers, edit_input.method
            )
            contexts: list[str] = []
            if isinstance(parameters, RomeParameters):
                contexts = yield from self.get_contexts(parameters.contexts, parameters.seed)
                yield from self.get_statistics(parameters.layers)
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
            specs.append(build_edit_spec(self.model, contexts, *spec_arguments))
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
            "corpus": {"source": self.corpus.source, "digest": self.corpus.digest},
            "statistics": {
                str(x): {"tokens": s.count, "digest": s.digest} for x, s in sorted(self.statistics.items())
            },
        }


def find_recipe(model: LoadedModel, recipes: Path | None = None) -> Recipe | None:
    """Return the tuned recipe of the model, else `recipe.json` in the model's folder, else the shipped and else the
    published recipe of a model of its shape, else None."""
    tuned = recipe_path(model, recipes) if recipes else None
    bundled = model.companion_file("recipe.json")
    for path in (tuned, bundled):
        if path is not None and path.exists():
            return parse_recipe(path.read_text(encoding="utf-8"))
    return shipped_recipe(model_shape(model), model.name) or published_recipe(
        model.model.config.model_type, model.num_layers, model.hidden_size
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


def build_editor_context(
    model: LoadedModel,
    folder: Path | None = None,
    corpus: Path | None = None,
    tokens: int = 60_000,
    recipe: Recipe | None = None,
) -> Stepper[EditorContext]:
    """Load or compute everything that the recipe needs. It takes seconds for the shipped model on the first start,
    and is cached.

    `folder`: of the statistics; the folder of recipes is next to it. `tokens`: maximum tokens of the corpus.
    """
    loaded_corpus = yield from load_corpus(model, tokens, corpus, folder=folder)
    chosen_recipe = recipe or find_recipe(model, folder.parent / RECIPES_FOLDER if folder else None)
    context = EditorContext(model, chosen_recipe, loaded_corpus, folder)
    if context.recipe is not None:
        rome = context.recipe.rome
        yield from context.get_contexts(rome.contexts, rome.seed)
        yield from context.get_statistics(rome.layers)
    return context
