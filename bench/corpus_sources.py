"""Effect of the corpus of the key statistics on edits: single edits and 100 edits together, for each corpus.

    python bench/corpus_sources.py
    python bench/corpus_sources.py --model FOLDER --records cases.json --data DATA

The value of an edit does not depend on the statistics; its direction does. The recipe is the one that
`palimpsest tune` has written to DATA, else the model's own. The corpora are samples of the model, statements
of facts that are not edited, the prose of this repository's documents, and ten sentences of that prose as a
lower limit.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.evidence import EvidenceExperiment, MethodRow, new_table, percent
from service.covariance.corpus import OWN_SAMPLES
from service.datasets.loading import read_records
from service.datasets.record import true_statements
from service.settings import SHIPPED_MODEL

console = Console(width=150)
ROOT = Path(__file__).resolve().parent.parent
FEW_SENTENCES = 10  # sentences of the smallest source
#: strength 1, so that only the text differs
ROME_ROW = MethodRow("rome", "rome", {})


def documentation_sentences() -> Iterator[str]:
    """Yield the sentences of the repository's documents, which are not in the training text of the models."""
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]):
        text = re.sub(r"```.*?```|`|\|.*", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        yield from (s.strip() for s in re.split(r"(?<=[.:])\s+", text) if len(s.split()) > 4)


def corpus_sources(args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Return the corpora by name, written to files."""
    records = read_records(args.records or Path(args.model) / "facts.jsonl", 0)
    edited = {r.subject for r in records[1::2][: args.limit]}
    files = {
        "statements of other facts": true_statements([r for r in records if r.subject not in edited]),
        "prose of the documents": list(documentation_sentences()),
        f"{FEW_SENTENCES} sentences of it": list(documentation_sentences())[:FEW_SENTENCES],
    }
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"its own samples": Path(OWN_SAMPLES)}
    for name, lines in files.items():
        sources[name] = folder / f"{name.replace(' ', '-')}.txt"
        sources[name].write_text("\n".join(lines), encoding="utf-8")
    return sources


def print_sources(results: dict[str, tuple[dict[str, Any], dict[str, Any]]], table: Table) -> None:
    for name in ("text for the statistics", "S alone", "S joint", "loss increase joint", "norm"):
        table.add_column(name)
    for name, (single, joint) in results.items():
        last = joint["checkpoints"][-1]
        cells = percent(single["after"]["S"], True), percent(last["measures"]["S"], True)
        rise, norm = 100 * last["damage"]["loss_rise"], max(last["norm"].values())
        table.add_row(name, *cells, f"{rise:.1f} %", f"{norm:.2f}")
    console.print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--records", type=Path, help="default: the model's own table")
    p.add_argument("--data", type=Path, default=Path("runs/evidence/data"), help="recipes and statistics")
    p.add_argument("--out", type=Path, default=Path("runs/evidence/sources"))
    p.add_argument("--limit", type=int, default=100, help="number of facts")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--markdown", action="store_true", help="print the table as in docs/evidence.md")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    results: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    out = args.out / Path(args.model).resolve().parent.name / Path(args.model).resolve().name
    for name, corpus in corpus_sources(args, out / "texts").items():
        changes = {
            "corpus": corpus,
            "out": out / name.replace(" ", "-"),
            "suites": None,
            "recall_facts": None,
        }
        options = vars(args) | changes
        experiment = EvidenceExperiment(argparse.Namespace(**options), out / "searches")
        single = experiment.run(ROME_ROW, "single", args.limit, ())
        joint = experiment.run(ROME_ROW, "sequence", args.limit, [args.limit])
        results[name] = (single, joint)
    title = f"{args.limit} edits of {args.model}, by source of the statistics"
    print_sources(results, new_table(title, args.markdown))


if __name__ == "__main__":
    main()
