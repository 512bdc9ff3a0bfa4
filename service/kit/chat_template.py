"""A chat template of a model, rendered as transformers renders it. A template comes with a model and is not trusted.

The sandbox of Jinja keeps a template from the objects of Python, and does not limit its time or memory:
`service.kit.template_renderer` renders in a process of its own, which has these limits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_RENDERED = 4_000_000  #: characters of a rendered text


class RefusedByTemplate(TemplateError):
    """The template called `raise_exception`: it does not accept the messages."""


class RenderedTooLong(TemplateError):
    """The text of the template is longer than MAX_RENDERED."""


class GenerationTag(Extension):
    """`{% generation %}` marks what the model is trained on; the text inside is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PublicNamespace(Namespace):
    """A namespace without names of Python's own objects."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a template cannot set the name {name!r}")
        super().__setitem__(name, value)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """Return the text of a template. Raise TemplateError if it has an error, refuses its variables or is too long."""
    pieces: list[str] = []
    length = 0
    for piece in _compiled(source).generate(variables):
        pieces.append(piece)
        if (length := length + len(piece)) > MAX_RENDERED:
            raise RenderedTooLong(f"its text has more than {MAX_RENDERED:,} characters")
    return "".join(pieces)


@lru_cache(maxsize=4)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: datetime.now().astimezone().strftime(form),
        "namespace": _namespace,
    }
    return environment.from_string(source)


def _refuse(message: str) -> None:
    raise RefusedByTemplate(str(message))


def _namespace(**values: Any) -> PublicNamespace:
    namespace = PublicNamespace()
    for name, value in values.items():
        namespace[name] = value
    return namespace


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON. Jinja's own filter escapes the characters of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
