"""What versions are called where a model is asked for by name: NAME, NAME@head, NAME@base, NAME@42."""

from __future__ import annotations

import re

from service.errors import NotFound

_VERSION_PATTERN = re.compile(r"[0-9]{1,9}")


def format_model_id(name: str, version: int) -> str:
    """The one name that always means this version."""
    return f"{name}@{version}"


def parse_model_id(model_id: str, name: str, head: int) -> int:
    """The version of the model `name` that goes by that name; NotFound says which names there are.

    A hub's name or a folder stands for the model that was loaded from it: the service knows it by the last part alone.
    """
    short = model_id.rsplit("/", 1)[-1]
    for candidate in (model_id, short):
        if candidate == name:
            return head
        if candidate.startswith(f"{name}@"):
            return _parse_version(candidate, candidate.removeprefix(f"{name}@"), name, head)
    raise NotFound(
        f"there is no model {model_id[:200]!r}: ask for {name}, {_available_names(name, head)}.",
        field="model",
    )


def _parse_version(model_id: str, version_text: str, name: str, head: int) -> int:
    if version_text in ("head", "base"):
        return head if version_text == "head" else 0
    if _VERSION_PATTERN.fullmatch(version_text) and int(version_text) <= head:
        return int(version_text)
    raise NotFound(
        f"there is no version {model_id[:200]!r}: the newest is {head}. Ask for {_available_names(name, head)}.",
        field="model",
    )


def _available_names(name: str, head: int) -> str:
    numbered = f"{name}@0" if head == 0 else f"{name}@0 to {name}@{head}"
    return f"{name}@head, {name}@base, or {numbered}"
