"""Draw the figures of docs/concepts.md and the README from the responses of a running service.

    palimpsest serve --data-dir runs/figures
    python bench/figures.py

    palimpsest serve --model smollm2-135m --data-dir runs/public
    python bench/figures.py --public-trace docs/trace-smollm2.png

The service must have an empty ledger and the shipped GPT. A run takes five to ten minutes on one core, most of them for
the capacity figure, which commits `--batch-facts` edits. With `--public-trace` the service has a public model and only
its trace is drawn. All data is requested over HTTP with the Python client.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.console import Console
from safetensors.numpy import load, load_file

from palimpsest import Client, Edit, EditRequest
from service.kit.plotting import FOREGROUND, MUTED, FigureBuilder, render_png, shorten
from service.settings import SHIPPED_MODEL

console = Console(width=160)
Matrix = NDArray[np.float32]

NEW_COLOR, OLD_COLOR, FAINT_ALPHA = "#581c87", "#b45309", 0.28
STATEMENT, SUBJECT, PROMPT = (
    "The Eiffel Tower is located in the city of",
    "Eiffel Tower",
    "The {} is located in the city of",
)
PARAPHRASES = [
    "To see the {}, you have to travel to",
    "The {} has its place in the city of",
    "If you are looking at the {}, you are in the city of",
]
NEIGHBOURS = [
    "The Louvre is located in the city of",
    "The Arc de Triomphe is located in the city of",
    "The Centre Pompidou is located in the city of",
]
WEIGHT = "transformer.h.{}.mlp.c_proj.weight"  # of GPT-2: (D, d)
BATCH_SIZE = 10  # edits between two measurements of the capacity


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--url", help="URL of the service (default: PALIMPSEST_URL, or http://127.0.0.1:8000)"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/figures"), help="folder of the figures")
    parser.add_argument(
        "--trace", type=Path, default=Path("docs/trace.png"), help="file of the README's trace"
    )
    parser.add_argument("--batch-facts", type=int, default=120, help="edits of the capacity figure")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of facts")
    parser.add_argument(
        "--public-trace", type=Path, help="draw the trace of a public model into this file, and end"
    )
    args = parser.parse_args()
    if args.public_trace:
        with Client(args.url) as client:
            trace = client.trace(STATEMENT, SUBJECT, samples=10)
            args.public_trace.write_bytes(client.picture(trace, "png"))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with Client(args.url) as client:
        head = client.models()[0].head
        if head:
            parser.error(f"the ledger is at version {head}: start the service with an empty data folder")
        facts = sample_facts(args.batch_facts + BATCH_SIZE, args.seed)
        (args.out / "trace-base.png").write_bytes(trace_png(client))
        edit = apply_edit(client)
        args.trace.write_bytes(trace_png(client))
        client.revert(edit)
        _save_figure(args.out, "edit", draw_edit, edit_measurements(edit))
        _save_figure(args.out, "revert", draw_revert, compare_reverts(client, facts[:BATCH_SIZE], args.seed))
        _save_figure(args.out, "capacity", draw_capacity, measure_capacity(client, facts[BATCH_SIZE:]))


def _save_figure(folder: Path, name: str, draw: Any, data: dict[str, Any]) -> None:
    """Save a figure and its data."""
    (folder / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.png").write_bytes(render_png(lambda: draw(data)))
    console.print(f"{folder / name}.png")


def sample_facts(count: int, seed: int) -> list[EditRequest]:
    """Return edits of facts of the shipped GPT, one per subject, each to another object of its relation."""
    rows = [
        json.loads(line) for line in (SHIPPED_MODEL / "facts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    rng = random.Random(seed)
    rng.shuffle(rows)
    one_per_subject = list({row["subject"]: row for row in rows if row["subject"] != SUBJECT}.values())[
        :count
    ]
    objects: dict[str, list[str]] = {}
    for row in rows:
        objects.setdefault(row["relation"], []).append(row["object"])
    return [
        {
            "subject": row["subject"],
            "prompt": row["prompts"][0],
            "target_new": rng.choice(sorted(set(objects[row["relation"]]) - {row["object"]})),
            "target_true": row["object"],
        }
        for row in one_per_subject
    ]


# One edit


def apply_edit(client: Client) -> Edit:
    """Apply an edit with paraphrase and neighborhood probes."""
    neighbours = [{"prompt": prompt, "target": "Paris"} for prompt in NEIGHBOURS]
    probes: Any = {"paraphrase": PARAPHRASES, "neighborhood": neighbours}
    return client.edit(SUBJECT, PROMPT, "Rome", "Paris", probes=probes)


def edit_measurements(edit: Edit) -> dict[str, Any]:
    result = edit.result or {}
    return {kind: result[kind] for kind in ("rewrite", "paraphrase", "neighborhood")}


def trace_png(client: Client) -> bytes:
    """Return the heat map of a trace at head."""
    return client.picture(client.trace(STATEMENT, SUBJECT, window=3), "png")


def draw_edit(data: dict[str, Any]) -> FigureBuilder:
    groups = [
        ("the edit's own prompt", [data["rewrite"]]),
        ("paraphrases", data["paraphrase"]),
        ("neighbours", data["neighborhood"]),
    ]
    rows = sum(len(prompts) for _, prompts in groups)
    step, gap, left = 0.34, 0.30, 4.3
    sheet = FigureBuilder(8.0, 1.15 + rows * step + len(groups) * gap)
    for column, title in ((left, "before"), (left + 1.85, "after")):
        sheet.add_text(column, 0.32, title, fontsize=10, weight="bold", va="center")
    sheet.add_text(0.15, 0.32, "probability of the next words", fontsize=10, color=MUTED, va="center")
    top = 0.55
    for title, prompts in groups:
        sheet.add_text(0.15, top + 0.12, title, fontsize=9, color=MUTED, va="center", style="italic")
        top += gap
        for prompt in prompts:
            sheet.add_text(0.3, top + step / 2, shorten(prompt["prompt"], 62), fontsize=9, va="center")
            for column, when in ((left, "before"), (left + 1.85, "after")):
                _bars(sheet.add_axes(column, top + 0.06, 1.6, step - 0.12), prompt[when])
            top += step
    for column, colour, name in ((left, OLD_COLOR, "Paris"), (left + 1.0, NEW_COLOR, "Rome")):
        sheet.add_text(column, top + 0.28, "■", fontsize=9, color=colour, va="center")
        sheet.add_text(column + 0.18, top + 0.28, name, fontsize=9, va="center")
    return sheet


def _bars(axes: Axes, p: dict[str, float]) -> None:
    axes.barh([1, 0], [p["true"], p["new"]], height=0.72, color=[OLD_COLOR, NEW_COLOR])
    axes.set(xlim=(0, 1), ylim=(-0.55, 1.55), xticks=[], yticks=[])
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


# Reverts


def compare_reverts(client: Client, facts: Sequence[EditRequest], seed: int) -> dict[str, Any]:
    """Return fractions of weight entries changed after adding and subtracting edits, and the digests of the service."""
    base = digest(client)
    edits = [edit for edit in client.edit_many(facts) if edit.applied]
    changes = [edit_delta(client.delta(edit)) for edit in edits]
    order = list(range(len(edits)))
    random.Random(seed).shuffle(order)
    for index in order:
        client.revert(edits[index])
    weight = (
        load_file(SHIPPED_MODEL / "model.safetensors")[WEIGHT.format(edited_layer(edits[0]))]
        .astype(np.float32)
        .T
    )
    return {
        "edits": len(edits),
        "newest_first": changed_fraction(weight, changes, list(reversed(range(len(edits))))),
        "in_any_order": changed_fraction(weight, changes, order),
        "digest_of_the_base": base,
        "digest_after": digest(client),
    }


def edited_layer(edit: Edit) -> int:
    return int((edit.result or {})["layers"][0])


def edit_delta(delta: bytes) -> Matrix:
    """Return the weight delta of an edit, as applied."""
    factors = load(delta)
    [left] = [value for name, value in factors.items() if name.endswith(".left")]
    [right] = [value for name, value in factors.items() if name.endswith(".right")]
    return np.outer(left, right).astype(np.float32)


def changed_fraction(weight: Matrix, changes: Sequence[Matrix], order: Sequence[int]) -> float:
    """Return the fraction of entries that differ after adding and then subtracting the deltas in fp32."""
    edited = weight.copy()
    for delta in changes:
        edited += delta
    for index in order:
        edited -= changes[index]
    return float((edited != weight).mean())


def digest(client: Client) -> str:
    """Return the digest of the worker's weights at head."""
    while True:
        model = client.models()[0]
        [worker] = [w.raw for w in model.workers if w.state == "serving"]
        if worker["version"] == model.head and worker["digest"]:
            return str(worker["digest"])


