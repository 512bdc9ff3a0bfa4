"""Writes docs/errors.md from the error classes: `python docs/errors.py`. A test compares the page with the code."""

from __future__ import annotations

import inspect
from pathlib import Path

from api.errors import status_of_class
from api.openai.errors import OPENAI_CODES
from service.errors import ERROR_TYPE_PREFIX, PalimpsestError, error_classes

PAGE = Path(__file__).resolve().parent / "errors.md"
#: packages whose errors can reach a client of the HTTP interface
PACKAGES = ("service", "api")
#: errors that end a process or a job, and are never the response to a request
WITHOUT_STATUS = ("misconfigured", "preparation_failed", "cancelled", "lease_lost", "digest_mismatch")

INTRODUCTION = f"""# Errors

Every error has a `code` that does not change between releases. Compare codes: titles and details are for people
and may change. This page is written from the error classes by `python docs/errors.py`.

* A problem document (`application/problem+json`, RFC 9457) has the code as `code` and as `type`:
  `{ERROR_TYPE_PREFIX}CODE`.
* The `error` of a failed job and the `error` event of a stream have `code`, `title` and `detail`.
* Below `/v1` the body is `{{"error": {{"message", "type", "param", "code"}}}}`, as in OpenAI's API. Status 422 is 400
  there, and
  {", ".join(f"`{own}` is `{code}`" for own, code in OPENAI_CODES.items())}.

| code | status | meaning |
|---|---|---|
"""


def documented_errors() -> list[type[PalimpsestError]]:
    """Return the error classes of the service and the API, by code."""
    classes = [c for c in error_classes() if c.__module__.partition(".")[0] in PACKAGES]
    return sorted(classes, key=lambda error_class: error_class.code)


def render() -> str:
    """Return the text of the page."""
    return INTRODUCTION + "".join(_table_row(error_class) for error_class in documented_errors())


def _table_row(error_class: type[PalimpsestError]) -> str:
    status = "" if error_class.code in WITHOUT_STATUS else int(status_of_class(error_class))
    meaning = " ".join((inspect.getdoc(error_class) or "").split()).replace("|", "\\|")
    return f"| `{error_class.code}` | {status} | {meaning} |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
