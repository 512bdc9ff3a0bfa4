"""`study`: what many facts say together. Computed here, from stored runs; a study that was interrupted goes on where it was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cli.flags import read_settings
from cli.local import resident, shown, table_of
from cli.screen import err, out, plain, table
from service import drawing
from service.drawing import Draw
from service.kept import Folder
from service.settings import Settings
from service.studies import trace_report
from service.studies.facts import read_study_facts

RUNS, DPI = "runs", 200


def run(args: argparse.Namespace) -> int:
    """One of the studies."""
    return {"trace": trace}[args.verb](args, read_settings(args, Settings))


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
    for line in trace_report.sentences(study):
        out.print(plain(line))
    out.print(table("", trace_report.COLUMNS, trace_report.rows(study)))
    said(folder)
    return 0


def written(folder: Path, study: Mapping[str, Any], figures: Mapping[str, Draw], page: str) -> None:
    """The study as JSON, its figures as PNG and as SVG, and its page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(study, indent=1), encoding="utf-8")
    for name, draw in figures.items():
        (folder / f"{name}.png").write_bytes(drawing.png(draw, DPI))
        (folder / f"{name}.svg").write_text(drawing.svg(draw, name), encoding="utf-8")
    (folder / "report.html").write_text(page, encoding="utf-8")


def said(folder: Path) -> None:
    err.print(
        plain(f"{folder / 'report.html'} has the figures and the words, {folder / 'study.json'} the numbers.")
    )
