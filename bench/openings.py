"""Where gated edits act: the share of texts of each class in which a gate opens, and openings per 10,000 tokens.

    python bench/openings.py --data DATA --edits 100 1000
    python bench/openings.py --model smollm2-135m --records counterfact.json --data DATA --edits 100

Facts at odd places of the seeded order get a gate each; no value is searched, because a gate does not depend on it. In
the classes about an edited subject, "own" is the share of texts in which the gate of that subject opens, and "other" of
those in which a gate of another subject does. A text "of a part of the name" has the last word of a name of several
words in place of the name, as an alias or a relative would. A negated statement names its subject, so that the edit
acts and the model says the new object there, too. A reversed question names the object alone: nothing tells the edit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.gates import build_gate
from service.datasets.loading import read_records
from service.datasets.record import Record, record_fits, true_statements
from service.editing.context import build_editor_context
from service.gating.gate_reference import REFERENCE_TEXTS
from service.gating.gate_table import GateTable
from service.gating.gated_rows import GatedRows, new_gated_rows
from service.kit.steps import run_to_completion
from service.kit.text import mentions
from service.methods.parameters import RomeParameters
from service.models.hooks import capture, stop_after
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.recipes.recipe import resolve_hparams
from service.settings import SHIPPED_MODEL, Settings
from service.weights.factors import Association, Gate
from workers.resident_model import load_served_model

OTHER_TEXTS = 500  # of each class that is not about an edited subject
console = Console(width=120)


@dataclass(frozen=True)
class ClassTexts:
    """Texts of one class, each with the edited subject that it is about."""

    name: str
    texts: Sequence[tuple[str, str | None]]


def classes_of(edited: Sequence[Record], others: Sequence[Record], corpus: Sequence[str]) -> list[ClassTexts]:
    """Return the texts of all classes."""
    subjects = [r.subject for r in edited]
    parts = [(r, r.subject.split()[-1]) for r in edited if len(r.subject.split()) > 1]
    neighbors = [n.prompt for r in edited for n in r.neighbours[:2]]
    objects = [f"Tell me about {r.target_new}." for r in edited]

    def without_subjects(texts: Sequence[str]) -> list[tuple[str, None]]:
        """Return the first texts that mention no edited subject."""
        free = (t for t in texts if not any(mentions(t, s) for s in subjects))
        return [(t, None) for t in islice(free, OTHER_TEXTS)]

    return [
        ClassTexts("own prompt", [(r.text, r.subject) for r in edited]),
        ClassTexts("paraphrase", [(p, r.subject) for r in edited for p in r.paraphrases[:2]]),
        ClassTexts("question about the subject", [(f"Tell me about {s}.", s) for s in subjects]),
        ClassTexts("negated statement", [(f"It is not true that {r.text}", r.subject) for r in edited]),
        ClassTexts(
            "part of the name", [(r.prompt.replace("{}", part), r.subject) for r, part in parts][:OTHER_TEXTS]
        ),
        ClassTexts("reversed: the new object", without_subjects(objects)),
        ClassTexts("neighbors", without_subjects(neighbors)),
        ClassTexts("statements of other facts", without_subjects(true_statements(others))),
        ClassTexts("unrelated text", without_subjects(corpus[REFERENCE_TEXTS:])),
    ]


def association_of(gate: Gate, record: Record, number: int, model: LoadedModel) -> Association:
    """Return an association that has a gate and changes nothing."""
    key = torch.zeros(model.intermediate_size)
    return Association(
        layer=gate.space.layer,
        key=key,
        direction=key,
        value=torch.zeros(model.hidden_size),
        subject=record.subject,
        edit=f"{number:06}",
        gate=gate,
    )


def opened_subjects(model: LoadedModel, rows: GatedRows, text: str) -> tuple[list[str], int]:
    """Return the subject of what opens at each position where a gate does, and the number of tokens."""
    ids = model.encode(text)[0][: model.max_positions]
    down = model.down_proj(rows.layer)
    with capture({0: down}, "input") as captured, stop_after(down):
        forward(model, pad([ids], model))
    keys = captured[0].flatten(0, -2)[: len(ids)].cpu()
    return [subject for _, subject in rows.open_subjects(keys)], len(ids)


def measure(model: LoadedModel, rows: GatedRows, texts: ClassTexts) -> list[str]:
    """Return the row of a class."""
    own = other = tokens = openings = about = 0
    for text, subject in texts.texts:
        opened, length = opened_subjects(model, rows, text)
        tokens, openings, about = tokens + length, openings + len(opened), about + (subject is not None)
        own += subject in opened
        other += any(name != subject for name in opened)
    count = max(1, len(texts.texts))
    cells = [f"{100 * own / about:.1f}" if about else "", f"{100 * other / count:.1f}"]
    return [texts.name, str(len(texts.texts)), *cells, f"{1e4 * openings / max(1, tokens):.1f}"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--records", type=Path, help="default: the model's own table")
    p.add_argument("--data", type=Path, default=Path("runs/openings"), help="recipes and statistics")
    p.add_argument("--edits", type=int, nargs="+", default=[100, 1000], help="numbers of active edits")
    p.add_argument("--layer", type=int, help="layer of the edits (default: the highest of the recipe)")
    p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model = load_served_model(Settings(model=args.model, data_dir=args.data, threads=args.threads))
    context = run_to_completion(build_editor_context(model, args.data / "statistics"))
    resolved = resolve_hparams(context.recipe, None, model.num_layers)
    assert isinstance(resolved, RomeParameters)
    layer = max(resolved.layers) if args.layer is None else args.layer
    parameters = resolved.model_copy(update={"layers": (layer,), "form": "gated"})
    records = read_records(args.records or Path(args.model) / "facts.jsonl", 0)
    distinct = list({r.subject: r for r in records if record_fits(r, model.text_encoder)}.values())
    edited, others = distinct[1::2], distinct[::2]
    gates = [
        build_gate(model, context, r, parameters)
        for r in track(edited[: max(args.edits)], "gates", console=console)
    ]
    for count in sorted({min(n, len(edited)) for n in args.edits}):
        active = [
            association_of(g, r, i, model)
            for i, (g, r) in enumerate(zip(gates[:count], edited, strict=False))
        ]
        gate_table = GateTable(gates[0].space, torch.device("cpu"))
        rows = new_gated_rows(gate_table, [gate_table.row(a) for a in active])
        table = Table(title=f"{count} gated edits ({model.name}, layer {layer})", box=box.MARKDOWN)
        for name in ("texts", "number", "own, %", "other, %", "openings per 10,000 tokens"):
            table.add_column(name)
        for texts in classes_of(edited[:count], others, context.corpus.texts):
            table.add_row(*measure(model, rows, texts))
        console.print(table)


if __name__ == "__main__":
    main()
