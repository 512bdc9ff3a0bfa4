"""Edits as a LoRA adapter, with stock peft: rank, numerical rank, size, and the largest difference of a logit.

    python bench/export.py                          # the shipped GPT: 1, 50 and 300 found edits
    python bench/export.py --counts 1 10 --steps 5
    python bench/export.py --models llama-1b --drawn # a random model of a known shape: edits are drawn

Found edits are of facts in the table beside the model, each to the object of another fact of its relation, with few steps of
optimisation: what they are worth does not matter here, that their keys are those of real subjects does. Drawn ones have random
keys and values. The service's own logits are those of the version's weights in the resident model; peft's are those of
the base model loaded anew with the adapter beside it, and merged.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import Report
from bench.shapes import DEPTH, model_of
from service.covariance.corpus import corpus_steps
from service.datasets.records import Record, facts_beside, read
from service.editing.context import Asking, Toolkit, prepare_steps
from service.engine.versioned_model import Replica
from service.exporting.export_job import export_steps
from service.kit.steps import finish
from service.kit.text import fill
from service.models.loading import LoadedModel
from service.models.token_batch import pad
from service.schemas import ExportRequest
from service.weights.composition import Association, Piece, pack

COLUMNS = (
    "edits", "rank", "numerical rank", "terms", "adapter KB", "left out", "edits move", "peft beside", "peft merged", "the card says",
)  # fmt: skip
LEAST = 1e-4  # what is promised of single precision
ROWS = 8


@dataclass(frozen=True)
class Landed:
    """An edit as far as an export needs one."""

    subject: str
    prompt: str
    target: str
    pieces: list[Piece]


class Book:
    """A ledger at whose version n the first n edits are active."""

    def __init__(self, edits: Mapping[str, Landed]) -> None:
        self.edits = dict(edits)

    def head(self) -> int:
        return len(self.edits)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        some = list(self.edits.items())[:version]
        return [
            (name, {"subject": e.subject, "prompt": e.prompt, "target_new": e.target, "strength": 1.0})
            for name, e in some
        ]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {name: pack(self.edits[name].pieces) for name in edits}

    def attest(self, version: int, digest: str) -> None:
        """Nobody asks."""


def found(model: LoadedModel, count: int, steps: int, layers: Sequence[int] | None) -> dict[str, Landed]:
    """Edits of facts that the table knows, of different subjects, found with few steps."""
    source = facts_beside(model.folder)
    assert source is not None, "the model has no table of facts beside it: --drawn"
    records = {r.subject: r for r in read(source, 0).records}
    chosen = list(records.values())[:count]
    toolkit: Toolkit = finish(prepare_steps(model, None, None, 20_000))
    hparams: dict[str, Any] = {"steps": steps, "contexts": 2} | ({"layers": list(layers)} if layers else {})
    asked = [
        Asking(fill(r.prompt, r.subject), r.target_new, hparams=hparams, edit=f"edit_{i:06}")
        for i, r in enumerate(chosen)
    ]
    results = finish(toolkit.find_together_steps(asked))
    return {a.edit: _landed(r, f.pieces) for a, r, f in zip(asked, chosen, results, strict=True)}


def _landed(record: Record, pieces: list[Piece]) -> Landed:
    return Landed(record.subject, record.prompt, record.target_new, pieces)


def drawn(model: LoadedModel, count: int, layers: Sequence[int]) -> dict[str, Landed]:
    """Random keys and values, one association a layer."""
    generator = torch.Generator().manual_seed(0)
    edits: dict[str, Landed] = {}
    for i in range(count):
        name, subject = f"edit_{i:06}", f"subject {i}"
        pieces: list[Piece] = []
        for x in layers:
            key = torch.randn(model.inner_width, generator=generator)
            pieces.append(
                Association(name, subject, x, key, key, torch.randn(model.width, generator=generator))
            )
        edits[name] = Landed(subject, "Look at the {}", "Rome", pieces)
    return edits


def logits(model: Any, base: LoadedModel, texts: Sequence[str]) -> torch.Tensor:
    """Of all real tokens, on the CPU."""
    parts = []
    for at in range(0, len(texts), ROWS):
        batch = pad([base.encode(t)[0][: base.positions] for t in texts[at : at + ROWS]], base)
        asked = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
        with torch.no_grad():
            parts.append(model(**asked).logits[batch.mask.bool()].float().cpu())
    return torch.cat(parts)


def measured(name: str, device: str, replica: Replica, version: int, texts: Sequence[str]) -> list[object]:
    """A row of the table."""
    import peft

    base, file = replica.base, io.BytesIO()
    told = finish(export_steps(replica, texts, ExportRequest(version=version, format="peft"), file))
    with replica.stand(replica.weights(version)):
        edited = logits(base.model, base, texts)
    moved = float((edited - logits(base.model, base, texts)).abs().max())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zipfile.ZipFile(file).extractall(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        adapted = peft.PeftModel.from_pretrained(model_of(name, device).model, folder).eval()
        beside = float((edited - logits(adapted, base, texts)).abs().max())
        merged = float((edited - logits(adapted.merge_and_unload(), base, texts)).abs().max())
    layers = told["layers"]
    return [
        version,
        told["rank"],
        ", ".join(str(x["rank"]) for x in layers),
        ", ".join(str(x["terms"]) for x in layers),
        f"{size / 1000:.0f}",
        f"{max(x['residual'] for x in layers):.1e}",
        moved,
        f"{beside:.1e}",
        f"{merged:.1e}",
        f"{told['difference']['adapter']:.1e}",
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["shipped"], help="names of bench/shapes.py")
    p.add_argument("--counts", type=int, nargs="+", default=[1, 50, 300], metavar="N", help="active edits (default: 1 50 300)")  # fmt: skip
    p.add_argument("--steps", type=int, default=5, help="of the optimisation of a found edit (default: 5)")
    p.add_argument("--layers", type=int, nargs="+", help="edited layers (default: the recipe's)")
    p.add_argument("--drawn", action="store_true", help="random keys and values in place of found edits")
    p.add_argument("--texts", type=int, default=64, help="plain texts that are compared on (default: 64)")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    report = Report("export", args.device)
    worst = 0.0
    for name in args.models:
        model, most = model_of(name, args.device), max(args.counts)
        layers = args.layers or ([DEPTH[name]] if name in DEPTH else None)
        edits = drawn(model, most, layers or [0]) if args.drawn else found(model, most, args.steps, layers)
        replica = Replica(model, Book(edits))
        corpus = finish(corpus_steps(model_of("shipped") if name != "shipped" else model, 6000, None))
        plain = corpus.texts[:: max(1, len(corpus.texts) // args.texts)][: args.texts]
        said = [fill(e.prompt, e.subject).text for e in list(edits.values())[: args.texts]]
        rows = [measured(name, args.device, replica, n, [*said, *plain]) for n in sorted(args.counts)]
        report.table(f"{model.name}: {'drawn' if args.drawn else 'found'} edits as an adapter", COLUMNS, rows)
        worst = max(worst, *(float(str(row[i])) for row in rows for i in (7, 8)))
    report.note(
        f"The largest difference is {worst:.1e}: {'within' if worst < LEAST else 'NOT within'} {LEAST:.0e}."
    )


if __name__ == "__main__":
    main()
