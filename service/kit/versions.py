"""What versions are called where a model is asked for by name: NAME, NAME@head, NAME@base, NAME@42."""

from __future__ import annotations

import re

from service.errors import NotFound

_VERSION = re.compile(r"[0-9]{1,9}")


def called(name: str, version: int) -> str:
    """The one name that always means this version."""
    return f"{name}@{version}"


def version_called(asked: str, name: str, head: int) -> int:
    """The version of the model `name` that goes by that name; NotFound says which names there are.

    A hub's name or a folder stands for the model that was loaded from it: the service knows it by the last part alone.
    """
    short = asked.rsplit("/", 1)[-1]
    for found in (asked, short):
        if found == name:
            return head
        if found.startswith(f"{name}@"):
            return _version(found, found.removeprefix(f"{name}@"), name, head)
    raise NotFound(
        f"there is no model {asked[:200]!r}: ask for {name}, {_others(name, head)}.", field="model"
    )


def _version(asked: str, written: str, name: str, head: int) -> int:
    if written in ("head", "base"):
        return head if written == "head" else 0
    if _VERSION.fullmatch(written) and int(written) <= head:
        return int(written)
    raise NotFound(
        f"there is no version {asked[:200]!r}: the newest is {head}. Ask for {_others(name, head)}.",
        field="model",
    )


def _others(name: str, head: int) -> str:
    numbered = f"{name}@0" if head == 0 else f"{name}@0 to {name}@{head}"
    return f"{name}@head, {name}@base, or {numbered}"
