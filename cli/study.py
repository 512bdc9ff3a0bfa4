"""`study`: what many facts say together. Computed here, from stored runs; a study that was interrupted goes on where it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli.edits import parse_hparam
from cli.flags import read_settings
from cli.local_model import load_served_model, resolve_source, run_with_progress_bar
from cli.terminal import err, out, print_json, strip_control_chars, table
from service.datasets.loading import read_records
from service.errors import InvalidInput
from service.kit import plotting
from service.kit.artifact_store import DirectoryStore
from service.kit.plotting import DrawFunction
from service.methods.registry import METHODS
from service.settings import Settings
from service.studies import localization_report, trace_report
from service.studies.edit_objectives import STUDY_OBJECTIVES
from service.studies.facts import read_study_facts

RUNS_DIR, DPI = "runs", 200


def run(args: argparse.Namespace) -> int:
    """One of the studies."""
    return {"trace": run_trace_study, "localization": run_localization_study}[args.verb](
        args, read_settings(args, Settings)
    )


def run_trace_study(args: argparse.Namespace, settings: Settings) -> int:
    """Effects of many facts by what a token is to its prompt."""
    facts = read_study_facts(resolve_source(args.source, settings.model), args.seed)
    model = load_served_model(settings)
    from service.studies.traces import TracePlan, default_window, run_trace_study

    window = args.window or default_window(model.num_layers)
    plan = TracePlan(window=window, samples=args.samples, noise=args.noise, severed=not args.whole)
    folder = Path(args.out)
    study = run_with_progress_bar(
        run_trace_study(model, facts, plan, DirectoryStore(folder / RUNS_DIR), args.limit)
    )
    write_study(folder, study, trace_report.figures(study), trace_report.page(study))
    tables = [(trace_report.TABLE_COLUMNS, trace_report.table_rows(study))]
    print_study(args, folder, study, trace_report.sentences(study), tables)
    return 0


def run_localization_study(args: argparse.Namespace, settings: Settings) -> int:
    """Every fact edited at every layer, and traced."""
    methods, problems = (
        parse_names(args.methods, tuple(METHODS), "--methods"),
        parse_names(args.objectives, tuple(STUDY_OBJECTIVES), "--objectives"),
    )
    hparams = parse_hparams(args.hparam or (), methods)
    records = read_records(resolve_source(args.source, settings.model), args.seed)
    model = load_served_model(settings)
    from service.editing.context import build_editor_context
    from service.engine.versioned_model import EmptyLedger, VersionedModel
    from service.studies.localization import LocalizationPlan, run_localization_study

    layers = parse_layers(args.layers, model.num_layers)
    plan = LocalizationPlan(layers, methods, problems, hparams, args.samples, args.noise)
    statistics = settings.data_dir / "statistics"
    context = run_with_progress_bar(
        build_editor_context(model, statistics, settings.corpus, settings.covariance_tokens)
    )
    folder, replica = Path(args.out), VersionedModel(model, EmptyLedger())
    study = run_with_progress_bar(
        run_localization_study(replica, context, plan, records, DirectoryStore(folder / RUNS_DIR), args.limit)
    )
    write_study(folder, study, localization_report.figures(study), localization_report.page(study))
    tables = [
        (localization_report.REGRESSION_COLUMNS, localization_report.regression_rows(study)),
        (localization_report.CHOICE_COLUMNS, localization_report.choice_rows(study)),
    ]
    print_study(args, folder, study, localization_report.sentences(study), tables)
    return 0


def parse_names(text: str, allowed: Sequence[str], option: str) -> tuple[str, ...]:
    """The names in a list, each of which is known."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in allowed]:
        raise InvalidInput(f"{option}: there is no {unknown[0]!r}; known: {', '.join(allowed)}.")
    return names


def parse_layers(text: str, layers: int) -> tuple[int, ...]:
    """`all`, or numbers with commas."""
    try:
        selection = (
            tuple(range(layers)) if text == "all" else tuple(sorted({int(x) for x in text.split(",")}))
        )
    except ValueError:
        selection = ()
    if not selection or not 0 <= selection[0] <= selection[-1] < layers:
        raise InvalidInput(f"--layers {text!r}: write all, or some from 0 to {layers - 1} such as 0,2,5.")
    return selection


def parse_hparams(texts: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By method: `rome.steps=20` is for one of them, `steps=20` for all."""
    by_method: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for text in texts:
        name, value = parse_hparam(text)
        method, _, hparam_name = name.rpartition(".")
        if method and method not in by_method:
            raise InvalidInput(f"--hparam {text!r}: {method!r} is none of the methods {', '.join(methods)}.")
        for target in [method] if method else methods:
            by_method[target][hparam_name] = value
    return by_method


def write_study(
    folder: Path, study: Mapping[str, Any], figures: Mapping[str, DrawFunction], page: str
) -> None:
    """The study as JSON, its figures as PNG and as SVG, and its page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study, indent=1), encoding="utf-8")
    for name, draw in figures.items():
        (folder / f"{name}.png").write_bytes(plotting.render_png(draw, DPI))
        (folder / f"{name}.svg").write_text(plotting.render_svg(draw, name), encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")


def print_study(
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
            out.print(strip_control_chars(line))
        for columns, rows in tables:
            out.print(table("", columns, rows))
    err.print(
        strip_control_chars(
            f"{folder / 'report.html'} has the figures and the words, {folder / 'study.json'} the numbers."
        )
    )
