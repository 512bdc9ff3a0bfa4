"""`export` and `import`: a version for use elsewhere, and edits that come from elsewhere."""

from __future__ import annotations

import argparse
import tempfile
import zipfile
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import IO

from cli.client import Client
from cli.edits import fact_text, status_text, wait_for_job
from cli.flags import read_settings
from cli.local_model import load_served_model
from cli.terminal import err, format_list, out, print_json, progress_bar, strip_control_chars
from service.bootstrap import open_database
from service.errors import InvalidInput, Misconfigured
from service.ledger.read_only import ReadOnlyLedger
from service.settings import Settings

#: what the running service makes; "model" is made here
SERVICE_FORMATS = ("peft", "safetensors", "edits")


def export_version(args: argparse.Namespace, client: Client) -> int:
    """A folder with an adapter, or a file."""
    if args.format == "peft":
        _require_empty(Path(args.out))
    with tempfile.TemporaryFile() as file:
        with progress_bar() as display:
            display.update("the service makes the export", 0, 0)
            name = client.download("/export", file, version=args.version, format=args.format)
        file.seek(0)
        path = (
            _extract_zip(file, Path(args.out))
            if args.format == "peft"
            else _save_file(file, Path(args.out), name)
        )
    err.print(strip_control_chars(f"{_FORMAT_NAMES[args.format]} of version {args.version} is in {path}."))
    return _print_export(args, args.version, path)


_FORMAT_NAMES = {"peft": "The LoRA adapter", "safetensors": "The edited weights", "edits": "The set of edits"}


def _require_empty(folder: Path) -> None:
    """What is in a folder already would be mixed with what comes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"--out {str(folder)!r} is there already: name a new or an empty folder.")


def _extract_zip(file: IO[bytes], folder: Path) -> Path:
    """The files of a zip in a folder; only plain names are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if Path(member.filename).name != member.filename:
                raise InvalidInput(
                    f"the service sent a file with the name {member.filename!r}: nothing more is unpacked."
                )
            archive.extract(member, folder)
    return folder


def _save_file(file: IO[bytes], path: Path, name: str) -> Path:
    """A file under its own name in a folder, or under the name that was given."""
    target = path / name if path.is_dir() and name else path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".part")
    with temporary.open("wb") as output:
        while chunk := file.read(2**20):
            output.write(chunk)
    temporary.replace(target)
    return target


def run(args: argparse.Namespace) -> int:
    """The whole model at a version, made here from the base model and the ledger. Only reads, both."""
    settings, folder = read_settings(args, Settings), Path(args.out)
    _require_empty(folder)
    model = load_served_model(settings)
    from service.engine.versioned_model import VersionedModel
    from service.exporting.export_job import write_model
    from workers.model_info import device_kind

    with closing(open_database(settings)) as database:
        reader = ReadOnlyLedger(database, model.fingerprint, device_kind(model.device))
        version = reader.resolve_version(args.version)
        manifest = write_model(VersionedModel(model, reader, reader.attest), version, folder)
    err.print(
        strip_control_chars(
            f"{model.name} at version {version}, with {len(manifest['edits'])} edits in its weights, is in {folder}. "
            f"{'A worker has the same bytes.' if reader.confirmed else 'No worker has said yet what its bytes are.'}"
        )
    )
    return _print_export(args, version, folder)


def _print_export(args: argparse.Namespace, version: int | str, path: Path) -> int:
    """Where the export is, alone on stdout."""
    if args.json:
        print_json({"format": args.format, "version": version, "path": str(path)})
    else:
        out.print(str(path))
    return 0


def import_edits(args: argparse.Namespace, client: Client) -> int:
    """Land the edits of a file, and say what became of each."""
    try:
        data = Path(args.file).read_bytes()
    except OSError as error:
        raise Misconfigured(f"{args.file!r} cannot be read: {error.strerror or error}.") from None
    response = client.upload("/import", data)
    already_present = set(response["known"])
    edits = [
        e if e["status"] not in ("queued", "running") else wait_for_job(client, e) for e in response["items"]
    ]
    if args.json:
        print_json([{**e, "known": e["id"] in already_present} for e in edits])
    else:
        rows = [
            (
                e["id"],
                "here before" if e["id"] in already_present else status_text(e),
                e.get("version"),
                fact_text(e),
            )
            for e in edits
        ]
        out.print(format_list(("id", "status", "version", "fact"), rows, ("fact",)))
    not_applied = [
        e for e in edits if e["id"] not in already_present and e["status"] not in ("applied", "superseded")
    ]
    for e in not_applied:
        reason = (
            (e.get("error") or {}).get("detail")
            or (e.get("result") or {}).get("reason")
            or "see palimpsest edits"
        )
        err.print(strip_control_chars(f"{e['id']} is {e['status']}: {reason}"))
    counts = Counter("here before" if e["id"] in already_present else e["status"] for e in edits)
    err.print(", ".join(f"{count} {what}" for what, count in counts.items()) + ".")
    return 1 if not_applied else 0
