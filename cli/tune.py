"""`palimpsest tune`: find a recipe for a model by editing facts that it knows."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.evaluate import MIN_DAMAGE_TEXTS, add_split_flag, other_statements, select_records
from cli.flags import add_command, add_json_flag, add_setting_flags, positive_int, read_settings
from cli.local_model import load_without_bos, own_facts, resolve_source, run_with_progress_bar
from cli.terminal import err, out, print_json, strip_control_chars, table
from service.datasets.fact_table import FACTS_FILE
from service.errors import InvalidInput
from service.methods.registry import METHODS
from service.settings import SHIPPED_MODEL, Settings

if TYPE_CHECKING:
    from service.datasets.record import Record
    from service.models.loading import LoadedModel
    from service.tuning.objective import Candidate
    from service.tuning.recipe_search import TuningResult

OTHER_METHODS = tuple(name for name in METHODS if name != "rome")
HISTORY_COLUMNS = (
    "stage",
    "candidate",
    "ES",
    "PS",
    "NS",
    "S single",
    "S batch",
    "loss increase",
    "objective",
)
SEARCH_DIR = "prepared"  # folder of the intermediate results


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "tune",
        run,
        description="Find a recipe (layers, hyperparameters, strengths) for a model by editing facts that it knows. The model is "
        "loaded in this process; an interrupted search resumes.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hugging Face name of the model")
    add(
        "--facts",
        metavar="FILE",
        help="file of records (docs/evaluation.md; default: the fact table of the model, else that of the shipped model)",
    )
    add_split_flag(parser)
    add(
        "--limit",
        dest="max_facts",
        type=positive_int,
        default=48,
        metavar="N",
        help="maximum number of facts that are edited one by one (default: 48)",
    )
    add(
        "--batch-facts",
        type=int,
        default=200,
        metavar="N",
        help="number of facts that are edited together to tune the strengths; 0 skips this stage (default: 200)",
    )
    add("--methods", metavar="NAME,...", help=f"other methods to tune, some of {','.join(OTHER_METHODS)}")
    add("--seed", type=int, default=0, metavar="N", help="seed of the order of the facts (default: 0)")
    add_json_flag(parser)
    settings = (
        "models_dir",
        "adapter",
        "device",
        "device_map",
        "dtype",
        "threads",
        "data_dir",
        "corpus",
        "covariance_tokens",
    )
    add_setting_flags(parser.add_argument_group("model"), Settings, *settings)
    parser.set_defaults(unique_subjects=True, limit=None)


def run(args: argparse.Namespace) -> int:
    """Find a recipe, write it into the data folder, and print the candidates."""
    from service.datasets.loading import load_records

    settings, methods = read_settings(args, Settings), parse_methods(args.methods)
    records = load_records(resolve_facts(args.facts, settings), args.seed).records
    selection = select_records(records, args)
    model = load_without_bos(settings)
    from service.editing.context import RECIPES_FOLDER, recipe_path
    from service.tuning.fact_selection import (
        prefers_bos,
        score_with_and_without_bos,
        select_known_records,
    )
    from service.tuning.search_space import START_VALUES

    known_facts = run_with_progress_bar(
        select_known_records(model, selection, max(args.max_facts, args.batch_facts))
    )
    tuning_facts = known_facts[: args.max_facts]
    mean_log_probs = run_with_progress_bar(score_with_and_without_bos(model, tuning_facts))
    prepend_bos = prefers_bos(model, mean_log_probs)
    err.print(
        f"Mean log-probability of true objects: {mean_log_probs.without_bos:.3f} without BOS, "
        f"{mean_log_probs.with_bos:.3f} with BOS."
    )
    result = search_recipe(
        model, settings, tuning_facts, known_facts if args.batch_facts else [], records, prepend_bos, methods
    )
    path = recipe_path(model, settings.data_dir / RECIPES_FOLDER)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = result.recipe.model_dump_json(indent=1)
    path.write_text(recipe, encoding="utf-8")
    if args.json:
        tried = [candidate.to_json() for candidate in result.history]
        print_json({"recipe": json.loads(recipe), "tried": tried, "path": str(path)})
        return 0
    out.print(table("", HISTORY_COLUMNS, [candidate_row(h, START_VALUES) for h in result.history]))
    out.print(strip_control_chars(f"Recipe: {result.recipe.rome.model_dump_json(exclude_defaults=True)}"))
    err.print(
        strip_control_chars(
            f"Saved {path}. `palimpsest serve` and `palimpsest worker` use it with this data folder."
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
    """Search with a progress bar. Intermediate results are stored in the data folder."""
    from service.editing.context import build_editor_context
    from service.kit.artifact_store import DirectoryStore
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


def resolve_facts(source: str | None, settings: Settings) -> Path:
    """Return the given file, else the fact table of the model, else that of the shipped model."""
    if source is not None:
        return resolve_source(source, settings)
    default_path = own_facts(settings)
    return default_path if default_path.is_file() else SHIPPED_MODEL / FACTS_FILE


def parse_methods(text: str | None) -> tuple[str, ...]:
    """Parse the methods to tune in addition to "rome"."""
    names = tuple(word.strip() for word in (text or "").split(",") if word.strip())
    if unknown := [name for name in names if name not in OTHER_METHODS]:
        raise InvalidInput(f"--methods cannot be {unknown[0]!r}: use some of {','.join(OTHER_METHODS)}.")
    return names


def candidate_row(candidate: Candidate, defaults: dict[str, Any]) -> tuple[Any, ...]:
    """Return the row of HISTORY_COLUMNS of a candidate: the hyperparameters that differ from the defaults, and its
    scores or the reason."""
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
