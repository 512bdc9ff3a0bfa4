"""`palimpsest study`: trace or edit many facts, and aggregate the results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.edit_output import parse_hparam
from cli.flags import add_command, add_json_flag, add_setting_flags, positive_int, read_settings
from cli.local_model import MODEL_SETTINGS, load_served_model, resolve_source, run_with_progress_bar
from cli.overview import summary_of
from cli.terminal import err, out, print_json, strip_control_chars, table
from service.errors import InvalidInput
from service.methods.registry import METHODS
from service.settings import Settings

if TYPE_CHECKING:
    from service.kit.plotting import DrawFunction

RUNS_DIR, DPI = "runs", 200


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands."""
    parser = commands.add_parser(
        "study",
        help=summary_of("study"),
        description="Trace or edit many facts and aggregate the results. The model is loaded in this process; an interrupted "
        "study resumes.",
    )
    verbs = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    trace = add_command(verbs, "trace", run_trace_study, "average causal traces by token position and layer")
    _add_common_flags(trace)
    _add_noise_flags(trace)
    trace.add_argument(
        "--window",
        type=positive_int,
        metavar="N",
        help="number of layers restored at once for mlp and attn (default: a fifth of the layers, at most 10)",
    )
    trace.add_argument("--no-severed", action="store_true", help="do not trace with severed paths")
    add_setting_flags(trace.add_argument_group("recipe"), Settings, "data_dir")
    localization = add_command(
        verbs,
        "localization",
        run_localization_study,
        "compare the layers that tracing finds with the layers where edits succeed",
    )
    _add_common_flags(localization)
    _add_noise_flags(localization)
    add = localization.add_argument
    add("--layers", metavar="N,...", default="all", help="layers to edit (default: all)")
    add(
        "--methods",
        metavar="NAME,...",
        default="rome,ft",
        help=f"editing methods, some of {','.join(METHODS)} (default: rome,ft)",
    )
    add(
        "--objectives",
        metavar="NAME,...",
        default="write",
        help="some of write,erase,amplify,reversal,forcing (default: write)",
    )
    add(
        "--hparam",
        metavar="[METHOD.]NAME=VALUE",
        action="append",
        help="set a hyperparameter of one method or of all; repeatable",
    )
    statistics = localization.add_argument_group("statistics")
    add_setting_flags(statistics, Settings, "data_dir", "corpus", "covariance_tokens")
    neurons = add_command(
        verbs, "neurons", run_neuron_study, "find the neurons that carry facts, and switch them off and up"
    )
    _add_common_flags(neurons)
    neurons.add_argument(
        "--nodes",
        type=positive_int,
        default=50,
        metavar="N",
        help="midpoints of the integral of the gradient (default: 50)",
    )
    neurons.add_argument(
        "--wordings",
        type=positive_int,
        default=5,
        metavar="N",
        help="maximum number of wordings of a fact (default: 5)",
    )
    add_setting_flags(neurons.add_argument_group("recipe"), Settings, "data_dir")


def _add_common_flags(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(
        resume_hint="The same command continues: what was measured is stored in the folder of --out."
    )
    add = parser.add_argument
    add(
        "source",
        metavar="FILE",
        help="file of records or known facts, or `facts` for the fact table of the model",
    )
    add("--out", metavar="FOLDER", required=True, help="folder of the runs, the figures and the report")
    add("--limit", type=positive_int, metavar="N", help="maximum number of facts (default: all)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the order of the facts (default: 0)")
    add_setting_flags(parser.add_argument_group("model"), Settings, *MODEL_SETTINGS)
    add_json_flag(parser)


def _add_noise_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--samples",
        type=positive_int,
        default=10,
        metavar="N",
        help="noise samples of each trace (default: 10)",
    )
    add(
        "--noise",
        default="3sigma",
        metavar="NOISE",
        help="standard deviation of the noise, or a multiple of that of the subject embeddings (default: 3sigma)",
    )


