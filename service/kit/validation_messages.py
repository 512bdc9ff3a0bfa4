"""Validation errors of pydantic as messages for users: one entry per field, with what to change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

#: the alternatives of a value that is a text or a conversation, in the paths of pydantic
TEXT_TAG, CONVERSATION_TAG = "<text>", "<conversation>"
NUMBER_TAG = "<number>"  #: of a value that is a number or a text
_TAGS = (TEXT_TAG, CONVERSATION_TAG, NUMBER_TAG)
#: messages that replace those of pydantic, by its error type
_MESSAGES_BY_TYPE = {
    "missing": "is missing: add it.",
    "extra_forbidden": "is not a known field: remove it or check its spelling.",
    "json_invalid": "is not JSON.",
    "model_type": "must be a JSON object.",
    "model_attributes_type": "must be a JSON object.",
    "dict_type": "must be a JSON object.",
    "string_type": "must be a string.",
    "string_unicode": "contains a NUL or a lone surrogate: remove it.",
    "list_type": "must be a list.",
    "tuple_type": "must be a list.",
    "int_type": "must be an integer.",
    "int_parsing": "must be an integer.",
    "int_parsing_size": "must be an integer of at most 4300 digits.",
    "int_from_float": "must be an integer.",
    "float_type": "must be a number.",
    "float_parsing": "must be a number.",
    "finite_number": "must be a finite number.",
    "bool_type": "must be true or false.",
    "bool_parsing": "must be true or false.",
}


def validation_messages(errors: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return pydantic's errors as [{"field", "detail"}]. The alternatives of a union are joined by "or"."""
    messages_by_field: dict[str, list[str]] = {}
    for error in errors:
        messages = messages_by_field.setdefault(_field_path(error["loc"]), [])
        if (message := _message(error)) not in messages:
            messages.append(message)
    return [
        {"field": field, "detail": _join_alternatives(messages)}
        for field, messages in messages_by_field.items()
    ]


def _field_path(loc: Sequence[Any]) -> str:
    """Return `edits.0.version` for ("body", "many", "edits", 0, "version", "int")."""
    location, *path = (str(part) for part in loc if part not in _TAGS)
    if location == "body" and path[:1] in (["one"], ["many"]):
        path = path[1:]
    while path and (path[-1] in ("int", "float", "str") or path[-1].startswith(("literal[", "constrained-"))):
        path = path[:-1]
    return ".".join(path) or location


def _message(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx") or {}
    if kind in _MESSAGES_BY_TYPE:
        return _MESSAGES_BY_TYPE[kind]
    if kind == "string_too_short" and context.get("min_length") == 1:
        return "is empty: add some text."
    if kind == "literal_error":
        return f"must be {context.get('expected')}."
    if kind == "value_error":
        # The checks of service.kit.text name the field `text`; the path of the field replaces it here.
        text = str(context.get("error", error["msg"]))
        return text.removeprefix("`text` ")
    text = str(error["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    return text.replace("should ", "must ", 1).replace("String should", "must").rstrip(".") + "."


def _join_alternatives(messages: Sequence[str]) -> str:
    first, *rest = messages
    return " or ".join([first.rstrip("."), *(w.removeprefix("must be ").rstrip(".") for w in rest)]) + "."
