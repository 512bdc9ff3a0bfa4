"""`palimpsest models`: the served model, its recipe, the remaining capacity of its layers, and its workers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cli.client import add_client_command
from cli.job_output import format_minute
from cli.terminal import format_list, format_pairs, format_seconds, out, print_json
from palimpsest import Client


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    add_client_command(
        commands,
        "models",
        list_models,
        description="Show the served model, its recipe, the remaining capacity of its layers, and its workers.",
    )


def list_models(args: argparse.Namespace, client: Client) -> int:
    """Print the model and a table of its workers."""
    items = [model.raw for model in client.models()]
    if args.json:
        print_json(items)
        return 0
    for model in items:
        out.print(format_pairs(model_details(model)))
        if model["workers"]:
            out.print()
            columns = ("worker", "status", "version", "lag", "heartbeat (UTC)", "roles")
            out.print(format_list(columns, [worker_row(w) for w in model["workers"]], ("roles",)))
    if not items:
        out.print(
            "No worker has registered a model. Start one with `palimpsest serve` or `palimpsest worker`."
        )
    return 0


def model_details(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a model that are known, for `format_pairs`."""
    recipe, capacity, jobs = model.get("recipe") or {}, model.get("capacity") or {}, model["jobs"]
    layers = (recipe.get("rome") or {}).get("layers") or []
    shape = {name: model.get(name) for name in ("architecture", "layers", "width", "parameters")}
    return {
        "model": model["name"],
        "shape": ", ".join(f"{name} {value:,}" if isinstance(value, int) else str(value) for name, value in shape.items() if value),
        "weights": " on ".join(str(model[name]) for name in ("dtype", "device") if model.get(name)) or None,
        "fingerprint": model["fingerprint"],
        "head": f"version {model['head']}, {model['active_edits']} active edits",
        "recipe": f"edits at layers {', '.join(map(str, layers))}; {recipe.get('source')}" if layers else "none: see `palimpsest tune --help`",
        "capacity": ", ".join(f"layer {k} {100 * v:.1f} %" for k, v in (capacity.get("layers") or {}).items()) or None,
        "jobs": ", ".join(f"{jobs[name]} {name}" for name in ("queued", "running", "exhausted")),
    }  # fmt: skip


def worker_row(worker: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return a worker as a table row; the last cell has its roles, or the reason why it does not serve."""
    roles = worker.get("reason") or ", ".join(worker["roles"]) or "all"
    if preparing := worker.get("preparing"):
        left = preparing.get("seconds_left")
        roles += f"; preparing edits: {preparing.get('error') or preparing['phase']}"
        roles += "" if left is None else f", about {format_seconds(left)} left"
    heartbeat = format_minute(worker["heartbeat"])
    return worker["id"], worker["state"], worker["version"], worker["lag"], heartbeat, roles
