"""`palimpsest export`: save a version as an adapter, as edited weights, as a model or as a set of edits."""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cli.client import add_connection_flags, run_with_client
from cli.existing_database import open_existing_database
from cli.flags import add_command, add_json_flag, add_setting_flags, add_version_flag, read_settings
from cli.local_model import MODEL_SETTINGS, load_served_model
from cli.terminal import err, out, print_json, progress_bar, strip_control_chars
from palimpsest import Client
from service.errors import InvalidInput
from service.settings import Settings

if TYPE_CHECKING:
    from service.db.database import Database
    from service.models.loading import LoadedModel

FORMAT_NAMES = {
    "peft": "The LoRA adapter",
    "safetensors": "The file of edited weights",
    "edits": "The set of edits",
}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "export",
        run,
        description="Save a version of the model for use elsewhere. The service makes the file. "
        "`--format model` runs without the service: it reads the base model and the database.",
    )
    add_version_flag(parser)
    parser.add_argument(
        "--format",
        choices=["peft", "model", "safetensors", "edits"],
        default="peft",
        help="peft: a LoRA adapter; model: a complete model for from_pretrained; safetensors: the edited weights; "
        "edits: a file for `palimpsest import` (default: peft)",
    )
    parser.add_argument(
        "--out", metavar="PATH", required=True, help="new or empty folder; a file for safetensors and edits"
    )
    parser.add_argument(
        "--solve-gated",
        action="store_true",
        help="solve gated edits into the weights of the export, and measure how far it differs from the service",
    )
    add_json_flag(parser)
    add_connection_flags(parser)
    model = parser.add_argument_group("with --format model")
    add_setting_flags(model, Settings, *MODEL_SETTINGS, "data_dir", "database_url")


def run(args: argparse.Namespace) -> int:
    """Export a version."""
    return export_model(args) if args.format == "model" else run_with_client(export_version, args)


def export_version(args: argparse.Namespace, client: Client) -> int:
    """Export by the service: a folder with an adapter, or a file."""
    path = Path(args.out)
    if args.format == "peft":
        _require_empty(path)
    with tempfile.TemporaryFile() as file:
        with progress_bar() as display:
            display.update("export", 0, 0)
            name = client.export_to(file, args.version, args.format, solve_gated=args.solve_gated)
        file.seek(0)
        path = _extract_zip(file, path) if args.format == "peft" else _save_file(file, path, name)
    err.print(strip_control_chars(f"{FORMAT_NAMES[args.format]} of version {args.version} is in {path}."))
    return _print_export(args, args.version, path)


def _require_empty(folder: Path) -> None:
    """Raise `InvalidInput` unless the folder is new or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"--out {str(folder)!r} exists and is not an empty folder: name a new one.")


def _extract_zip(file: IO[bytes], folder: Path) -> Path:
    """Extract a zip into a folder. Names with a path are rejected."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if Path(member.filename).name != member.filename:
                raise InvalidInput(f"the export contains a file with the unsafe name {member.filename!r}.")
            archive.extract(member, folder)
    return folder


def _save_file(file: IO[bytes], path: Path, name: str) -> Path:
    """Save a file as `path`, or as `name` inside the folder `path`."""
    target = path / name if path.is_dir() and name else path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    with temporary.open("wb") as output:
        while chunk := file.read(2**20):
            output.write(chunk)
    temporary.replace(target)
    return target


def export_model(args: argparse.Namespace) -> int:
    """Export a complete model in this process, from the base model and the ledger. Both are only read."""
    settings = read_settings(args, Settings)
    _require_empty(Path(args.out))
    database = open_existing_database(settings)  # before the model, which takes longer
    with closing(database):
        model = load_served_model(settings)
        return _export_from(database, model, args)


def _export_from(database: Database, model: LoadedModel, args: argparse.Namespace) -> int:
    """Write the model at the version that the ledger of the database describes."""
    from service.engine.versioned_model import VersionedModel
    from service.exporting.export_job import write_model
    from service.ledger.read_only import ReadOnlyLedger
    from workers.model_info import device_kind

    folder = Path(args.out)
    reader = ReadOnlyLedger(database, model.fingerprint, device_kind(model))
    version = reader.resolve_version(args.version)
    replica = VersionedModel(model, reader, reader.attest)
    manifest = write_model(replica, version, folder, solve_gated=args.solve_gated)
    confirmation = (
        "Its weights match the digest of a worker."
        if reader.confirmed
        else "No worker has reported the digest of this version yet."
    )
    err.print(
        strip_control_chars(
            f"{model.name} at version {version} with {len(manifest['edits'])} edits is in {folder}. {confirmation}"
        )
    )
    return _print_export(args, version, folder)


def _print_export(args: argparse.Namespace, version: int | str, path: Path) -> int:
    """Print the path of the export."""
    if args.json:
        print_json({"format": args.format, "version": version, "path": str(path)})
    else:
        out.print(str(path))
    return 0
