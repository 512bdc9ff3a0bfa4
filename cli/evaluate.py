"""`evaluate`: how good edits are on a set of records. Computed here; an evaluation that was interrupted goes on where it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cli.edits import hparam
from cli.flags import read_settings
from cli.local_model import resident, shown, table_of
from cli.terminal import err, listing, out, plain, print_json, table
from service.datasets.records import Record, read, statements
from service.errors import InvalidInput
from service.evaluation import report
from service.kit import plotting
from service.kit.artifact_store import Folder
from service.schemas import EvaluationPlan
from service.settings import Settings

KEPT, RESULT, PAGE, DPI = "kept", "result.json", "report.html", 200
ENOUGH = 32  # statements of other records: with fewer of them the model's corpus is the plain text
OTHERS = 1000  # of which as many are looked at


def run(args: argparse.Namespace) -> int:
    """Evaluate, write result and report, and say what came of it."""
    settings, plan = read_settings(args, Settings), plan_of(args)
    reading = read(table_of(args.source, settings.model), plan.seed)
    records = chosen(reading.records, args)
    texts = plain_of(args, reading.records, records)
    beside = [read_result(Path(name)) for name in args.beside or ()]
    for reason, number in reading.skipped.items():
        err.print(plain(f"{number} records are passed over: {reason}."))
    result = compute(settings, plan, records, texts, Path(args.out))
    written(Path(args.out), [result, *beside])
    said_of(result, Path(args.out), args.json)
    return 0


def plan_of(args: argparse.Namespace) -> EvaluationPlan:
    """What the flags say of the plan; what they leave out is as the plan has it."""
    names = ("method", "objective", "mode", "found_on", "together", "plain", "seed")
    asked: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for name in ("checkpoints", "strengths"):
        if given := getattr(args, name):
            asked[name] = given.split(",")
    if args.hparam:
        asked["hparams"] = dict(hparam(text) for text in args.hparam)
    try:
        return EvaluationPlan(**asked, generation=args.generation, damage=not args.no_damage)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from None


def chosen(records: Sequence[Record], args: argparse.Namespace) -> list[Record]:
    """The records that are edited: one half, one of each subject, the first ones; as the flags say."""
    halves = {"all": slice(None), "tune": slice(0, None, 2), "test": slice(1, None, 2)}
    found = list(records[halves[args.half]])
    if args.distinct:
        found = list({r.subject: r for r in reversed(found)}.values())[::-1]
    return found[: args.limit]


def plain_of(
    args: argparse.Namespace, records: Sequence[Record], edited: Sequence[Record]
) -> tuple[str, list[str]] | None:
    """A file's lines; or statements of facts that are not edited; or, where there are few, None: the model's corpus."""
    if args.texts:
        try:
            lines = Path(args.texts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise InvalidInput(f"the texts {args.texts!r} cannot be read: {error}") from None
        return f"the file {Path(args.texts).name}", [line for line in lines if line.strip()]
    others = others_of(records, edited)
    return ("statements of facts that are not edited", others) if len(others) >= ENOUGH else None


def others_of(records: Sequence[Record], edited: Sequence[Record]) -> list[str]:
    """Statements of records of other subjects than those that are edited."""
    subjects = {r.subject for r in edited}
    return statements([r for r in records if r.subject not in subjects][:OTHERS])


def compute(
    settings: Settings,
    plan: EvaluationPlan,
    records: Sequence[Record],
    texts: tuple[str, list[str]] | None,
    folder: Path,
) -> dict[str, Any]:
    """Load the model, prepare its tools and carry out the plan, under a bar."""
    model = resident(settings)
    from service.covariance.corpus import Corpus
    from service.editing.context import prepare_steps
    from service.engine.versioned_model import NoLedger, Replica
    from service.evaluation.runner import evaluate_steps

    statistics = settings.data / "statistics"
    toolkit = shown(prepare_steps(model, statistics, settings.corpus, settings.stat_tokens))
    plain = Corpus(texts[0], tuple(texts[1])) if texts else None
    replica, kept = Replica(model, NoLedger()), Folder(folder / KEPT)
    return shown(evaluate_steps(replica, toolkit, plan, records, kept, plain))


def read_result(path: Path) -> dict[str, Any]:
    """The result of another evaluation, by its file or its folder."""
    file = path / RESULT if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        report.title([found])
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidInput(f"{str(path)!r} holds no result of an evaluation: name its folder.") from None
    return found  # type: ignore[no-any-return]


def written(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """The first result as JSON; the figures and the page of all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(results[0], indent=1), encoding="utf-8")
    for name, draw in report.figures(results).items():
        (folder / f"{name}.png").write_bytes(plotting.png(draw, DPI))
    (folder / PAGE).write_text(report.page(results), encoding="utf-8")


def said_of(result: dict[str, Any], folder: Path, as_json: bool) -> None:
    """The result on stdout, and where there is more of it."""
    if as_json:
        print_json(result)
    else:
        show(result)
    err.print(plain(f"{folder / PAGE} has the figures and the words, {folder / RESULT} every record."))


def show(result: dict[str, Any]) -> None:
    """The result in words and tables."""
    for line in report.sentences(result):
        out.print(plain(line))
    if rows := report.checkpoint_rows(result):
        out.print(table("", report.CHECKPOINT_COLUMNS, rows))
        out.print()
    columns = report.MEASURE_COLUMNS
    out.print(listing(columns, report.measure_rows(result), columns[-1:]))
