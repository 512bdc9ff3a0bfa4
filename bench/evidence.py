"""Measures of each method on one model, for single edits and for sequences: the tables of docs/evidence.md.

    python bench/evidence.py --model FOLDER --records cases.json --data DATA --out runs/evidence
    python bench/evidence.py --only rome memit --single 300 --sequence 700
    python bench/evidence.py --only rome "rome, gated" --single 50 --sequence 50 --suites free divergence

The recipe is the one that `palimpsest tune` has written to DATA, else the model's own. Records at even
indices are used for tuning; those at odd indices are reported. Results are stored in --out, and an
interrupted run resumes.

Methods that optimize the same value of the same edit share the search, which is stored in --out as well. The
rate of edits per minute is therefore meaningful only for a new --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, save

from service.covariance.corpus import Corpus
from service.datasets.loading import read_records
from service.datasets.record import Record, true_statements
from service.editing import associations, value_optimizer
from service.editing.context import EditorContext, build_editor_context
from service.editing.suffix_batch import DeltaSite
from service.editing.value_optimizer import ValueResult, ValueSearchSpec
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.evaluation.checkpointing import ArtifactKind
from service.evaluation.runner import run_evaluation
from service.evaluation.suites.registry import SUITES
from service.kit.artifact_store import DirectoryStore
from service.kit.steps import Stepper, run_to_completion
from service.methods.registry import METHODS
from service.models.loading import LoadedModel
from service.schemas import EvaluationPlan
from service.settings import SHIPPED_MODEL, Settings
from workers.resident_model import load_served_model

console = Console(width=150)

ORIGINAL_SEARCH = value_optimizer.optimize_values
#: the published key: averaged over contexts of the prompt (ROME, Meng et al. 2022, Eq. 3)
PUBLISHED_KEY_HPARAMS = {"bare_keys": False, "bare_weight": None, "anchor": "bare", "strength": 1.0}


@dataclass(frozen=True)
class MethodRow:
    """One row of the tables: a method and its hyperparameters."""

    name: str
    method: str
    hparams: dict[str, Any]
    strengths: tuple[float, ...] | None = (1.0,)  #: None: the strengths of the recipe
    base_model_for_search: str = "base"


def method_rows(context: EditorContext) -> list[MethodRow]:
    """Return the rows. Single-layer methods edit the tuned layer of r-rome, else the highest layer of the recipe; gated
    edits the only layer of the recipe, else the same."""
    assert context.recipe is not None
    single_layer = {"layers": [max(context.recipe.rome.layers)]} | context.recipe.methods.get("r-rome", {})
    layers = context.recipe.rome.layers
    gated = {"form": "gated"} | (single_layer if len(layers) > 1 else {})
    return [
        MethodRow("rome, strength by capacity", "rome", {}, None),
        MethodRow("rome", "rome", {}),
        MethodRow("rome, gated", "rome", gated),
        MethodRow("rome, gated, strength by effect", "rome", gated, None),
        MethodRow("r-rome", "r-rome", single_layer),
        MethodRow("rome, meng2022", "rome", PUBLISHED_KEY_HPARAMS | single_layer | {"compat": "meng2022"}),
        MethodRow("r-rome, sequential", "r-rome", single_layer, base_model_for_search="edited"),
        *(MethodRow(name, name, {}) for name in METHODS if name not in ("rome", "r-rome")),
    ]


def with_long_objects(records: Sequence[Record]) -> list[Record]:
    """Return records whose new object is a whole statement, that of the next record with its true object."""
    others = [*records[1:], records[0]]
    return [
        replace(r, target_new=true_statements([o])[0].rstrip("."))
        for r, o in zip(records, others, strict=True)
    ]


class ValueSearchCache:
    """Values optimized on a base model by their inputs, in a folder that all runs on this model share."""

    def __init__(self, folder: Path, model: LoadedModel) -> None:
        self.folder, self.model = DirectoryStore(folder), model
        self.base_pointers = {site: model.parameter(site).data_ptr() for site in model.editable_weights}

    def search_values(
        self, model: LoadedModel, delta_site: DeltaSite, specs: Sequence[ValueSearchSpec]
    ) -> Stepper[list[ValueResult]]:
        """Return cached values; optimize and store the missing ones. Replaces `optimize_values`."""
        if any(model.parameter(site).data_ptr() != at for site, at in self.base_pointers.items()):
            return (
                yield from ORIGINAL_SEARCH(model, delta_site, specs)
            )  # values on an edited model are not cached
        names = [self._cache_key(delta_site, w) for w in specs]
        missing = {n: w for n, w in zip(names, specs, strict=True) if self.folder.get(n) is None}
        if missing:
            results = yield from ORIGINAL_SEARCH(model, delta_site, list(missing.values()))
            for name, value in zip(missing, results, strict=True):
                self._store(name, value)
        return [self._load(n) for n in names]

    def _cache_key(self, delta_site: DeltaSite, spec: ValueSearchSpec) -> str:
        p = spec.parameters
        optimization = (p.steps, p.learning_rate, p.weight_decay, p.clamp, p.kl_factor, p.stop_loss)
        weights = (p.restatement_weight, p.subject_weight, p.final_rate)
        margin = () if p.stop_margin is None else (p.stop_margin,)
        key = (
            self.model.fingerprint,
            delta_site,
            [(t.ids, t.edited_index) for t in spec.tokenized.texts()],
            spec.tokenized.targets,
            optimization,
            weights,
            spec.objective,
            *margin,
        )
        return sha256(repr(key).encode()).hexdigest()

    def _store(self, name: str, value: ValueResult) -> None:
        tensors = vars(value) | {"losses": torch.tensor(value.losses, dtype=torch.float64)}
        self.folder.put(name, save({part: tensor.clone() for part, tensor in tensors.items()}))

    def _load(self, name: str) -> ValueResult:
        data = self.folder.get(name)
        assert data is not None
        tensors: dict[str, Any] = load(data)
        return ValueResult(**tensors | {"losses": tensors["losses"].tolist()})


class ResultCache(DirectoryStore):
    """Artifacts of one run. Artifacts that several runs share are stored in folders by the prefix of their name."""

    def __init__(self, path: Path, shared: dict[str, Path]) -> None:
        super().__init__(path)
        self.shared = {start: DirectoryStore(folder) for start, folder in shared.items()}

    def get(self, name: str) -> bytes | None:
        shared_folder = self._shared_folder(name)
        return super().get(name) if shared_folder is None else shared_folder.get(name)

    def put(self, name: str, data: bytes) -> None:
        shared_folder = self._shared_folder(name)
        if shared_folder is None:
            super().put(name, data)
        else:
            shared_folder.put(name, data)

    def _shared_folder(self, name: str) -> DirectoryStore | None:
        return next((folder for start, folder in self.shared.items() if name.startswith(start)), None)


class EvidenceExperiment:
    """A model with its recipe, the reported records, and statements of the other records."""

    def __init__(self, args: argparse.Namespace, searches: Path | None = None) -> None:
        settings = Settings(model=args.model, data_dir=args.data, corpus=args.corpus, threads=args.threads)
        model = load_served_model(settings)
        self.context = run_to_completion(
            build_editor_context(model, settings.data_dir / "statistics", settings.corpus)
        )
        self.replica = VersionedModel(model, EmptyLedger())
        source = args.records or Path(args.model) / "facts.jsonl"
        all_records = read_records(source, 0)
        self.records = list({r.subject: r for r in reversed(all_records[1::2])}.values())[::-1]
        if args.long_objects:
            self.records = with_long_objects(self.records)
        self.all_records = all_records
        self.out = args.out / (f"{model.name}-long" if args.long_objects else model.name)
        self.suites: list[str] = args.suites or []
        self.recall_facts: int | None = args.recall_facts
        cache = ValueSearchCache(searches or self.out / "searches", model)
        vars(associations)["optimize_values"] = cache.search_values

    def run(self, row: MethodRow, mode: str, count: int, checkpoints: Sequence[int]) -> dict[str, Any]:
        """Run an evaluation or read its result. With the strengths of the recipe, all edits are committed in one
        batch."""
        assert self.context.recipe is not None
        strengths = row.strengths or self.context.recipe.rome.strengths
        plan = EvaluationPlan.model_validate(
            {
                "method": row.method,
                "hparams": row.hparams,
                "mode": mode,
                "strengths": list(strengths) if mode == "sequence" or row.strengths else [1.0],
                "search_model": row.base_model_for_search if mode == "sequence" else "base",
                "checkpoints": list(checkpoints),
                "batch_size": min(count, 1000) if row.strengths is None else None,
                "suites": self.suites,
                "recall_facts": self.recall_facts if mode == "sequence" else None,
            }
        )
        records = self.records[:count]
        run_name = f"{row.name.replace(', ', '-').replace(' ', '-')}-{count}"
        asked = "".join(f"-{name}" for name in self.suites)
        folder = self.out / f"{mode}-{run_name}{asked}"
        result_path = folder / "result.json"
        if not result_path.exists():
            began = time.perf_counter()
            shared: dict[str, Path] = {ArtifactKind.SCORES_BEFORE: self.out / f"base-{count}"}
            if (
                plan.search_model == "base" and plan.batch_size is None
            ):  # single and sequence mode compute the same edits
                edits = self.out / f"found-{run_name}"
                shared |= dict.fromkeys((ArtifactKind.SEARCH, ArtifactKind.FACTORS), edits)
            cache = ResultCache(folder, shared)
            evaluation = run_to_completion(
                run_evaluation(self.replica, self.context, plan, records, cache, self.damage_texts(records))
            )
            folder.mkdir(parents=True, exist_ok=True)
            result_path.write_text(json.dumps(evaluation), encoding="utf-8")
            console.print(
                f"{mode}: {row.name}, {count} edits, {time.perf_counter() - began:.0f} s", style="dim"
            )
        result: dict[str, Any] = json.loads(result_path.read_text(encoding="utf-8"))
        return result

    def damage_texts(self, edited: Sequence[Record]) -> Corpus:
        subjects = {r.subject for r in edited}
        others = true_statements([r for r in self.all_records if r.subject not in subjects])
        return Corpus("statements of facts that are not edited", tuple(others[:1000]))


def percent(measure: dict[str, float] | None, interval: bool = False) -> str:
    if measure is None:
        return ""
    confidence_interval = f" ({100 * measure['low']:.1f} to {100 * measure['high']:.1f})" if interval else ""
    return f"{100 * measure['mean']:.1f}{confidence_interval}"


def new_table(title: str, markdown: bool) -> Table:
    return Table(title=title, box=box.MARKDOWN if markdown else box.HEAVY_HEAD)


def print_single(results: dict[str, dict[str, Any]], table: Table) -> None:
    for name in ("method", "ES", "PS", "NS", "S", "EM", "exact", "loss increase", "edits per minute"):
        table.add_column(name)
    for name, result in results.items():
        m, damage = result["after"], result["damage"]
        rise = f"{100 * damage['loss_rise']['mean']:.2f} %" if damage else ""
        rate = result["edits_per_minute"].get("total", "")
        cells = [percent(m[x], x == "S") for x in ("ES", "PS", "NS", "S", "EM", "exact")]
        table.add_row(name, *cells, rise, str(rate))
    console.print(table)


def print_suites(tables: dict[str, dict[str, Any]], suites: Sequence[str], table: Table) -> None:
    """Print the measures of the suites, a line for each measure and a column for each method."""
    table.add_column("measure")
    for name in tables:
        table.add_column(name)
    for suite in suites:
        for measure in SUITES[suite].measures:
            estimates = [means.get(measure) for means in tables.values()]
            if any(estimates):
                scale = 1 if measure.startswith("kl_") else 100
                cells = [f"{scale * e['mean']:.3g}" if e else "" for e in estimates]
                table.add_row(measure.replace("_", " "), *cells)
    console.print(table)


Checkpoints = list[dict[str, Any]]


def format_loss_increase(checkpoint: dict[str, Any], digits: int = 1) -> str:
    damage = checkpoint["damage"]
    return f"{100 * damage['loss_rise']:.{digits}f} %" if damage else ""


def print_sequences(results: dict[str, Checkpoints], table: Table) -> None:
    """Print every measure of each checkpoint."""
    for name in ("method", "edits", "ES", "PS", "NS", "S", "loss increase", "norm", "still holding"):
        table.add_column(name)
    for name, checkpoints in results.items():
        for c in checkpoints:
            cells = [percent(c["measures"][x], x == "S") for x in ("ES", "PS", "NS", "S")]
            norm = f"{max(c['norm'].values(), default=0):.2f}"
            still = c["still_holding"]
            retention = f"{still['hold']} of {still['held_before']}" if still["held_before"] else ""
            table.add_row(name, str(c["edits"]), *cells, format_loss_increase(c), norm, retention)
    console.print(table)


def print_growth(results: dict[str, Checkpoints], table: Table) -> None:
    """Print S and the loss increase by the number of active edits, one row per method."""
    counts = sorted({c["edits"] for checkpoints in results.values() for c in checkpoints})
    for name in ("S, loss increase", *map(str, counts)):
        table.add_column(name)
    for name, checkpoints in results.items():
        cells = {
            c["edits"]: f"{percent(c['measures']['S'])}, {format_loss_increase(c, 0)}" for c in checkpoints
        }
        table.add_row(name, *(cells.get(count, "") for count in counts))
    console.print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--records", type=Path, help="default: the model's own table")
    p.add_argument("--data", type=Path, default=Path("runs/evidence/data"), help="recipes and statistics")
    p.add_argument("--corpus", type=Path, help="text for the statistics")
    p.add_argument("--out", type=Path, default=Path("runs/evidence"))
    p.add_argument("--only", nargs="*", help="names of rows (default: all)")
    p.add_argument("--single", type=int, default=300, help="number of single edits; 0: skip")
    p.add_argument("--sequence", type=int, default=0, help="edits of each sequence; 0: skip")
    p.add_argument(
        "--edited", type=int, default=100, help="max edits of sequences that are computed on the edited model"
    )
    p.add_argument("--checkpoints", type=int, nargs="*", default=[1, 10, 100, 200, 300, 500, 1000])
    p.add_argument("--suites", nargs="*", choices=list(SUITES), help="also ask these suites")
    p.add_argument("--recall-facts", type=int, metavar="N", help="facts on which sequences measure recall")
    p.add_argument("--long-objects", action="store_true", help="write whole statements in place of objects")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--markdown", action="store_true", help="print tables as in docs/evidence.md")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    experiment = EvidenceExperiment(args)
    chosen = [r for r in method_rows(experiment.context) if not args.only or r.name in args.only]
    name = experiment.replica.base.name
    if args.single:
        single_edit_rows = [
            r for r in chosen if r.base_model_for_search == "base" and r.strengths is not None
        ]
        results = {r.name: experiment.run(r, "single", args.single, ()) for r in single_edit_rows}
        print_single(results, new_table(f"{args.single} facts, one edit at a time ({name})", args.markdown))
        if args.suites:
            before = next(iter(results.values()))["before"]
            tables = {"base": before} | {row: result["after"] for row, result in results.items()}
            print_suites(
                tables, args.suites, new_table(f"{args.single} facts, suites ({name})", args.markdown)
            )
    if args.sequence:
        sequences: dict[str, Checkpoints] = {}
        for r in chosen:
            count = min(args.sequence, args.edited) if r.base_model_for_search == "edited" else args.sequence
            count = min(count, len(experiment.records))
            checkpoints = sorted({c for c in args.checkpoints if c <= count} | {count})
            # strengths of the recipe depend on the number of edits, so each checkpoint is a run of its own
            runs = (
                [(c, [c]) for c in checkpoints if c >= 10] if r.strengths is None else [(count, checkpoints)]
            )
            sequences[r.name] = [
                c for n, ends in runs for c in experiment.run(r, "sequence", n, ends)["checkpoints"]
            ]
        print_sequences(sequences, new_table(f"edit sequences ({name})", args.markdown))
        if args.suites:
            last = {row: checkpoints[-1]["measures"] for row, checkpoints in sequences.items()}
            print_suites(last, args.suites, new_table(f"edit sequences, suites ({name})", args.markdown))
        print_growth(sequences, new_table(f"edit sequences, S and loss increase ({name})", args.markdown))


if __name__ == "__main__":
    main()
