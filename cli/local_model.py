"""What a command computes by itself, without a running service: the model is loaded here, and a bar says how far things are."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from cli.terminal import progress_bar
from service.errors import Misconfigured
from service.kit.steps import Stepper, run_steps
from service.settings import Settings

if TYPE_CHECKING:
    from service.models.loading import LoadedModel

T = TypeVar("T")
#: the settings that say which model, where, and how it computes
MODEL_SETTINGS = ("model", "device", "dtype", "threads")
FACTS_FILE = "facts.jsonl"


def load_served_model(settings: Settings) -> LoadedModel:
    """The model of the settings, loaded into this process as a worker has it."""
    loaded: LoadedModel = _import_model_loader().load_served_model(settings)
    return loaded


def load_without_bos(settings: Settings) -> LoadedModel:
    """The same without what its recipe says of its start token: as it is before it is prepared."""
    loaded: LoadedModel = _import_model_loader().load_without_bos(settings)
    return loaded


def _import_model_loader() -> ModuleType:
    try:
        from transformers.utils import logging

        from workers import resident_model as resident
    except ModuleNotFoundError as error:
        raise missing_dependency_error(error) from None
    logging.disable_progress_bar()  # ours says how far things are
    return resident


def missing_dependency_error(missing: ModuleNotFoundError) -> Exception:
    """What to say when a module is missing: of those that compute, how to install them."""
    if missing.name not in ("torch", "transformers"):
        return missing
    return Misconfigured(
        f"{missing.name} is not installed, and the model needs it: pip install -c constraints.txt -e '.[worker]'"
    )


def resolve_source(source: str, model: str) -> Path:
    """A file by its name; "facts" is the table beside the model."""
    path = Path(model) / FACTS_FILE if source == "facts" else Path(source)
    if not path.is_file():
        hint = " The model has no table of facts beside it: name a file." if source == "facts" else ""
        raise Misconfigured(f"there is no file {str(path)!r}.{hint}")
    return path


def run_with_progress_bar(stepper: Stepper[T]) -> T:
    """Run all steps under a bar."""
    with progress_bar() as display:
        return run_steps(stepper, lambda p: display.update(p.label, p.done, p.total))
