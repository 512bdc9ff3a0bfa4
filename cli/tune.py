"""`prepare`: find a recipe for a model by editing facts that it knows; computed here, and gone on with when it was interrupted."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.evaluate import MIN_DAMAGE_TEXTS, other_statements, select_records
from cli.flags import read_settings
from cli.local_model import FACTS_FILE, load_without_bos, resolve_source, run_with_progress_bar
from cli.terminal import err, out, print_json, strip_control_chars, table
from service.datasets.loading import load_records
from service.datasets.record import Record
from service.errors import InvalidInput
from service.kit.artifact_store import DirectoryStore
from service.methods.registry import METHODS
from service.settings import SHIPPED_MODEL, Settings

if TYPE_CHECKING:
    from service.models.loading import LoadedModel
    from service.tuning.objective import Candidate
    from service.tuning.recipe_search import TuningResult

HISTORY_COLUMNS = ("stage", "tried", "ES", "PS", "NS", "S alone", "S at once", "loss increase", "objective")
SEARCH_DIR = "prepared"  # folder of what a later run goes on with


def run(args: argparse.Namespace) -> int:
    """Find a recipe, write it where the worker finds it, and show what it was chosen by."""
    settings, methods = read_settings(args, Settings), parse_methods(args.methods)
    records = load_records(resolve_facts(args.facts, settings.model), args.seed).records
    selection = select_records(records, args)
    model = load_without_bos(settings)
    from service.editing.context import RECIPES_FOLDER, recipe_path
    from service.tuning.fact_selection import (
        prefers_bos,
        score_with_and_without_bos,
        select_known_records,
    )
    from service.tuning.search_space import START_VALUES

    known_facts = run_with_progress_bar(select_known_records(model, selection, max(args.most, args.many)))
    tuning_facts = known_facts[: args.most]
    mean_log_probs = run_with_progress_bar(score_with_and_without_bos(model, tuning_facts))
    prepend_bos = prefers_bos(model, mean_log_probs)
    err.print(
        f"Mean log-probability of true objects: {mean_log_probs.without_bos:.3f} without BOS, "
        f"{mean_log_probs.with_bos:.3f} with BOS."
    )
    preparation = search_recipe(
        model, settings, tuning_facts, known_facts if args.many else [], records, prepend_bos, methods
    )
    path = recipe_path(model, settings.data_dir / RECIPES_FOLDER)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = preparation.recipe.model_dump_json(indent=1)
    path.write_text(recipe, encoding="utf-8")
    if args.json:
        tried = [candidate.to_json() for candidate in preparation.history]
        print_json({"recipe": json.loads(recipe), "tried": tried, "path": str(path)})
        return 0
    out.print(table("", HISTORY_COLUMNS, [candidate_row(h, START_VALUES) for h in preparation.history]))
    out.print(
        strip_control_chars(f"The recipe: {preparation.recipe.rome.model_dump_json(exclude_defaults=True)}")
    )
    err.print(
        strip_control_chars(
            f"It stands in {path}, where `palimpsest serve` and `work` find it with this data folder."
        )
    )
    return 0


def search_recipe(
    model: LoadedModel,
    settings: Settings,
    tuning_facts: list[Record],
    batch_facts: list[Record],
    records: list[Record],
    prepend_bos: bool,
    methods: tuple[str, ...],
) -> TuningResult:
    """The search, under a bar; what was tried is kept in the data folder."""
    from service.editing.context import build_editor_context
    from service.models.loading import with_bos
    from service.tuning.recipe_search import tune_recipe

    search_model = with_bos(model) if prepend_bos else model
    statistics = settings.data_dir / "statistics"
    context = run_with_progress_bar(
        build_editor_context(search_model, statistics, settings.corpus, settings.covariance_tokens)
    )
    other_texts = other_statements(records, [*tuning_facts, *batch_facts])
    if len(other_texts) < MIN_DAMAGE_TEXTS:
        other_texts = list(context.corpus.texts)
    search_inputs = [
        search_model.fingerprint,
        context.corpus.digest,
        [r.name + r.subject for r in [*tuning_facts, *batch_facts]],
        other_texts,
    ]
    digest = hashlib.sha256(json.dumps(search_inputs).encode()).hexdigest()[:24]
    store = DirectoryStore(settings.data_dir / SEARCH_DIR / digest)
    return run_with_progress_bar(
        tune_recipe(
            search_model, context, tuning_facts, other_texts, store, prepend_bos, methods, batch_facts
        )
    )


def resolve_facts(source: str | None, model: str) -> Path:
    """A file by its name; else the table beside the model; else that of the shipped model, whose facts many models know."""
    if source is not None:
        return resolve_source(source, model)
    default_path = Path(model) / FACTS_FILE
    return default_path if default_path.is_file() else SHIPPED_MODEL / FACTS_FILE


def parse_methods(text: str | None) -> tuple[str, ...]:
    """The methods that are tuned beside "rome"."""
    names = tuple(word.strip() for word in (text or "").split(",") if word.strip())
    others = [name for name in METHODS if name != "rome"]
    if unknown := [name for name in names if name not in others]:
        raise InvalidInput(f"--methods cannot be {unknown[0]!r}: name some of {','.join(others)}.")
    return names


def candidate_row(candidate: Candidate, defaults: dict[str, Any]) -> tuple[Any, ...]:
    """Return the row of HISTORY_COLUMNS of a candidate: the hyperparameters that differ from the defaults, and its scores or the reason."""
    label = " ".join(f"{k}={json.dumps(v)}" for k, v in candidate.hparams.items() if defaults.get(k) != v)
    if candidate.edits is not None:
        label = f"{candidate.edits} edits {label}"
    if candidate.joint is None:
        return candidate.stage, label, *("" for _ in range(5)), candidate.reason or "", 0.0
    scores = candidate.alone or candidate.joint
    figures = (
        scores["ES"],
        scores["PS"],
        scores["NS"],
        candidate.alone["S"] if candidate.alone else None,
        candidate.joint["S"],
        candidate.loss_increase,
        candidate.objective,
    )
    return str(candidate.stage), label, *(None if x is None else round(x, 3) for x in figures)
