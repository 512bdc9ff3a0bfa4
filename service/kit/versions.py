"""Versions: numbers, the words "head" and "base", and model names such as NAME@head, NAME@base and NAME@42."""

from __future__ import annotations

import re

from service.errors import InvalidInput, ModelNotFound

_VERSION_PATTERN = re.compile(r"[0-9]{1,9}")


def resolve_version(
    version: int | str, head: int, min_version: int | None = None, field: str = "version"
) -> int:
    """Return the number of a version: "head" is `head`, "base" is 0.

    Raises InvalidInput for `field` if the version does not exist, and for `min_version` if the version is older than
    `min_version` or if `min_version` does not exist yet.
    """
    number = {"head": head, "base": 0}.get(version) if isinstance(version, str) else version
    if number is None or not 0 <= number <= head:
        raise InvalidInput(
            f"version {version} does not exist: the newest is {head}, the base model is 0.", field
        )
    if min_version is not None and min_version > head:
        raise InvalidInput(f"version {min_version} does not exist yet: the newest is {head}.", "min_version")
    if min_version is not None and min_version > number:
        raise InvalidInput(f"version {number} is older than `min_version` {min_version}.", "min_version")
    return number


def format_model_id(name: str, version: int) -> str:
    """Return the name that always means this version: NAME@VERSION."""
    return f"{name}@{version}"


def parse_model_id(model_id: str, name: str, head: int) -> int:
    """Return the version that a model id means, where `name` is the name of the served model.

    A path or an organization before the name is ignored, as in `org/NAME@42`. Raises ModelNotFound, whose detail lists
    the valid names.
    """
    short = model_id.rsplit("/", 1)[-1]
    for candidate in (model_id, short):
        if candidate == name:
            return head
        if candidate.startswith(f"{name}@"):
            return _parse_version(candidate, candidate.removeprefix(f"{name}@"), name, head)
    raise ModelNotFound(
        f"no model has the name {model_id[:200]!r}: use {name}, {_available_names(name, head)}.", "model"
    )


def _parse_version(model_id: str, version_text: str, name: str, head: int) -> int:
    if version_text in ("head", "base"):
        return resolve_version(version_text, head)
    if _VERSION_PATTERN.fullmatch(version_text) and int(version_text) <= head:
        return int(version_text)
    raise ModelNotFound(
        f"version {model_id[:200]!r} does not exist: the newest is {head}. Use {_available_names(name, head)}.",
        "model",
    )


def _available_names(name: str, head: int) -> str:
    numbered = f"{name}@0" if head == 0 else f"{name}@0 to {name}@{head}"
    return f"{name}@head, {name}@base, or {numbered}"
