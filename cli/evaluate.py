"""`palimpsest evaluate`: measure the quality of edits on a set of records, in this process or as a job of the
service."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cli.client import add_connection_flags, run_with_client
from cli.edit_output import parse_hparam
from cli.flags import (
    add_column_flag,
    add_command,
    add_hparam_flag,
    add_json_flag,
    add_setting_flags,
    parse_columns,
    positive_int,
    read_settings,
)
from cli.job_output import report_job_failure, wait_for_job
from cli.local_model import MODEL_SETTINGS, load_served_model, resolve_source, run_with_progress_bar
from cli.terminal import err, format_list, out, print_json, strip_control_chars, table
from palimpsest import Client
from service.errors import InvalidInput
from service.methods.registry import METHODS
from service.settings import Settings

if TYPE_CHECKING:
    from service.datasets.record import Record
    from service.schemas import EvaluationPlan

ARTIFACTS_DIR, RESULT_FILE, REPORT_FILE, DPI = "kept", "result.json", "report.html", 200
RESUME_HINT = "The same command continues: what was measured is stored in the folder of --out."
MIN_DAMAGE_TEXTS = 32  # statements of other records; with fewer, the corpus of the model is used
MAX_OTHER_RECORDS = 1000  # maximum number of records that provide damage texts
#: flags that the service does not support: it takes the records in the order of the seed and has its own damage texts
LOCAL_ONLY_OPTIONS = {"split": "all", "unique_subjects": False, "damage_corpus": None}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "evaluate",
        run,
        description="Measure the quality of edits on a set of records. The model is loaded in this process; an interrupted "
        "evaluation resumes. `--service` runs it as a job of the service instead.",
    )
    parser.set_defaults(resume_hint=RESUME_HINT)
    add = parser.add_argument
    add(
        "source",
        metavar="FILE",
        help="file of records (docs/evaluation.md): JSON, JSON lines or CSV; or `facts` for the fact table of the model",
    )
    add_column_flag(parser)
    add(
        "--out",
        metavar="FOLDER",
        required=True,
        help="folder of the result, the report and the intermediate results",
    )
    add("--method", choices=list(METHODS), help="editing method (default: rome)")
    add_hparam_flag(parser)
    add("--objective", choices=["write", "erase", "amplify"], help="objective of the edits (default: write)")
    add(
        "--mode",
        choices=["single", "sequence"],
        help="single: each edit alone on the base model; sequence: one edit after another (default: single)",
    )
    add(
        "--search-model",
        choices=["base", "edited"],
        help="sequence: compute each edit on the base model and compose, as the service does; or compute it on the edited "
        "model and add it, as published (default: base)",
    )
    add(
        "--checkpoints",
        metavar="N,...",
        help="sequence: numbers of edits after which all are measured (default: 1,10,100,1000)",
    )
    add(
        "--strengths",
        metavar="X,...",
        help="strengths to try until an edit is effective; the service tries 1,1.25,1.5,2 (default: 1)",
    )
    add(
        "--batch-size",
        type=positive_int,
        metavar="N",
        help="number of edits optimized in one batch (default: 16; 1 with --search-model edited)",
    )
    add_split_flag(parser)
    add("--unique-subjects", action="store_true", help="keep one record of each subject")
    add("--limit", type=positive_int, metavar="N", help="maximum number of records (default: all)")
    add(
        "--suites",
        metavar="NAME,...",
        help="further questions and measures (docs/evaluation.md#suites), some of "
        "free,consistency,divergence,negation,prefixes,portability,chat",
    )
    add(
        "--recall-facts",
        type=positive_int,
        metavar="N",
        help="sequence: number of facts that are not edited on which to measure what the model still says (default: none)",
    )
    add("--generation", action="store_true", help="also generate text, for GE and RS (slow)")
    add("--no-damage", action="store_true", help="do not measure loss and drift on unrelated texts")
    add(
        "--damage-corpus",
        metavar="FILE",
        help="file of unrelated texts, one a line (default: statements of the other records, or the corpus)",
    )
    add(
        "--damage-texts",
        type=positive_int,
        metavar="N",
        help="number of unrelated texts (default: 200; 16 for each single edit)",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the record order, the intervals and the generation (default: 0)",
    )
    add(
        "--compare-with",
        metavar="FOLDER",
        action="append",
        help="folder of another evaluation to show in the report; repeatable",
    )
    model = parser.add_argument_group("model")
    add_setting_flags(model, Settings, *MODEL_SETTINGS, "data_dir", "corpus", "covariance_tokens")
    add("--service", action="store_true", help="run as a job of the service")
    add_connection_flags(parser)
    add_json_flag(parser)


def add_split_flag(parser: argparse.ArgumentParser) -> None:
    """Add `--split`."""
    parser.add_argument(
        "--split",
        choices=["all", "tune", "test"],
        default="all",
        help="records at even (tune) or odd (test) positions of the shuffled order (default: all)",
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate in this process, or as a job of the service."""
    if args.service:
        args.resume_hint = ""  # the job goes on
        return run_with_client(submit_evaluation, args)
    return evaluate_locally(args)


