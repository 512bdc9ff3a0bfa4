"""Versions: numbers, the words "head" and "base", names that callers give to versions, and model names with one of
these, such as NAME@head, NAME@base, NAME@42 and NAME@before-release."""

from __future__ import annotations

import re
from collections.abc import Callable

from service.errors import InvalidInput, ModelNotFound

#: a name of a version that a caller may give: it begins with a letter, so it is no number
VERSION_NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9._-]{0,63}$"
WORDS = ("head", "base")  #: that mean a version and cannot be given as a name
_NUMBER_PATTERN = re.compile(r"[0-9]{1,9}")
#: the number of the version that has a name, or None
NumberOf = Callable[[str], int | None]


def no_names(_: str) -> None:
    """The number of a name where there are no names."""


def resolve_version(
    version: int | str,
    head: int,
    min_version: int | None = None,
    field: str = "version",
    number_of: NumberOf = no_names,
) -> int:
    """Return the number of a version: "head" is `head`, "base" is 0, and a name has the number that `number_of` says.

    Raises InvalidInput for `field` if the version does not exist, and for `min_version` if the version is older than
    `min_version` or if `min_version` does not exist yet.
    """
    number = _number(version, head, number_of)
    if number is None:
        raise InvalidInput(
            f"no version has the name {str(version)[:200]!r}: GET /versions lists the names. Use one of these, head, base or a "
            "number.",
            field,
        )
    if not 0 <= number <= head:
        raise InvalidInput(
            f"version {str(version)[:200]} does not exist: the newest is {head}, the base model is 0.", field
        )
    if min_version is not None and min_version > head:
        raise InvalidInput(f"version {min_version} does not exist yet: the newest is {head}.", "min_version")
    if min_version is not None and min_version > number:
        raise InvalidInput(f"version {number} is older than `min_version` {min_version}.", "min_version")
    return number


def _number(version: int | str, head: int, number_of: NumberOf) -> int | None:
    if not isinstance(version, str):
        return version
    if version in WORDS:
        return {"head": head, "base": 0}[version]
    return int(version) if _NUMBER_PATTERN.fullmatch(version) else number_of(version)


def is_given_name(version: int | str) -> bool:
    """Whether a version is none of the words and no number: only the database knows its number."""
    return isinstance(version, str) and version not in WORDS


def format_model_id(name: str, version: int | str) -> str:
    """Return the model name that means this version: NAME@VERSION."""
    return f"{name}@{version}"


def split_model_id(model_id: str, name: str) -> str | None:
    """Return the text of the version in a model id, where `name` is the name of the served model; "head" for the name
    alone, and None for another model.

    A path or an organization before the name is ignored, as in `org/NAME@42`.
    """
    for candidate in (model_id, model_id.rsplit("/", 1)[-1]):
        if candidate == name:
            return "head"
        if candidate.startswith(f"{name}@"):
            return candidate.removeprefix(f"{name}@")
    return None


def parse_model_id(model_id: str, name: str, head: int, number_of: NumberOf = no_names) -> int:
    """Return the version that a model id means, where `name` is the name of the served model. Raises ModelNotFound,
    whose detail lists the valid names."""
    text = split_model_id(model_id, name)
    if text is None:
        raise ModelNotFound(
            f"no model has the name {model_id[:200]!r}: use {name}, {_available_names(name, head)}.", "model"
        )
    number = _number(text, head, number_of)
    if number is None or number > head:
        raise ModelNotFound(
            f"version {model_id[:200]!r} does not exist: the newest is {head}. GET /versions lists the names of versions. Use one "
            f"of these, {_available_names(name, head)}.",
            "model",
        )
    return number


def _available_names(name: str, head: int) -> str:
    numbered = f"{name}@0" if head == 0 else f"{name}@0 to {name}@{head}"
    return f"{name}@head, {name}@base, or {numbered}"
