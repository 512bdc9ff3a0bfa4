"""`palimpsest train`: train the learned part of an editing method, in this process or as a job of the service."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cli.client import add_connection_flags, run_with_client
from cli.evaluate import add_split_flag, select_records
from cli.flags import (
    add_command,
    add_json_flag,
    add_setting_flags,
    positive_int,
    positive_number,
    read_settings,
)
from cli.job_output import report_job_failure, wait_for_job
from cli.local_model import MODEL_SETTINGS, load_served_model, resolve_source, run_with_progress_bar
from cli.overview import summary_of
from cli.terminal import err, format_list, out, print_json, strip_control_chars
from palimpsest import Client
from service.errors import InvalidInput
from service.settings import Settings

if TYPE_CHECKING:
    from service.weights.trained_scope import TrainedScope

RESUME_HINT = "The same command continues: what was computed is stored in the data folder."
STATES_FOLDER = "trainings"  # of intermediate results, in the data folder
PLAN_FLAGS = ("layer", "dimensions", "steps", "batch_size", "learning_rate", "false_open_rate", "seed")
COLUMNS = ("prompts", "within", "subject", "relation", "other", "right", "wrong")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "train",
        help=summary_of("train"),
        description="Train the learned part of an editing method. The model is loaded in this process; an interrupted training "
        "resumes. `--service` runs it as a job of the service instead.",
    )
    verbs = parser.add_subparsers(title="methods", metavar="METHOD", required=True)
    serac = add_command(
        verbs,
        "serac",
        run,
        "train the scope classifier of SERAC, which recognises the prompts that an edit is about",
    )
    serac.set_defaults(resume_hint=RESUME_HINT, unique_subjects=False)
    add = serac.add_argument
    add(
        "source",
        metavar="FILE",
        nargs="?",
        default="facts",
        help="file of records with paraphrases (docs/evaluation.md); default: `facts`, the fact table of the model",
    )
    add_split_flag(serac)
    add("--limit", type=positive_int, metavar="N", help="maximum number of records (default: all)")
    add(
        "--layer",
        type=int,
        metavar="N",
        help="layer that is read, from 0 (default: at a quarter of the depth)",
    )
    add("--dimensions", type=positive_int, metavar="N", help="dimensions of an embedding (default: 64)")
    add("--steps", type=positive_int, metavar="N", help="training steps (default: 1000)")
    add("--batch-size", type=positive_int, metavar="N", help="facts in a step (default: 64)")
    add("--learning-rate", type=positive_number, metavar="X", help="Adam's learning rate (default: 0.003)")
    add(
        "--false-open-rate",
        type=float,
        metavar="X",
        help="share of prompts out of scope that may open a record (default: 0.01)",
    )
    add("--seed", type=int, metavar="N", help="seed of the split by subject and of the training (default: 0)")
    add_setting_flags(serac.add_argument_group("model"), Settings, *MODEL_SETTINGS, "data_dir")
    add("--service", action="store_true", help="run as a job of the service")
    add_connection_flags(serac)
    add_json_flag(serac)


def run(args: argparse.Namespace) -> int:
    """Train in this process, or as a job of the service."""
    if args.service:
        args.resume_hint = ""  # the job goes on
        return run_with_client(submit_training, args)
    return train_locally(args)


def train_locally(args: argparse.Namespace) -> int:
    """Train in this process, put the classifier into the data folder, and print its figures."""
    from service.datasets.loading import read_records
    from service.schemas import ScopePlan

    settings = read_settings(args, Settings)
    try:
        plan = ScopePlan(**plan_fields(args))
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    records = select_records(read_records(resolve_source(args.source, settings), plan.seed), args)
    model = load_served_model(settings)
    from service.editing.scope_classifiers import CLASSIFIERS_FOLDER, artifact_name
    from service.kit.artifact_store import DirectoryStore
    from service.training.scope_training import train_scope, training_digest

    states = settings.data_dir / STATES_FOLDER / training_digest(model, records, plan)[:32]
    trained = run_with_progress_bar(train_scope(model, records, plan, DirectoryStore(states)))
    store = DirectoryStore(settings.data_dir / CLASSIFIERS_FOLDER)
    name = artifact_name(model.fingerprint, trained.classifier.layer)
    store.put(name, trained.serialize())
    print_trained(trained, store.path / name, args.json)
    return 0


def submit_training(args: argparse.Namespace, client: Client) -> int:
    """Train as a job of the service, and print the figures of the classifier."""
    from service.datasets.loading import read_rows

    if args.split != "all":
        raise InvalidInput("--split cannot be used with --service.")
    is_table = args.source == "facts"
    source: dict[str, Any] = {"dataset": "facts"} if is_table else {"records": read_rows(Path(args.source))}
    limit = {} if args.limit is None else {"limit": args.limit}
    training = client.train(**plan_fields(args), **source, **limit, wait=False)
    err.print(strip_control_chars(f"{training.id} runs in the service, also if this command is stopped."))
    job = wait_for_job(client, training).raw
    if args.json:
        print_json(job)
    if job["status"] != "done":
        return report_job_failure("training", job)
    if not args.json:
        print_figures(job["result"])
    return 0


def plan_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the plan that the flags set."""
    return {name: value for name in PLAN_FLAGS if (value := getattr(args, name)) is not None}


def print_trained(trained: TrainedScope, path: Path, as_json: bool) -> None:
    """Print the figures of a classifier on stdout, and where it is on stderr."""
    result = trained.description()
    if as_json:
        print_json(result | {"path": str(path)})
    else:
        print_figures(result)
    err.print(
        strip_control_chars(
            f"Saved {path}. Edits with the method serac use it with this data folder: `palimpsest edit --method serac`."
        )
    )


def print_figures(result: dict[str, Any]) -> None:
    """Print the figures on held-out subjects: shares of prompts that open a record, in percent."""
    facts, figures = result["facts"], result["figures"]
    out.print(
        strip_control_chars(
            f"Classifier {result['digest'][:12]} of layer {result['plan']['layer']}, trained on {facts['training']} facts. "
            f"Percent of prompts about {facts['measured']} facts of other subjects that open a record: of the fact itself "
            "(within), of a fact out of whose scope they are (by what both have in common), and in a memory of all these "
            "facts the right one and a wrong one."
        )
    )
    names = {"any_prompt": "any", "with_subject": "with the subject"}
    out.print(format_list(COLUMNS, [_figure_row(names[name], f) for name, f in figures.items()], ()))


def _figure_row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    outside, memory = figures["outside_open"], figures["memory"]
    shares = (figures["within_open"], *outside.values(), memory["right"], memory["wrong"])
    return (name, *("–" if share is None else f"{100 * share:.1f}" for share in shares))
