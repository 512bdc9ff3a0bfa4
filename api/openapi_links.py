"""Links of the OpenAPI document: what a client can do next with what it was just given."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

OpenApiLinks = dict[str, dict[str, Any]]

#: the header of an answer that has made something
LOCATION_HEADER: dict[str, Any] = {
    "Location": {"description": "where the resource is", "schema": {"type": "string"}}
}


def link_operations(path: str, id_pointer: str = "id", **methods: str) -> OpenApiLinks:
    """A link by its name to each `method` of `path`; the id that it takes stands `at` this place of the answer."""
    pointer = quote(path.replace("/", "~1"), safe="~")
    return {
        name: {
            "operationRef": f"#/paths/{pointer}/{method}",
            "parameters": {"id": f"$response.body#/{id_pointer}"},
        }
        for name, method in methods.items()
    }