def evaluate_locally(args: argparse.Namespace) -> int:
    """Evaluate in this process, write result and report, and print the result."""
    from service.datasets.loading import load_records, read_rows
    from service.datasets.parsing import SKIP_DESCRIPTIONS

    settings, plan = read_settings(args, Settings), build_plan(args)
    dataset = load_records(read_rows(resolve_source(args.source, settings), parse_columns(args)), plan.seed)
    records = select_records(dataset.records, args)
    damage_texts = load_damage_texts(args, dataset.records, records)
    comparisons = [load_result(Path(name)) for name in args.compare_with or ()]
    for reason, number in dataset.skipped.items():
        err.print(strip_control_chars(f"{number} records are skipped: {SKIP_DESCRIPTIONS[reason]}."))
    result = run_evaluation(settings, plan, records, dataset.records, damage_texts, Path(args.out))
    write_report(Path(args.out), [result, *comparisons])
    print_result(result, Path(args.out), args.json)
    return 0


def submit_evaluation(args: argparse.Namespace, client: Client) -> int:
    """Evaluate as a job of the service, write result and report, and print the result."""
    fields = evaluation_fields(args)
    comparisons = [load_result(Path(name)) for name in args.compare_with or ()]
    evaluation = client.evaluate(**fields, wait=False)
    err.print(strip_control_chars(f"{evaluation.id} runs in the service, also if this command is stopped."))
    job = wait_for_job(client, evaluation).raw
    if job["status"] != "done":
        if args.json:
            print_json(job)
        return report_job_failure("evaluation", job)
    write_report(Path(args.out), [job["result"], *comparisons])
    print_result(job["result"], Path(args.out), args.json)
    return 0


