"""`study`: what many facts say together. Computed here, from stored runs; a study that was interrupted goes on where it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.edits import hparam
from cli.flags import read_settings
from cli.local_model import resident, shown, table_of
from cli.terminal import err, out, plain, print_json, table
from service.datasets.records import read_records
from service.errors import InvalidInput
from service.kit import plotting
from service.kit.artifact_store import Folder
from service.kit.plotting import Draw
from service.recipes.recipe import METHODS
from service.settings import Settings
from service.studies import localization_report, trace_report
from service.studies.edit_objectives import PROBLEMS
from service.studies.facts import read_study_facts

RUNS, DPI = "runs", 200


def run(args: argparse.Namespace) -> int:
    """One of the studies."""
    return {"trace": trace, "localization": localization}[args.verb](args, read_settings(args, Settings))


def trace(args: argparse.Namespace, settings: Settings) -> int:
    """Effects of many facts by what a token is to its prompt."""
    facts = read_study_facts(table_of(args.source, settings.model), args.seed)
    model = resident(settings)
    from service.studies.traces import TracePlan, trace_study_steps, usual_window

    window = args.window or usual_window(model.layers)
    plan = TracePlan(window=window, samples=args.samples, noise=args.noise, severed=not args.whole)
    folder = Path(args.out)
    study = shown(trace_study_steps(model, facts, plan, Folder(folder / RUNS), args.limit))
    written(folder, study, trace_report.figures(study), trace_report.page(study))
    tables = [(trace_report.COLUMNS, trace_report.rows(study))]
    said(args, folder, study, trace_report.sentences(study), tables)
    return 0


def localization(args: argparse.Namespace, settings: Settings) -> int:
    """Every fact edited at every layer, and traced."""
    methods, problems = (
        chosen(args.methods, tuple(METHODS), "--methods"),
        chosen(args.objectives, tuple(PROBLEMS), "--objectives"),
    )
    hparams = hparams_of(args.hparam or (), methods)
    records = read_records(table_of(args.source, settings.model), args.seed)
    model = resident(settings)
    from service.editing.context import prepare_steps
    from service.engine.versioned_model import NoLedger, Replica
    from service.studies.localization import LocalizationPlan, localization_steps

    layers = layers_of(args.layers, model.layers)
    plan = LocalizationPlan(layers, methods, problems, hparams, args.samples, args.noise)
    statistics = settings.data / "statistics"
    toolkit = shown(prepare_steps(model, statistics, settings.corpus, settings.stat_tokens))
    folder, replica = Path(args.out), Replica(model, NoLedger())
    study = shown(localization_steps(replica, toolkit, plan, records, Folder(folder / RUNS), args.limit))
    written(folder, study, localization_report.figures(study), localization_report.page(study))
    tables = [
        (localization_report.REGRESSIONS, localization_report.regressions(study)),
        (localization_report.CHOICES, localization_report.choices(study)),
    ]
    said(args, folder, study, localization_report.sentences(study), tables)
    return 0


def chosen(given: str, known: Sequence[str], option: str) -> tuple[str, ...]:
    """The names in a list, each of which is known."""
    names = tuple(dict.fromkeys(given.split(",")))
    if wrong := [name for name in names if name not in known]:
        raise InvalidInput(f"{option}: there is no {wrong[0]!r}; known: {', '.join(known)}.")
    return names


def layers_of(given: str, layers: int) -> tuple[int, ...]:
    """`all`, or numbers with commas."""
    try:
        found = tuple(range(layers)) if given == "all" else tuple(sorted({int(x) for x in given.split(",")}))
    except ValueError:
        found = ()
    if not found or not 0 <= found[0] <= found[-1] < layers:
        raise InvalidInput(f"--layers {given!r}: write all, or some from 0 to {layers - 1} such as 0,2,5.")
    return found


def hparams_of(given: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By method: `rome.steps=20` is for one of them, `steps=20` for all."""
    found: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for text in given:
        name, value = hparam(text)
        method, _, own = name.rpartition(".")
        if method and method not in found:
            raise InvalidInput(f"--hparam {text!r}: {method!r} is none of the methods {', '.join(methods)}.")
        for some in [method] if method else methods:
            found[some][own] = value
    return found


def written(folder: Path, study: Mapping[str, Any], figures: Mapping[str, Draw], page: str) -> None:
    """The study as JSON, its figures as PNG and as SVG, and its page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study, indent=1), encoding="utf-8")
    for name, draw in figures.items():
        (folder / f"{name}.png").write_bytes(plotting.png(draw, DPI))
        (folder / f"{name}.svg").write_text(plotting.svg(draw, name), encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")


def said(
    args: argparse.Namespace,
    folder: Path,
    study: Mapping[str, Any],
    sentences: Sequence[str],
    tables: Sequence[tuple[Sequence[str], Sequence[Sequence[Any]]]],
) -> None:
    """The study on stdout, in words and tables or as JSON, and where there is more of it."""
    if args.json:
        print_json(study)
    else:
        for line in sentences:
            out.print(plain(line))
        for columns, rows in tables:
            out.print(table("", columns, rows))
    err.print(
        plain(f"{folder / 'report.html'} has the figures and the words, {folder / 'study.json'} the numbers.")
    )