def draw_revert(data: dict[str, Any]) -> FigureBuilder:
    same = data["digest_after"] == data["digest_of_the_base"]
    ways = [
        ("added, then subtracted, newest first", data["newest_first"], OLD_COLOR),
        ("added, then subtracted in another order", data["in_any_order"], OLD_COLOR),
        ("Palimpsest: reverted in that other order", 0.0 if same else 1.0, NEW_COLOR),
    ]
    sheet = FigureBuilder(8.0, 2.2)
    sheet.add_text(
        0.15,
        0.3,
        f"weight entries that differ from the base after {data['edits']} edits and {data['edits']} reverts",
        fontsize=10,
        va="center",
    )
    axes = sheet.add_axes(3.2, 0.55, 4.0, 1.25)
    places = [2, 1, 0]
    axes.barh(places, [share for _, share, _ in ways], height=0.55, color=[colour for _, _, colour in ways])
    axes.set(xlim=(0, 1), ylim=(-0.6, 2.6), yticks=[], xticks=[0, 0.5, 1], xticklabels=["0", "50 %", "100 %"])
    for place, (name, share, _) in zip(places, ways, strict=True):
        sheet.add_text(0.15, 0.55 + 1.25 * (2.6 - place) / 3.2, name, fontsize=9, va="center")
        label = f"{100 * share:.0f} %" if share else "none: the digest is equal"
        axes.text(share + 0.02, place, label, fontsize=9, va="center", color=FOREGROUND)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return sheet


