"""Writes docs/reference.md from the OpenAPI document: `python docs/reference.py`. A test holds the page to the code."""

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

Every call, every field and every answer, written from the OpenAPI document of the service by `python docs/reference.py`. A running service
has the same at `/docs` and `/openapi.json`. [The HTTP interface](api.md) says how the calls go together; start there.
"""

Schema = Mapping[str, Any]


def document() -> dict[str, Any]:
    """The OpenAPI document of this release."""
    from api.app import create_app
    from service.settings import Settings

    nobody: Any = Mock()  # no route is called
    return create_app(nobody, nobody, Settings(api_key=None)).openapi()


def render(told: Mapping[str, Any]) -> str:
    """The page that says what an OpenAPI document says."""
    calls: dict[str, list[str]] = {}
    for path, methods in told["paths"].items():
        for method in METHODS:
            if method in methods:
                tag = (methods[method].get("tags") or ["other"])[0]
                calls.setdefault(tag, []).append(_call(method, path, methods[method]))
    parts = [INTRODUCTION, _contents(calls)]
    for tag, said in calls.items():
        parts += [f"## {TITLES.get(tag, tag.capitalize())}\n", *said]
    parts.append("## Forms\n\nA field in **bold** must be given.\n")
    parts += [
        _form(name, schema) for name, schema in sorted(told["components"]["schemas"].items(), key=_named)
    ]
    return "\n".join(parts)


def _named(item: tuple[str, Schema]) -> str:
    return _name(item[0])


def _contents(calls: Mapping[str, list[str]]) -> str:
    return (
        " · ".join(f"[{TITLES.get(tag, tag.capitalize())}](#{tag})" for tag in calls) + " · [Forms](#forms)\n"
    )


def _call(method: str, path: str, call: Schema) -> str:
    lines = [f"### `{method.upper()} {path}`", ""]
    if description := call.get("description"):
        lines += [description.strip(), ""]
    elif summary := call.get("summary"):
        lines += [summary + ".", ""]
    if given := call.get("parameters"):
        lines += ["| parameter | in | type | meaning |", "|---|---|---|---|"]
        for one in given:
            name = f"**`{one['name']}`**" if one.get("required") else f"`{one['name']}`"
            meaning = one.get("description") or one["schema"].get("description") or ""
            lines.append(_row(name, one["in"], _type(one["schema"]), meaning + _default(one["schema"])))
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
    lines += [_answers(call["responses"]), ""]
    return "\n".join(lines)


def _answers(responses: Schema) -> str:
    """What succeeds with what is in it; what fails by its number, for their meaning is one for all calls."""
    good, bad = [], []
    for status, answer in sorted(responses.items()):
        kinds = {_type(content.get("schema", {})) for content in (answer.get("content") or {}).values()} - {
            "any"
        }
        if status.startswith("2"):
            good.append(f"`{status}` {' or '.join(sorted(kinds)) or _cell(answer['description'])}")
        else:
            bad.append(f"`{status}`")
    return f"Answers: {'; '.join(good)}. Problems: {', '.join(bad) or 'none'}."


def _form(name: str, schema: Schema) -> str:
    lines = [f'<a id="{_anchor(name)}"></a>', "", f"### {_name(name)}", ""]
    if description := schema.get("description"):
        lines += [description.strip(), ""]
    if fields := schema.get("properties"):
        lines += ["| field | type | meaning |", "|---|---|---|"]
        required = schema.get("required", ())
        for field, one in fields.items():
            shown = f"**`{field}`**" if field in required else f"`{field}`"
            lines.append(_row(shown, _type(one), (one.get("description") or "") + _default(one)))
        lines.append("")
    return "\n".join(lines)


def _name(schema: str) -> str:
    """`generate Choice` for api__routes__generate__Choice."""
    return " ".join(schema.split("__")[-2:])


def _anchor(schema: str) -> str:
    """Of a form: calls have headings of like names."""
    return "form-" + _name(schema).lower().replace(" ", "-")


def _type(schema: Schema) -> str:
    """A type in a few words, with a link where it is a form of its own."""
    if reference := schema.get("$ref"):
        name = reference.rsplit("/", 1)[-1]
        return f"[{_name(name)}](#{_anchor(name)})"
    for union in ("anyOf", "oneOf", "allOf"):
        if union in schema:
            return " or ".join(dict.fromkeys(_type(one) for one in schema[union]))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}{''.join(_bounds(schema))}"
    if kind == "object" and isinstance(schema.get("additionalProperties"), Mapping):
        return f"map of {_type(schema['additionalProperties'])}"
    return kind + "".join(_bounds(schema))


def _bounds(schema: Schema) -> Iterator[str]:
    """Limits of a number, of a length."""
    for least, most, unit in (
        ("minimum", "maximum", ""),
        ("minLength", "maxLength", " characters"),
        ("minItems", "maxItems", " items"),
    ):
        low, high = schema.get(least, 0), schema.get(most)
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
