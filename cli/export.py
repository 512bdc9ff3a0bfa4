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
from cli.edits import fact, follow, state
from cli.flags import read_settings
from cli.local_model import resident
from cli.terminal import bar, err, listing, out, plain, print_json
from service.bootstrap import open_database
from service.errors import InvalidInput, Misconfigured
from service.ledger.read_only import Reader
from service.settings import Settings

#: what the running service makes; "model" is made here
REMOTE = ("peft", "safetensors", "edits")


def export(args: argparse.Namespace, client: Client) -> int:
    """A folder with an adapter, or a file."""
    if args.format == "peft":
        _check_free(Path(args.out))
    with tempfile.TemporaryFile() as file:
        with bar() as shown:
            shown.show("the service makes the export", 0, 0)
            name = client.file("/export", file, version=args.version, format=args.format)
        file.seek(0)
        where = (
            _unpacked(file, Path(args.out)) if args.format == "peft" else _kept(file, Path(args.out), name)
        )
    err.print(plain(f"{_WHAT[args.format]} of version {args.version} is in {where}."))
    return _made(args, args.version, where)


_WHAT = {"peft": "The LoRA adapter", "safetensors": "The edited weights", "edits": "The set of edits"}


def _check_free(folder: Path) -> None:
    """What is in a folder already would be mixed with what comes."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"--out {str(folder)!r} is there already: name a new or an empty folder.")


def _unpacked(file: IO[bytes], folder: Path) -> Path:
    """The files of a zip in a folder; only plain names are taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file) as archive:
        for told in archive.infolist():
            if Path(told.filename).name != told.filename:
                raise InvalidInput(
                    f"the service sent a file with the name {told.filename!r}: nothing more is unpacked."
                )
            archive.extract(told, folder)
    return folder


def _kept(file: IO[bytes], path: Path, name: str) -> Path:
    """A file under its own name in a folder, or under the name that was given."""
    where = path / name if path.is_dir() and name else path
    where.parent.mkdir(parents=True, exist_ok=True)
    part = where.with_name(where.name + ".part")
    with part.open("wb") as kept:
        while piece := file.read(2**20):
            kept.write(piece)
    part.replace(where)
    return where


def run(args: argparse.Namespace) -> int:
    """The whole model at a version, made here from the base model and the ledger. Only reads, both."""
    settings, folder = read_settings(args, Settings), Path(args.out)
    _check_free(folder)
    model = resident(settings)
    from service.engine.versioned_model import Replica
    from service.exporting.export_job import write_model
    from workers.model_info import device_kind

    with closing(open_database(settings)) as database:
        reader = Reader(database, model.fingerprint, device_kind(model.device))
        version = reader.number(args.version)
        told = write_model(Replica(model, reader), version, folder)
    err.print(
        plain(
            f"{model.name} at version {version}, with {len(told['edits'])} edits in its weights, is in {folder}. "
            f"{'A worker has the same bytes.' if reader.agreed else 'No worker has said yet what its bytes are.'}"
        )
    )
    return _made(args, version, folder)


def _made(args: argparse.Namespace, version: int | str, where: Path) -> int:
    """Where the export is, alone on stdout."""
    if args.json:
        print_json({"format": args.format, "version": version, "path": str(where)})
    else:
        out.print(str(where))
    return 0


def bring(args: argparse.Namespace, client: Client) -> int:
    """Land the edits of a file, and say what became of each."""
    try:
        data = Path(args.file).read_bytes()
    except OSError as error:
        raise Misconfigured(f"{args.file!r} cannot be read: {error.strerror or error}.") from None
    answer = client.send("/import", data)
    known = set(answer["known"])
    edits = [e if e["status"] not in ("queued", "running") else follow(client, e) for e in answer["items"]]
    if args.json:
        print_json([{**e, "known": e["id"] in known} for e in edits])
    else:
        rows = [
            (e["id"], "here before" if e["id"] in known else state(e), e.get("version"), fact(e))
            for e in edits
        ]
        out.print(listing(("id", "status", "version", "fact"), rows, ("fact",)))
    lost = [e for e in edits if e["id"] not in known and e["status"] not in ("applied", "superseded")]
    for e in lost:
        why = (
            (e.get("error") or {}).get("detail")
            or (e.get("result") or {}).get("reason")
            or "see palimpsest edits"
        )
        err.print(plain(f"{e['id']} is {e['status']}: {why}"))
    counted = Counter("here before" if e["id"] in known else e["status"] for e in edits)
    err.print(", ".join(f"{count} {what}" for what, count in counted.items()) + ".")
    return 1 if lost else 0