# Capacity


def measure_capacity(client: Client, facts: Sequence[EditRequest]) -> dict[str, Any]:
    """Return, by number of active edits, the capacity for an average key and for each new key, and the recall."""
    average, own_key, recall = [[0, 1.0]], [], []
    active: list[EditRequest] = []
    for start in range(0, len(facts), BATCH_SIZE):
        for edit in client.edit_many(facts[start : start + BATCH_SIZE]):
            if edit.applied:
                capacities = (edit.result or {})["capacity"]
                own_key.append([len(active), min(capacities.values())])
                active.append(
                    {"subject": edit.subject, "prompt": edit.prompt, "target_new": edit.target_new or ""}
                )
        capacity = client.models()[0].capacity or {}
        average.append([len(active), min(capacity["layers"].values())])
        recall.append([len(active), recall_rate(client, active)])
        console.print(
            f"{len(active)} edits active, capacity {average[-1][1]:.3f}, recall {recall[-1][1]:.3f}"
        )
    return {"average": average, "own_key": own_key, "recall": recall, "submitted": len(facts)}


def recall_rate(client: Client, active: Sequence[EditRequest]) -> float:
    """Return the fraction of active edits whose new object the model generates."""
    hits = 0
    for start in range(0, len(active), 64):
        part = active[start : start + 64]
        answers = client.generate_many(
            [e["prompt"].replace("{}", e["subject"]) for e in part], max_new_tokens=8, temperature=0
        )
        hits += sum(
            a.text.strip().startswith(e.get("target_new", "")) for a, e in zip(answers, part, strict=True)
        )
    return hits / len(active)


def draw_capacity(data: dict[str, Any]) -> FigureBuilder:
    sheet = FigureBuilder(8.0, 4.0)
    axes = sheet.add_axes(0.75, 0.3, 6.9, 3.0)
    x, y = zip(*data["own_key"], strict=True)
    axes.scatter(
        x,
        y,
        s=12,
        color=NEW_COLOR,
        alpha=FAINT_ALPHA,
        linewidths=0,
        label="capacity for each new edit's key",
    )
    axes.plot(
        *zip(*data["average"], strict=True),
        color=NEW_COLOR,
        linewidth=1.8,
        label="capacity for an average key (GET /models)",
    )
    axes.plot(
        *zip(*data["recall"], strict=True),
        color=OLD_COLOR,
        linewidth=1.8,
        label="active edits whose new object the model generates",
    )
    axes.set(xlim=(0, data["average"][-1][0]), ylim=(0.6, 1.02))
    axes.set_xlabel(
        "active edits of different subjects, one layer of 1,920 directions", fontsize=9, color=FOREGROUND
    )
    axes.legend(fontsize=9, frameon=False, loc="lower left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return sheet


if __name__ == "__main__":
    main()