def run_trace_study(args: argparse.Namespace) -> int:
    """Trace many facts and average the effects by the role of each token in its prompt."""
    from service.kit.artifact_store import DirectoryStore
    from service.studies import trace_report
    from service.studies.facts import read_study_facts

    settings = read_settings(args, Settings)
    facts = read_study_facts(resolve_source(args.source, settings), args.seed)
    model = load_served_model(settings)
    from service.studies.traces import TracePlan, default_window, run_trace_study

    window = args.window or default_window(model.num_layers)
    plan = TracePlan(window=window, samples=args.samples, noise=args.noise, severed=not args.no_severed)
    folder = Path(args.out)
    study = run_with_progress_bar(
        run_trace_study(model, facts, plan, DirectoryStore(folder / RUNS_DIR), args.limit)
    )
    write_study(folder, study, trace_report.figures(study), trace_report.page(study))
    tables = [(trace_report.TABLE_COLUMNS, trace_report.table_rows(study))]
    print_study(args, folder, study, trace_report.sentences(study), tables)
    return 0


def run_localization_study(args: argparse.Namespace) -> int:
    """Trace every fact, and edit it at every layer."""
    from service.datasets.loading import read_records
    from service.kit.artifact_store import DirectoryStore
    from service.studies import localization_report
    from service.studies.edit_objectives import STUDY_OBJECTIVES

    settings = read_settings(args, Settings)
    methods = parse_names(args.methods, tuple(METHODS), "--methods")
    problems = parse_names(args.objectives, tuple(STUDY_OBJECTIVES), "--objectives")
    hparams = parse_hparams(args.hparam or (), methods)
    records = read_records(resolve_source(args.source, settings), args.seed)
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


def run_neuron_study(args: argparse.Namespace) -> int:
    """Attribute many facts to neurons, switch the neurons, and average the effects."""
    from service.datasets.loading import read_records
    from service.kit.artifact_store import DirectoryStore
    from service.studies import neurons_report

    settings = read_settings(args, Settings)
    records = read_records(resolve_source(args.source, settings), args.seed)
    model = load_served_model(settings)
    from service.studies.neurons import NeuronPlan, study_neurons

    plan, folder = NeuronPlan(wordings=args.wordings, nodes=args.nodes), Path(args.out)
    study = run_with_progress_bar(
        study_neurons(model, records, plan, DirectoryStore(folder / RUNS_DIR), args.limit)
    )
    write_study(folder, study, neurons_report.figures(study), neurons_report.page(study))
    tables = [(neurons_report.TABLE_COLUMNS, neurons_report.neuron_rows(study))]
    print_study(args, folder, study, neurons_report.sentences(study), tables)
    return 0


def parse_names(text: str, allowed: Sequence[str], option: str) -> tuple[str, ...]:
    """Parse a comma-separated list of allowed names."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in allowed]:
        raise InvalidInput(f"{option}: {unknown[0]!r} is not one of {', '.join(allowed)}.")
    return names


def parse_layers(text: str, layers: int) -> tuple[int, ...]:
    """Parse `all` or a comma-separated list of layers."""
    try:
        selection = (
            tuple(range(layers)) if text == "all" else tuple(sorted({int(x) for x in text.split(",")}))
        )
    except ValueError:
        selection = ()
    if not selection or not 0 <= selection[0] <= selection[-1] < layers:
        raise InvalidInput(f"--layers {text!r}: use all, or numbers from 0 to {layers - 1} such as 0,2,5.")
    return selection


def parse_hparams(texts: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the hyperparameters of each method: `rome.steps=20` sets one method, `steps=20` all."""
    by_method: dict[str, dict[str, Any]] = {method: {} for method in methods}
    for text in texts:
        name, value = parse_hparam(text)
        method, _, hparam_name = name.rpartition(".")
        if method and method not in by_method:
            raise InvalidInput(
                f"--hparam {text!r}: {method!r} is not one of the methods {', '.join(methods)}."
            )
        for target in [method] if method else methods:
            by_method[target][hparam_name] = value
    return by_method


def write_study(
    folder: Path, study: Mapping[str, Any], figures: Mapping[str, DrawFunction], page: str
) -> None:
    """Write the study as JSON, its figures as PNG and SVG, and its report."""
    from service.kit import plotting

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
    """Print the study as sentences and tables or as JSON, and the paths of the files on stderr."""
    if args.json:
        print_json(study)
    else:
        for line in sentences:
            out.print(strip_control_chars(line))
        for columns, rows in tables:
            out.print(table("", columns, rows))
    err.print(strip_control_chars(f"Report: {folder / 'report.html'}. Data: {folder / 'study.json'}."))
