"""`models`: the resident model, the recipe that edits start from, the room left in its layers, and its workers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cli.client import Client
from cli.edits import format_minute
from cli.terminal import format_list, format_pairs, out, print_json


def list_models(args: argparse.Namespace, client: Client) -> int:
    """Everything that GET /models says and a person asks for."""
    items = client.get("/models")["items"]
    if args.json:
        print_json(items)
        return 0
    for model in items:
        out.print(format_pairs(model_details(model)))
        if model["workers"]:
            out.print()
            rows = [worker_row(w) for w in model["workers"]]
            out.print(
                format_list(
                    ("worker", "status", "version", "behind", "heard (UTC)", "roles"), rows, ("roles",)
                )
            )
    if not items:
        out.print(
            "No worker has told of a model yet. Start one with `palimpsest serve` or `palimpsest work`."
        )
    return 0


def model_details(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model in a few lines; what is not known of it is left out."""
    recipe, capacity, jobs = model.get("recipe") or {}, model.get("capacity") or {}, model["jobs"]
    layers = (recipe.get("rome") or {}).get("layers") or []
    shape = {name: model.get(name) for name in ("architecture", "layers", "width", "parameters")}
    return {
        "model": model["name"],
        "shape": ", ".join(f"{name} {value:,}" if isinstance(value, int) else str(value) for name, value in shape.items() if value),
        "resident": " on ".join(str(model[name]) for name in ("dtype", "device") if model.get(name)) or None,
        "fingerprint": model["fingerprint"],
        "head": f"version {model['head']}, {model['active_edits']} active edits",
        "recipe": f"edits at layers {', '.join(map(str, layers))}; {recipe.get('source')}" if layers else "none yet: see `palimpsest prepare`",
        "room left": ", ".join(f"layer {k} {100 * v:.1f} %" for k, v in (capacity.get("layers") or {}).items()) or None,
        "jobs": ", ".join(f"{jobs[name]} {name}" for name in ("queued", "running", "dead")),
    }  # fmt: skip


def worker_row(resource: Mapping[str, Any]) -> tuple[Any, ...]:
    """A worker as a line: who, how it is, where it stands, when it was heard of, what it does or why it does nothing."""
    activity = resource.get("reason") or ", ".join(resource["roles"]) or "everything"
    return (
        resource["id"],
        resource["state"],
        resource["version"],
        resource["lag"],
        format_minute(resource["heartbeat"]),
        activity,
    )
