"""What an editor needs besides the model: a recipe, contexts, statistics and a reference text. Made once, stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from service.covariance.collect import statistics_steps
from service.covariance.corpus import Corpus, corpus_steps
from service.covariance.second_moment import Statistics
from service.editing.context_templates import LENGTHS, TOP_K, contexts_steps
from service.editing.edit_spec import batches, want
from service.editing.methods.registry import find_together_steps
from service.editing.methods.rome import Found
from service.kit.ids import new_id
from service.kit.steps import Steps
from service.kit.text import Statement
from service.models.loading import LoadedModel
from service.recipes.recipe import Recipe, RomeParameters, read_recipe, recipe_for, resolve
from service.schemas import Objective

REFERENCE = 48  # texts of the corpus on which the guard measures perplexity
RECIPES = "recipes"  # folder of what `palimpsest prepare` writes, beside that of the statistics
REMEMBERED = 16  # versions whose perplexity is kept


@dataclass(frozen=True)
class Asking:
    """One edit as an evaluation, a study or a bench asks for it; `edit` names its pieces and is their order.

    To erase or amplify, `target` is the true object. With `noise` (n, d) the edit is found while that stands on the embeddings of
    the subject's tokens in every text: fact forcing (`service/editing/subject_noise.py`).
    """

    statement: Statement
    target: str
    method: str = "rome"
    hparams: dict[str, Any] | None = None
    edit: str = ""
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)


@dataclass
class Toolkit:
    """The editor's tools for one base model; statistics and contexts not yet at hand are made when first needed."""

    model: LoadedModel
    recipe: Recipe | None
    corpus: Corpus
    folder: Path | None
    statistics: dict[int, Statistics] = field(default_factory=dict)
    contexts: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    perplexities: dict[int, float] = field(
        default_factory=dict
    )  #: of the reference text, at versions lately seen

    def remember(self, version: int, perplexity: float) -> None:
        """The perplexity at a version that has landed: the next edit finds it there."""
        self.perplexities[version] = perplexity
        while len(self.perplexities) > REMEMBERED:
            self.perplexities.pop(next(iter(self.perplexities)))

    @property
    def reference(self) -> Sequence[str]:
        """Texts spread evenly over the corpus."""
        texts = self.corpus.texts
        return texts[:: max(1, len(texts) // REFERENCE)][:REFERENCE]

    def statistics_steps(self, layers: Sequence[int]) -> Steps[dict[int, Statistics]]:
        """Statistics of these layers."""
        missing = [x for x in layers if x not in self.statistics]
        if missing:
            self.statistics |= yield from statistics_steps(self.model, missing, self.corpus, self.folder)
        return {x: self.statistics[x] for x in layers}

    def find_together_steps(self, wishes: Sequence[Asking]) -> Steps[list[Found]]:
        """The pieces of some edits on the model as it stands, side by side where a step has room for more than one."""
        wanted = []
        for number, ask in enumerate(wishes):
            parameters = resolve(self.recipe, ask.hparams, self.model.layers, ask.method)
            contexts: list[str] = []
            if isinstance(parameters, RomeParameters):
                contexts = yield from self.contexts_steps(parameters.contexts, parameters.seed)
                yield from self.statistics_steps(parameters.layers)
            name = ask.edit or f"{number:06}"
            asked = ask.statement, ask.target, parameters, name, ask.method, ask.objective, ask.noise
            wanted.append(want(self.model, contexts, *asked))
        found: list[Found] = []
        for batch in batches(self.model, wanted):
            found += yield from find_together_steps(self.model, self.statistics, batch)
        return found

    def find_steps(
        self,
        statement: Statement,
        target: str,
        method: str = "rome",
        hparams: dict[str, Any] | None = None,
        edit: str = "",
        objective: Objective = "write",
        noise: Tensor | None = None,
    ) -> Steps[Found]:
        """The pieces of one edit on the model as it stands."""
        asking = Asking(statement, target, method, hparams, edit, objective, noise)
        (found,) = yield from self.find_together_steps([asking])
        return found

    def contexts_steps(self, count: int, seed: int) -> Steps[list[str]]:
        """Contexts sampled from the base model, stored under all that they depend on."""
        if (count, seed) not in self.contexts:
            path = self._contexts_file(count, seed)
            if path is not None and path.exists():
                self.contexts[count, seed] = json.loads(path.read_text(encoding="utf-8"))
            else:
                self.contexts[count, seed] = yield from contexts_steps(self.model, count, seed)
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    part = path.with_suffix("." + new_id("part"))  # other workers may share the folder
                    part.write_text(json.dumps(self.contexts[count, seed]), encoding="utf-8")
                    part.replace(path)
        return self.contexts[count, seed]

    def _contexts_file(self, count: int, seed: int) -> Path | None:
        key = hashlib.sha256(
            f"{self.model.fingerprint} {count} {seed} {LENGTHS} {TOP_K}".encode()
        ).hexdigest()[:32]
        return self.folder / f"contexts-{key}.json" if self.folder else None

    def info(self) -> dict[str, Any]:
        """What GET /models says of it."""
        return {
            "recipe": self.recipe.model_dump(mode="json") if self.recipe else None,
            "corpus": {"source": self.corpus.source, "digest": self.corpus.digest},
            "statistics": {
                str(x): {"tokens": s.count, "digest": s.digest} for x, s in sorted(self.statistics.items())
            },
        }


def recipe_of(model: LoadedModel, recipes: Path | None = None) -> Recipe | None:
    """What `palimpsest prepare` has written for this model; else `recipe.json` in the model's folder; else the published recipe of a
    model of this shape."""
    written = recipe_file(model, recipes) if recipes else None
    beside = model.folder / "recipe.json" if model.folder else None
    for path in (written, beside):
        if path is not None and path.exists():
            return read_recipe(path.read_text(encoding="utf-8"))
    return recipe_for(model.model.config.model_type, model.layers, model.width)


def recipe_file(model: LoadedModel, recipes: Path) -> Path:
    """Where a recipe is written and found: by the fingerprint of what was loaded, in the folder of recipes."""
    return recipes / f"{model.origin or model.fingerprint}.json"


def prepare_steps(
    model: LoadedModel,
    folder: Path | None = None,
    corpus: Path | None = None,
    tokens: int = 60_000,
    recipe: Recipe | None = None,
) -> Steps[Toolkit]:
    """Make or read all that the recipe needs. Seconds for the shipped model on first start, nothing afterwards.

    `folder` is that of the statistics; recipes stand beside it.
    """
    text = yield from corpus_steps(model, tokens, corpus, folder=folder)
    known = recipe or recipe_of(model, folder.parent / RECIPES if folder else None)
    toolkit = Toolkit(model, known, text, folder)
    if toolkit.recipe is not None:
        rome = toolkit.recipe.rome
        yield from toolkit.contexts_steps(rome.contexts, rome.seed)
        yield from toolkit.statistics_steps(rome.layers)
    return toolkit
