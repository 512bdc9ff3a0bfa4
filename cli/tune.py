"""`palimpsest tune`: find a recipe for a model by editing facts that it knows."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from cli.evaluate import MIN_DAMAGE_TEXTS, add_split_flag, other_statements, select_records
from cli.flags import (
    add_command,
    add_json_flag,
    add_setting_flags,
    positive_int,
    positive_number,
    read_settings,
)
from cli.local_model import load_without_bos, own_facts, resolve_source, run_with_progress_bar
from cli.terminal import err, format_seconds, out, print_json, strip_control_chars, table
from service.datasets.fact_table import FACTS_FILE
from service.errors import InvalidInput
from service.methods.registry import METHODS
from service.settings import SHIPPED_MODEL, Settings

if TYPE_CHECKING:
    from service.datasets.record import Record
    from service.kit.steps import Stepper
    from service.models.loading import LoadedModel
    from service.tuning.objective import Candidate
    from service.tuning.racing import Race
    from service.tuning.recipe_search import TuningResult
    from service.tuning.time_budget import TimeBudget

T = TypeVar("T")
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
BATCH_FACTS = 200
RESUME_HINT = "The same command continues: what was measured is stored in the data folder."


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "tune",
        run,
        description="Find a recipe (layers, hyperparameters, strengths) for a model by editing facts that it knows. The model is "
        "loaded in this process; an interrupted search resumes. With `--minutes` the search ends in time: it measures many "
        "candidates on few facts and the best ones on more (docs/tune.md).",
    )
    parser.set_defaults(resume_hint=RESUME_HINT)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hugging Face name of the model")
    add(
        "--facts",
        metavar="FILE",
        help="file of records (docs/evaluation.md; default: the fact table of the model, else that of the shipped model)",
    )
    add_split_flag(parser)
    add(
        "--minutes",
        type=positive_number,
        metavar="N",
        help="end after this time, loading and statistics included, with the best layer, rate, steps, clamp and contexts so far "
        "(default: no limit, and more hyperparameters)",
    )
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
        metavar="N",
        help=f"number of facts that are edited together to tune the strengths; 0 skips this stage (default: {BATCH_FACTS}; "
        "0 with --minutes)",
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
    from service.tuning.time_budget import TimeBudget

    budget = TimeBudget(60 * args.minutes) if args.minutes else None
    settings, methods = read_settings(args, Settings), parse_methods(args.methods)
    batch_facts = resolve_batch_facts(args, methods)
    return tune_model(args, settings, methods, batch_facts, budget)


def tune_model(
    args: argparse.Namespace,
    settings: Settings,
    methods: tuple[str, ...],
    batch_facts: int,
    budget: TimeBudget | None,
) -> int:
    """Find a recipe within the budget, if there is one, write it, and print the candidates."""
    from service.datasets.loading import load_records

    records = load_records(resolve_facts(args.facts, settings), args.seed).records
    selection = select_records(records, args)
    if budget is not None:
        err.print(f"Ends within {args.minutes:g} min. {RESUME_HINT}")
    model = load_without_bos(settings)
    from service.editing.context import RECIPES_FOLDER, recipe_path
    from service.tuning.fact_selection import (
        prefers_bos,
        score_with_and_without_bos,
        select_known_records,
    )

    known_facts = run_within(
        budget,
        "the choice of facts",
        select_known_records(model, selection, max(args.max_facts, batch_facts)),
    )
    tuning_facts = known_facts[: args.max_facts]
    mean_log_probs = run_within(
        budget, "the choice of the start token", score_with_and_without_bos(model, tuning_facts)
    )
    prepend_bos = prefers_bos(model, mean_log_probs)
    err.print(
        f"Mean log-probability of true objects: {mean_log_probs.without_bos:.3f} without BOS, "
        f"{mean_log_probs.with_bos:.3f} with BOS."
    )
    margin_facts = known_facts if batch_facts else []
    result = search_recipe(model, settings, tuning_facts, margin_facts, records, prepend_bos, methods, budget)
    path = recipe_path(model, settings.data_dir / RECIPES_FOLDER)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(result.recipe.model_dump_json(indent=1), encoding="utf-8")
    print_recipe(result, path, args.json)
    return 0


def search_recipe(
    model: LoadedModel,
    settings: Settings,
    tuning_facts: list[Record],
    batch_facts: list[Record],
    records: list[Record],
    prepend_bos: bool,
    methods: tuple[str, ...],
    budget: TimeBudget | None,
) -> TuningResult:
    """Search with a progress bar. Intermediate results are stored in the data folder."""
    from service.editing.context import build_editor_context, open_editor_context
    from service.kit.artifact_store import DirectoryStore
    from service.models.loading import with_bos
    from service.tuning.budgeted_search import layers_to_race, tune_within_budget
    from service.tuning.recipe_search import tune_recipe

    search_model = with_bos(model) if prepend_bos else model
    arguments = (
        search_model, settings.data_dir / "statistics", settings.corpus, settings.covariance_tokens
    )  # fmt: skip
    if budget is None:
        context = run_with_progress_bar(build_editor_context(*arguments))
    else:
        context = open_editor_context(*arguments)
        run_within(budget, "the loading of the corpus", context.get_corpus())
        layers = layers_to_race(search_model)
        run_within(budget, "the collection of statistics", context.get_statistics(layers))
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
    inputs = (search_model, context, tuning_facts, other_texts, store, prepend_bos)
    if budget is None:
        return run_with_progress_bar(tune_recipe(*inputs, methods, batch_facts))
    result = run_with_progress_bar(tune_within_budget(*inputs, budget, print_rung))
    return result if result is not None else raise_budget_too_small(budget, "the first trials")


def run_within(budget: TimeBudget | None, what: str, stepper: Stepper[T]) -> T:
    """Run all steps under a bar. Raise InvalidInput if the budget ends before them."""
    from service.tuning.time_budget import run_until_end

    if budget is None:
        return run_with_progress_bar(stepper)
    result = run_with_progress_bar(run_until_end(stepper, budget))
    return result if result is not None else raise_budget_too_small(budget, what)


def raise_budget_too_small(budget: TimeBudget, what: str) -> NoReturn:
    """Raise the error of a budget that ended before a recipe was found."""
    raise InvalidInput(
        f"--minutes {budget.seconds / 60:g} ended during {what}, before there was a recipe. {RESUME_HINT}",
        "minutes",
    )


def print_rung(race: Race) -> None:
    """Print how a rung of a race ended, above the progress bar."""
    from service.tuning.search_space import RACE_START_VALUES

    assert race.leader is not None and race.leader.measured is not None
    left = race.schedule.seconds_left()
    note = "" if left is None else f" About {format_seconds(left)} left."
    err.print(
        strip_control_chars(
            f"{race.label}: {len(race.contenders)} candidates; best {format_hparams(race.leader.hparams, RACE_START_VALUES)}, objective "
            f"{race.leader.measured.objective:.3f}.{note}"
        )
    )


def print_recipe(result: TuningResult, path: Path, as_json: bool) -> None:
    """Print the recipe and the candidates on stdout, and where the recipe is on stderr."""
    from service.tuning.search_space import RACE_START_VALUES, START_VALUES

    if as_json:
        tried = [candidate.to_json() for candidate in result.history]
        recipe = result.recipe.model_dump(mode="json")
        printed = {"recipe": recipe, "tried": tried, "path": str(path)}
        print_json(printed | {"not_tried": list(result.not_tried)} if result.not_tried else printed)
        return
    defaults = RACE_START_VALUES if result.not_tried else START_VALUES
    out.print(table("", HISTORY_COLUMNS, [candidate_row(h, defaults) for h in result.history]))
    out.print(strip_control_chars(f"Recipe: {result.recipe.rome.model_dump_json(exclude_defaults=True)}"))
    if result.not_tried:
        hint = f" {RESUME_HINT}" if result.can_continue else ""
        err.print(strip_control_chars(f"Not tried: {'; '.join(result.not_tried)}.{hint}"))
    err.print(
        strip_control_chars(
            f"Saved {path}. `palimpsest serve` and `palimpsest worker` use it with this data folder."
        )
    )


def resolve_batch_facts(args: argparse.Namespace, methods: tuple[str, ...]) -> int:
    """Return the number of facts that are edited together. Raise InvalidInput for what a time limit leaves out."""
    if not args.minutes:
        return BATCH_FACTS if args.batch_facts is None else int(args.batch_facts)
    if args.batch_facts or methods:
        flag = "--batch-facts" if args.batch_facts else "--methods"
        raise InvalidInput(
            f"{flag} cannot be used with --minutes, which tunes single edits with rome: leave out one of both.",
            "minutes",
        )
    return 0


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


def format_hparams(hparams: dict[str, Any], defaults: dict[str, Any]) -> str:
    """Return the hyperparameters that differ from the defaults, as `name=value`."""
    return " ".join(f"{k}={json.dumps(v)}" for k, v in hparams.items() if defaults.get(k) != v)


def candidate_row(candidate: Candidate, defaults: dict[str, Any]) -> tuple[Any, ...]:
    """Return the row of HISTORY_COLUMNS of a candidate: the hyperparameters that differ from the defaults, and its
    scores or the reason."""
    label = format_hparams(candidate.hparams, defaults)
    if candidate.edits is not None:
        label = f"{candidate.edits} edit{'s' if candidate.edits > 1 else ''} {label}"
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
