"""Error codes: service.errors."""

from __future__ import annotations

import re

import pytest

import api.errors  # noqa: F401, the classes of the API are registered by their import
from service.errors import (
    Conflict,
    InternalError,
    InvalidInput,
    PalimpsestError,
    error_classes,
    error_document,
    error_from_document,
)


def test_codes_are_unique_and_snake_case() -> None:
    """Every error class has a code of its own in snake_case."""
    codes = [error_class.code for error_class in error_classes()]
    assert len(codes) == len(set(codes)) > 10
    assert [code for code in codes if not re.fullmatch(r"[a-z]+(_[a-z]+)*", code)] == []


def test_error_class_without_a_code_is_rejected() -> None:
    """A class that inherits its code cannot be defined."""
    with pytest.raises(TypeError, match="must define `code` and `title`"):
        type("Nameless", (Conflict,), {})


@pytest.mark.parametrize("error_class", list(error_classes()), ids=lambda c: c.code)
def test_document_round_trip(error_class: type[PalimpsestError]) -> None:
    """An error that is sent as a document is read back as the same class with the same detail and field."""
    error = error_class("the detail", "edits.0.prompt")
    restored = error_from_document(error_document(error))
    assert type(restored) is error_class
    assert (restored.detail, restored.field) == ("the detail", "edits.0.prompt")


def test_field_is_omitted_if_empty() -> None:
    """A document has a field only if the error names one."""
    assert error_document(InvalidInput("x")) == {
        "code": "invalid_input",
        "title": "Invalid input",
        "detail": "x",
    }


def test_unexpected_exception_hides_its_message() -> None:
    """The document of an unexpected exception has the code internal_error and not the message."""
    document = error_document(RuntimeError("the password is swordfish"))
    assert document["code"] == "internal_error"
    assert "swordfish" not in str(document)


@pytest.mark.parametrize("document", [{}, {"code": "unheard_of", "detail": "x"}, {"title": "Conflict"}])
def test_unknown_code_is_an_internal_error(document: dict[str, str]) -> None:
    """A document whose code is unknown or missing is read as InternalError."""
    assert type(error_from_document(document)) is InternalError
