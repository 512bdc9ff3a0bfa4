"""Commands that load the model into their own process: loading, sources of records, progress bars."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from cli.terminal import progress_bar
from service.datasets.fact_table import FACTS_FILE
from service.errors import Misconfigured
from service.fetching.models_folder import resolve_model
from service.kit.extras import install_command
from service.kit.model_files import companion_file, local_model
from service.kit.steps import Stepper, run_steps
from service.settings import Settings

if TYPE_CHECKING:
    from service.models.loading import LoadedModel

T = TypeVar("T")
#: the settings of the model
MODEL_SETTINGS = ("model", "models_dir", "adapter", "device", "device_map", "dtype", "threads")


def load_served_model(settings: Settings) -> LoadedModel:
    """Load the configured model as a worker does."""
    loaded: LoadedModel = _import_model_loader().load_served_model(settings)
    return loaded


def load_without_bos(settings: Settings) -> LoadedModel:
    """Load the configured model without the start token of its recipe, as it is before tuning."""
    loaded: LoadedModel = _import_model_loader().load_without_bos(settings)
    return loaded


def _import_model_loader() -> ModuleType:
    try:
        from transformers.utils import logging

        from workers import resident_model as resident
    except ModuleNotFoundError as error:
        raise missing_dependency_error(error) from None
    logging.disable_progress_bar()  # the progress bar of this process shows the loading
    return resident


def missing_dependency_error(missing: ModuleNotFoundError) -> Exception:
    """Return the error for a missing module; for torch, transformers and gguf it says how to install them."""
    if missing.name not in ("gguf", "torch", "transformers"):
        return missing
    return Misconfigured(
        f"{missing.name} is not installed; loading a model requires it: {install_command('worker')}"
    )


def resolve_source(source: str, settings: Settings) -> Path:
    """Return the path of a file of records; "facts" is the fact table of the model."""
    path = own_facts(settings) if source == "facts" else Path(source)
    if not path.is_file():
        hint = " The model has no fact table: name a file." if source == "facts" else ""
        raise Misconfigured(f"there is no file {str(path)!r}.{hint}")
    return path


def own_facts(settings: Settings) -> Path:
    """Return the path of the fact table of the model, whether or not it has one."""
    return companion_file(local_model(Path(resolve_model(settings.model, settings.models_dir))), FACTS_FILE)


def run_with_progress_bar(stepper: Stepper[T]) -> T:
    """Run all steps under a bar."""
    with progress_bar() as display:
        return run_steps(stepper, lambda p: display.update(p.label, p.done, p.total, p.seconds_left))
