"""What a command computes by itself, without a running service: the model is loaded here, and a bar says how far things are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from cli.terminal import bar
from service.errors import Misconfigured
from service.kit.steps import Steps, finish
from service.settings import Settings

if TYPE_CHECKING:
    from service.models.loading import LoadedModel

T = TypeVar("T")
#: the settings that say which model, where, and how it computes
RESIDENT = ("model", "device", "dtype", "threads")
FACTS = "facts.jsonl"


def resident(settings: Settings) -> LoadedModel:
    """The model of the settings, loaded into this process as a worker has it."""
    loaded: LoadedModel = _resident().resident(settings)
    return loaded


def unstarted(settings: Settings) -> LoadedModel:
    """The same without what its recipe says of its start token: as it is before it is prepared."""
    loaded: LoadedModel = _resident().unstarted(settings)
    return loaded


def _resident() -> ModuleType:
    try:
        from transformers.utils import logging

        from workers import resident_model as resident
    except ModuleNotFoundError as error:
        raise without(error) from None
    logging.disable_progress_bar()  # ours says how far things are
    return resident


def without(missing: ModuleNotFoundError) -> Exception:
    """What to say when a module is missing: of those that compute, how to install them."""
    if missing.name not in ("torch", "transformers"):
        return missing
    return Misconfigured(
        f"{missing.name} is not installed, and the model needs it: pip install -c constraints.txt -e '.[worker]'"
    )


def table_of(source: str, model: str) -> Path:
    """A file by its name; "facts" is the table beside the model."""
    path = Path(model) / FACTS if source == "facts" else Path(source)
    if not path.is_file():
        beside = " The model has no table of facts beside it: name a file." if source == "facts" else ""
        raise Misconfigured(f"there is no file {str(path)!r}.{beside}")
    return path


def shown(steps: Steps[T], words: Callable[[str], str] = str) -> T:
    """Run all steps under a bar."""
    with bar() as showing:
        return finish(steps, lambda p: showing.show(words(p.phase), p.done, p.total))
