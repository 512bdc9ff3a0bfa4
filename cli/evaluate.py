"""`evaluate`: how good edits are on a set of records. Computed here; an evaluation that was interrupted goes on where it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cli.edits import parse_hparam
from cli.flags import read_settings
from cli.local_model import load_served_model, resolve_source, run_with_progress_bar
from cli.terminal import err, format_list, out, print_json, strip_control_chars, table
from service.datasets.loading import load_records
from service.datasets.parsing import SKIP_DESCRIPTIONS
from service.datasets.record import Record, true_statements
from service.errors import InvalidInput
from service.evaluation import report, report_figures, report_text
from service.kit import plotting
from service.kit.artifact_store import DirectoryStore
from service.schemas import EvaluationPlan
from service.settings import Settings

ARTIFACTS_DIR, RESULT_FILE, REPORT_FILE, DPI = "kept", "result.json", "report.html", 200
MIN_DAMAGE_TEXTS = 32  # statements of other records: with fewer of them the model's corpus is the plain text
MAX_OTHER_RECORDS = 1000  # of which as many are looked at


def run(args: argparse.Namespace) -> int:
    """Evaluate, write result and report, and say what came of it."""
    settings, plan = read_settings(args, Settings), build_plan(args)
    dataset = load_records(resolve_source(args.source, settings.model), plan.seed)
    records = select_records(dataset.records, args)
    damage_texts = load_damage_texts(args, dataset.records, records)
    comparisons = [load_result(Path(name)) for name in args.beside or ()]
    for reason, number in dataset.skipped.items():
        err.print(strip_control_chars(f"{number} records are skipped: {SKIP_DESCRIPTIONS[reason]}."))
    result = run_evaluation(settings, plan, records, damage_texts, Path(args.out))
    write_report(Path(args.out), [result, *comparisons])
    print_result(result, Path(args.out), args.json)
    return 0


def build_plan(args: argparse.Namespace) -> EvaluationPlan:
    """What the flags say of the plan; what they leave out is as the plan has it."""
    names = ("method", "objective", "mode", "found_on", "together", "plain", "seed")
    fields: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("checkpoints", "strengths"):
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
    """The records that are edited: one half, one of each subject, the first ones; as the flags say."""
    splits = {"all": slice(None), "tune": slice(0, None, 2), "test": slice(1, None, 2)}
    selection = list(records[splits[args.half]])
    if args.distinct:
        selection = list({r.subject: r for r in reversed(selection)}.values())[::-1]
    return selection[: args.limit]


def load_damage_texts(
    args: argparse.Namespace, records: Sequence[Record], edited: Sequence[Record]
) -> tuple[str, list[str]] | None:
    """A file's lines; or statements of facts that are not edited; or, where there are few, None: the model's corpus."""
    if args.texts:
        try:
            lines = Path(args.texts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise InvalidInput(f"the texts {args.texts!r} cannot be read: {error}") from None
        return f"the file {Path(args.texts).name}", [line for line in lines if line.strip()]
    other_texts = other_statements(records, edited)
    return (
        ("statements of facts that are not edited", other_texts)
        if len(other_texts) >= MIN_DAMAGE_TEXTS
        else None
    )


def other_statements(records: Sequence[Record], edited: Sequence[Record]) -> list[str]:
    """Statements of records of other subjects than those that are edited."""
    subjects = {r.subject for r in edited}
    return true_statements([r for r in records if r.subject not in subjects][:MAX_OTHER_RECORDS])


def run_evaluation(
    settings: Settings,
    plan: EvaluationPlan,
    records: Sequence[Record],
    damage_texts: tuple[str, list[str]] | None,
    folder: Path,
) -> dict[str, Any]:
    """Load the model, prepare its tools and carry out the plan, under a bar."""
    model = load_served_model(settings)
    from service.covariance.corpus import Corpus
    from service.editing.context import build_editor_context
    from service.engine.versioned_model import EmptyLedger, VersionedModel
    from service.evaluation.runner import run_evaluation

    statistics = settings.data_dir / "statistics"
    context = run_with_progress_bar(
        build_editor_context(model, statistics, settings.corpus, settings.covariance_tokens)
    )
    corpus = Corpus(damage_texts[0], tuple(damage_texts[1])) if damage_texts else None
    replica, store = VersionedModel(model, EmptyLedger()), DirectoryStore(folder / ARTIFACTS_DIR)
    return run_with_progress_bar(run_evaluation(replica, context, plan, records, store, corpus))


def load_result(path: Path) -> dict[str, Any]:
    """The result of another evaluation, by its file or its folder."""
    file = path / RESULT_FILE if path.is_dir() else path
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        report_text.title([result])
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidInput(f"{str(path)!r} holds no result of an evaluation: name its folder.") from None
    return result  # type: ignore[no-any-return]


def write_report(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """The first result as JSON; the figures and the page of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).write_text(json.dumps(results[0], indent=1), encoding="utf-8")
    for name, draw in report_figures.figures(results).items():
        (folder / f"{name}.png").write_bytes(plotting.render_png(draw, DPI))
    (folder / REPORT_FILE).write_text(report.page(results), encoding="utf-8")


def print_result(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The result on stdout, and where there is more of it."""
    if as_json:
        print_json(result)
    else:
        print_result_tables(result)
    err.print(
        strip_control_chars(
            f"{folder / REPORT_FILE} has the figures and the words, {folder / RESULT_FILE} every record."
        )
    )


def print_result_tables(result: dict[str, Any]) -> None:
    """The result in words and tables."""
    for line in report_text.sentences(result):
        out.print(strip_control_chars(line))
    if rows := report_text.checkpoint_rows(result):
        out.print(table("", report_text.CHECKPOINT_COLUMNS, rows))
        out.print()
    columns = report_text.MEASURE_COLUMNS
    out.print(format_list(columns, report_text.measure_rows(result), columns[-1:]))
