"""The folder of the fetched models: one folder each, which is complete or absent. Torch-free."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from service.errors import Misconfigured
from service.fetching.known_models import KnownModel, find_known_model

RECORD_FILE = "fetched.json"


@dataclass(frozen=True)
class FetchRecord:
    """Where a fetched model came from."""

    name: str
    title: str
    license: str
    source: str


@dataclass(frozen=True)
class ModelsFolder:
    """The folder of the fetched models."""

    path: Path

    def model_path(self, model: KnownModel) -> Path:
        """Return the folder of a model, whether or not it was fetched."""
        return self.path / model.name

    def partial_path(self, model: KnownModel) -> Path:
        """Return the folder in which a model is assembled."""
        return self.path / f".{model.name}.part"

    def lock_path(self, model: KnownModel) -> Path:
        return self.path / f".{model.name}.lock"

    def record(self, model: KnownModel) -> FetchRecord | None:
        """Return the record of a fetched model; None when it was not fetched."""
        path = self.model_path(model) / RECORD_FILE
        if not path.is_file():
            return None
        return FetchRecord(**json.loads(path.read_text(encoding="utf-8")))


def write_record(folder: Path, record: FetchRecord) -> None:
    """Write the record of a model into the folder in which it is assembled."""
    (folder / RECORD_FILE).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")


def resolve_model(model: str, models_dir: Path) -> str:
    """Return the model that a setting names: the folder of a fetched model for a known name, else the setting itself.

    A path that exists takes precedence. Raise Misconfigured for a known name that was not fetched.
    """
    known = find_known_model(model)
    if known is None or Path(model).exists():
        return model
    folder = ModelsFolder(models_dir)
    if folder.record(known) is None:
        raise Misconfigured(
            f"the model {model!r} is not in {str(models_dir)!r}: get it with `palimpsest fetch {known.name}` "
            f"({known.megabytes} MB or more, {known.license}), or give a folder or a GGUF file."
        )
    return str(folder.model_path(known))
