"""Write docs/reference.md from the OpenAPI document: `python docs/reference.py`. A test compares the page with the
code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

PAGE = Path(__file__).resolve().parent / "reference.md"
TITLES = {"openai": "OpenAI"}
METHODS = ("get", "post", "put", "patch", "delete")
INTRODUCTION = """# HTTP reference

Every call, every field and every answer, generated from the OpenAPI document of the service by `python docs/reference.py`.
A running service has the same at `/docs` and `/openapi.json`. [The HTTP interface](api.md) says how the calls work together;
start there.
"""

Schema = Mapping[str, Any]


def document() -> dict[str, Any]:
    """Return the OpenAPI document of this code."""
    from api.app import create_app
    from service.settings import Settings

    unused: Any = Mock()  # no route is called
    return create_app(unused, unused, Settings(api_key=None)).openapi()


def render(openapi: Mapping[str, Any]) -> str:
    """Return the Markdown page for an OpenAPI document."""
    calls: dict[str, list[str]] = {}
    for path, methods in openapi["paths"].items():
        for method in METHODS:
            if method in methods:
                tag = (methods[method].get("tags") or ["other"])[0]
                calls.setdefault(tag, []).append(_operation_section(method, path, methods[method]))
    parts = [INTRODUCTION, _contents(calls)]
    for tag, sections in calls.items():
        parts += [f"## {TITLES.get(tag, tag.capitalize())}\n", *sections]
    parts.append("## Schemas\n\nA field in **bold** is required.\n")
    parts += [
        _schema_section(name, schema)
        for name, schema in sorted(openapi["components"]["schemas"].items(), key=_sort_key)
    ]
    return "\n".join(parts)


def _sort_key(item: tuple[str, Schema]) -> str:
    return _display_name(item[0])


def _contents(calls: Mapping[str, list[str]]) -> str:
    return (
        " · ".join(f"[{TITLES.get(tag, tag.capitalize())}](#{tag})" for tag in calls)
        + " · [Schemas](#schemas)\n"
    )


def _operation_section(method: str, path: str, call: Schema) -> str:
    lines = [f"### `{method.upper()} {path}`", ""]
    if description := call.get("description"):
        lines += [description.strip(), ""]
    elif summary := call.get("summary"):
        lines += [summary + ".", ""]
    if parameters := call.get("parameters"):
        lines += ["| parameter | in | type | meaning |", "|---|---|---|---|"]
        for parameter in parameters:
            name = f"**`{parameter['name']}`**" if parameter.get("required") else f"`{parameter['name']}`"
            meaning = parameter.get("description") or parameter["schema"].get("description") or ""
            lines.append(
                _row(
                    name, parameter["in"], _type(parameter["schema"]), meaning + _default(parameter["schema"])
                )
            )
        lines.append("")
    for media, content in (call.get("requestBody") or {}).get("content", {}).items():
        lines += [f"Body (`{media}`): {_type(content.get('schema', {}))}", ""]
        for example in content.get("examples", {}).values():
            lines += [
                f"{example.get('summary', 'Example')}:",
                "",
                "```json",
                json.dumps(example["value"], ensure_ascii=False),
                "```",
                "",
            ]
    lines += [_responses_line(call["responses"]), ""]
    return "\n".join(lines)


def _responses_line(responses: Schema) -> str:
    """Return the line with successful answers and their schemas, and the statuses of errors."""
    good, bad = [], []
    for status, answer in sorted(responses.items()):
        kinds = {_type(content.get("schema", {})) for content in (answer.get("content") or {}).values()} - {
            "any"
        }
        if status.startswith("2"):
            good.append(f"`{status}` {' or '.join(sorted(kinds)) or _cell(answer['description'])}")
        else:
            bad.append(f"`{status}`")
    return f"Answers: {'; '.join(good)}. Errors: {', '.join(bad) or 'none'}."


def _schema_section(name: str, schema: Schema) -> str:
    lines = [f'<a id="{_schema_anchor(name)}"></a>', "", f"### {_display_name(name)}", ""]
    if description := schema.get("description"):
        lines += [description.strip(), ""]
    if fields := schema.get("properties"):
        lines += ["| field | type | meaning |", "|---|---|---|"]
        required = schema.get("required", ())
        for field, field_schema in fields.items():
            field_cell = f"**`{field}`**" if field in required else f"`{field}`"
            lines.append(
                _row(
                    field_cell,
                    _type(field_schema),
                    (field_schema.get("description") or "") + _default(field_schema),
                )
            )
        lines.append("")
    return "\n".join(lines)


def _display_name(schema: str) -> str:
    """Return a short name: `generate Choice` for api__routes__generate__Choice."""
    return " ".join(schema.split("__")[-2:])


def _schema_anchor(schema: str) -> str:
    """Return the anchor of a schema, with a prefix that no heading of a call has."""
    return "schema-" + _display_name(schema).lower().replace(" ", "-")


def _type(schema: Schema) -> str:
    """Return a short description of a type, with a link if it is a schema of its own."""
    if reference := schema.get("$ref"):
        name = reference.rsplit("/", 1)[-1]
        return f"[{_display_name(name)}](#{_schema_anchor(name)})"
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[union]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind: str = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}{''.join(_bounds(schema))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"map of {_type(schema['additionalProperties'])}"
    return kind + "".join(_bounds(schema))


def _bounds(schema: Schema) -> Iterator[str]:
    """Yield the limits of a number or a length."""
    for minimum, maximum, unit in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
    ):
        low, high = schema.get(minimum, 0), schema.get(maximum)
        if high is not None:
            yield (
                f" ({_number(low)} to {_number(high)}{unit})"
                if low or not unit
                else f" (at most {_number(high)}{unit})"
            )
        elif low:
            yield f" (at least {_number(low)}{unit})"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _default(schema: Schema) -> str:
    if schema.get("default") is None:
        return ""
    return f" (default: `{json.dumps(schema['default'], ensure_ascii=False)}`)"


def _row(*cells: str) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render(document()), encoding="utf-8")