def evaluation_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of POST /evaluations that the flags set."""
    from service.datasets.loading import read_rows

    for name, default in LOCAL_ONLY_OPTIONS.items():
        if getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            raise InvalidInput(f"{flag} cannot be used with --service.")
    fields = build_plan(args).model_dump(mode="json", exclude_unset=True)
    if args.limit is not None:
        fields["limit"] = args.limit
    if args.source == "facts":
        return fields | {"dataset": "facts"}
    return fields | {"records": read_rows(Path(args.source), parse_columns(args))}


def build_plan(args: argparse.Namespace) -> EvaluationPlan:
    """Return the plan that the flags describe."""
    from service.schemas import EvaluationPlan

    names = (
        "method",
        "objective",
        "mode",
        "search_model",
        "batch_size",
        "damage_texts",
        "recall_facts",
        "seed",
    )
    fields: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("checkpoints", "strengths", "suites"):
        if raw := getattr(args, name):
            fields[name] = raw.split(",")
    if args.hparam:
        fields["hparams"] = dict(parse_hparam(text) for text in args.hparam)
    try:
        return EvaluationPlan(**fields, generation=args.generation, damage=not args.no_damage)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def select_records(records: Sequence[Record], args: argparse.Namespace) -> list[Record]:
    """Return the records to edit: first the split, then one a subject, then the limit."""
    splits = {"all": slice(None), "tune": slice(0, None, 2), "test": slice(1, None, 2)}
    selection = list(records[splits[args.split]])
    if args.unique_subjects:
        selection = list({r.subject: r for r in reversed(selection)}.values())[::-1]
    return selection[: args.limit]


def load_damage_texts(
    args: argparse.Namespace, records: Sequence[Record], edited: Sequence[Record]
) -> tuple[str, list[str]] | None:
    """Return a name and texts: the lines of a file, or statements of records that are not edited; None if these are
    few."""
    if args.damage_corpus:
        try:
            lines = Path(args.damage_corpus).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise InvalidInput(f"--damage-corpus {args.damage_corpus!r} cannot be read: {error}") from None
        return f"the file {Path(args.damage_corpus).name}", [line for line in lines if line.strip()]
    other_texts = other_statements(records, edited)
    return (
        ("statements of facts that are not edited", other_texts)
        if len(other_texts) >= MIN_DAMAGE_TEXTS
        else None
    )


def other_statements(records: Sequence[Record], edited: Sequence[Record]) -> list[str]:
    """Return the true statements of records whose subjects are not edited."""
    from service.datasets.record import true_statements

    subjects = {r.subject for r in edited}
    return true_statements([r for r in records if r.subject not in subjects][:MAX_OTHER_RECORDS])


def run_evaluation(
    settings: Settings,
    plan: EvaluationPlan,
    records: Sequence[Record],
    all_records: Sequence[Record],
    damage_texts: tuple[str, list[str]] | None,
    folder: Path,
) -> dict[str, Any]:
    """Load the model, collect its statistics and run the evaluation, with a progress bar."""
    model = load_served_model(settings)
    from service.covariance.corpus import Corpus
    from service.editing.context import build_editor_context
    from service.engine.versioned_model import EmptyLedger, VersionedModel
    from service.evaluation.runner import run_evaluation
    from service.kit.artifact_store import DirectoryStore

    statistics = settings.data_dir / "statistics"
    context = run_with_progress_bar(
        build_editor_context(model, statistics, settings.corpus, settings.covariance_tokens)
    )
    corpus = Corpus(damage_texts[0], tuple(damage_texts[1])) if damage_texts else None
    replica, store = VersionedModel(model, EmptyLedger()), DirectoryStore(folder / ARTIFACTS_DIR)
    evaluating = run_evaluation(replica, context, plan, records, store, corpus, all_records)
    return run_with_progress_bar(evaluating)


def load_result(path: Path) -> dict[str, Any]:
    """Read the result of another evaluation from its file or folder."""
    from service.evaluation import report_text

    file = path / RESULT_FILE if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        report_text.title([result])
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidInput(f"{str(path)!r} contains no result of an evaluation: name its folder.") from None
    return result  # type: ignore[no-any-return]


def write_report(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write the first result as JSON, and figures and report of all results."""
    from service.evaluation import report, report_figures
    from service.kit import plotting

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).write_text(json.dumps(results[0], indent=1), encoding="utf-8")
    for name, draw in report_figures.figures(results).items():
        (folder / f"{name}.png").write_bytes(plotting.render_png(draw, DPI))
    (folder / REPORT_FILE).write_text(report.page(results), encoding="utf-8")


def print_result(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    """Print the result on stdout, and the paths of the files on stderr."""
    if as_json:
        print_json(result)
    else:
        print_result_tables(result)
    err.print(
        strip_control_chars(
            f"Report: {folder / REPORT_FILE}. Results of every record: {folder / RESULT_FILE}."
        )
    )


def print_result_tables(result: dict[str, Any]) -> None:
    """Print a result as sentences and tables."""
    from service.evaluation import report_text

    for line in report_text.sentences(result):
        out.print(strip_control_chars(line))
    if rows := report_text.checkpoint_rows(result):
        out.print(table("", report_text.CHECKPOINT_COLUMNS, rows))
        out.print()
    if rows := report_text.age_rows(result):
        out.print(table("", report_text.AGE_COLUMNS, rows))
        out.print()
    columns = report_text.MEASURE_COLUMNS
    out.print(format_list(columns, report_text.measure_rows(result), columns[-1:]))
