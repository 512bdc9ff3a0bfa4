"""Edits exported as a LoRA adapter and loaded with peft: ranks, size, and the largest logit difference.

    python bench/export.py                          # the shipped GPT: 1, 50 and 300 edits
    python bench/export.py --counts 1 10 --steps 5
    python bench/export.py --models llama-1b --random # a random model with random edits

Edits change facts of the model's table to the object of another fact of the relation, with few optimization
steps. Their quality is not measured; only their keys must be those of real subjects. With --random, keys and
values are random. The logits of the service are those of the version's weights in the resident model. They
are compared with the base model loaded again with the adapter, unmerged and merged.
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
from bench.model_shapes import EDIT_LAYERS, build_model
from service.covariance.corpus import load_corpus
from service.datasets.fact_table import find_facts_file
from service.datasets.loading import load_records
from service.datasets.record import Record
from service.editing.context import EditInput, EditorContext, build_editor_context
from service.engine.versioned_model import VersionedModel
from service.exporting.export_job import export_version
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.models.loading import LoadedModel
from service.models.token_batch import pad
from service.schemas import WorkerExportRequest
from service.weights.factors import Association, EditUpdate, serialize_updates

COLUMNS = (
    "edits", "rank", "numerical rank", "terms", "adapter KB", "residual", "edit difference", "peft unmerged", "peft merged", "model card",
)  # fmt: skip
TOLERANCE = 1e-4  # guaranteed for fp32
BATCH_ROWS = 8


@dataclass(frozen=True)
class ExportEdit:
    """The fields of an edit that an export uses."""

    subject: str
    prompt: str
    target: str
    pieces: list[EditUpdate]


class InMemoryLedger:
    """A ledger in memory. Version n has the first n edits."""

    def __init__(self, edits: Mapping[str, ExportEdit]) -> None:
        self.edits = dict(edits)

    def head(self) -> int:
        return len(self.edits)

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        active = list(self.edits.items())[:version]
        return [
            (name, {"subject": e.subject, "prompt": e.prompt, "target_new": e.target, "strength": 1.0})
            for name, e in active
        ]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {name: serialize_updates(self.edits[name].pieces) for name in edits}

    def gate_space(self, digest: str) -> bytes:
        raise KeyError(digest)

    def attest(self, version: int, digest: str) -> None:
        """Accept every digest."""


def compute_edits(
    model: LoadedModel, count: int, steps: int, layers: Sequence[int] | None
) -> dict[str, ExportEdit]:
    """Return edits of facts of different subjects, computed with few optimization steps."""
    source = find_facts_file(model.path)
    assert source is not None, "the model has no table of facts: use --random"
    records = {r.subject: r for r in load_records(source, 0).records}
    chosen = list(records.values())[:count]
    toolkit: EditorContext = run_to_completion(build_editor_context(model, None, None, 20_000))
    hparams: dict[str, Any] = {"steps": steps, "contexts": 2} | ({"layers": list(layers)} if layers else {})
    specs = [
        EditInput(fill_prompt(r.prompt, r.subject), r.target_new, hparams=hparams, edit=f"edit_{i:06}")
        for i, r in enumerate(chosen)
    ]
    results = run_to_completion(toolkit.find_all_factors(specs))
    return {a.edit: _export_edit(r, f.updates) for a, r, f in zip(specs, chosen, results, strict=True)}


def _export_edit(record: Record, pieces: list[EditUpdate]) -> ExportEdit:
    return ExportEdit(record.subject, record.prompt, record.target_new, pieces)


def random_edits(model: LoadedModel, count: int, layers: Sequence[int]) -> dict[str, ExportEdit]:
    """Return edits with random keys and values, one association per layer."""
    generator = torch.Generator().manual_seed(0)
    edits: dict[str, ExportEdit] = {}
    for i in range(count):
        name, subject = f"edit_{i:06}", f"subject {i}"
        pieces: list[EditUpdate] = []
        for x in layers:
            key = torch.randn(model.intermediate_size, generator=generator)
            pieces.append(
                Association(name, subject, x, key, key, torch.randn(model.hidden_size, generator=generator))
            )
        edits[name] = ExportEdit(subject, "Look at the {}", "Rome", pieces)
    return edits


def logits(model: Any, base: LoadedModel, texts: Sequence[str]) -> torch.Tensor:
    """Return the logits (N, V) of all tokens without padding, fp32, on the CPU."""
    parts = []
    for start in range(0, len(texts), BATCH_ROWS):
        batch = pad(
            [base.encode(t)[0][: base.max_positions] for t in texts[start : start + BATCH_ROWS]], base
        )
        inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "position_ids": batch.positions}
        with torch.no_grad():
            parts.append(model(**inputs).logits[batch.mask.bool()].float().cpu())
    return torch.cat(parts)


def measure_adapter(
    name: str, device: str, replica: VersionedModel, version: int, texts: Sequence[str]
) -> list[object]:
    """Export a version, load it with peft, and return a row of the table."""
    import peft

    base, file = replica.base, io.BytesIO()
    manifest = run_to_completion(
        export_version(replica, texts, WorkerExportRequest(version=version, format="peft"), file)
    )
    with replica.use_patch(replica.patch(version)):
        edited = logits(base.model, base, texts)
    edit_difference = float((edited - logits(base.model, base, texts)).abs().max())
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zipfile.ZipFile(file).extractall(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        adapted = peft.PeftModel.from_pretrained(build_model(name, device).model, folder).eval()
        adapter_difference = float((edited - logits(adapted, base, texts)).abs().max())
        merged_difference = float((edited - logits(adapted.merge_and_unload(), base, texts)).abs().max())
    layers = manifest["layers"]
    return [
        version,
        manifest["rank"],
        ", ".join(str(x["rank"]) for x in layers),
        ", ".join(str(x["terms"]) for x in layers),
        f"{size / 1000:.0f}",
        f"{max(x['residual'] for x in layers):.1e}",
        edit_difference,
        f"{adapter_difference:.1e}",
        f"{merged_difference:.1e}",
        f"{manifest['difference']['export']:.1e}",
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--models", nargs="+", default=["shipped"], help="names of bench/model_shapes.py")
    p.add_argument("--counts", type=int, nargs="+", default=[1, 50, 300], metavar="N", help="active edits (default: 1 50 300)")  # fmt: skip
    p.add_argument("--steps", type=int, default=5, help="optimization steps of an edit (default: 5)")
    p.add_argument("--layers", type=int, nargs="+", help="edited layers (default: the recipe's)")
    p.add_argument("--random", action="store_true", help="edits with random keys and values")
    p.add_argument("--texts", type=int, default=64, help="texts to compare logits on (default: 64)")
    p.add_argument("--device", default="cpu")
    args = p.parse_args()
    report = Report("export", args.device)
    max_difference = 0.0
    for name in args.models:
        model, max_count = build_model(name, args.device), max(args.counts)
        layers = args.layers or ([EDIT_LAYERS[name]] if name in EDIT_LAYERS else None)
        edits = (
            random_edits(model, max_count, layers or [0])
            if args.random
            else compute_edits(model, max_count, args.steps, layers)
        )
        replica = VersionedModel(model, InMemoryLedger(edits))
        corpus = run_to_completion(
            load_corpus(build_model("shipped") if name != "shipped" else model, 6000, None)
        )
        plain_texts = corpus.texts[:: max(1, len(corpus.texts) // args.texts)][: args.texts]
        edit_texts = [fill_prompt(e.prompt, e.subject).text for e in list(edits.values())[: args.texts]]
        rows = [
            measure_adapter(name, args.device, replica, n, [*edit_texts, *plain_texts])
            for n in sorted(args.counts)
        ]
        report.add_table(
            f"{model.name}: {'random' if args.random else 'computed'} edits as an adapter", COLUMNS, rows
        )
        max_difference = max(max_difference, *(float(str(row[i])) for row in rows for i in (7, 8)))
    report.add_note(
        f"The largest difference is {max_difference:.1e}: {'within' if max_difference < TOLERANCE else 'NOT within'} {TOLERANCE:.0e}."
    )


if __name__ == "__main__":
    main()
