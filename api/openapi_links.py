"""OpenAPI links: from a response to the operations on the resource in it."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

OpenApiLinks = dict[str, dict[str, Any]]

#: header of a response that created a resource
LOCATION_HEADER: dict[str, Any] = {
    "Location": {"description": "path of the resource", "schema": {"type": "string"}}
}


def link_operations(path: str, id_pointer: str = "id", **methods: str) -> OpenApiLinks:
    """Return links by name to methods of `path`. Their parameter `id` is read from `id_pointer` in the response
    body."""
    pointer = quote(path.replace("/", "~1"), safe="~")
    return {
        name: {
            "operationRef": f"#/paths/{pointer}/{method}",
            "parameters": {"id": f"$response.body#/{id_pointer}"},
        }
        for name, method in methods.items()
    }
