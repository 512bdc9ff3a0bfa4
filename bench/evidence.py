"""Methods x measures on one model: single edits, and sequences with their checkpoints; the tables of docs/evidence.md.

    python bench/evidence.py --model FOLDER --records cases.json --data DATA --out runs/evidence
    python bench/evidence.py --only rome memit --single 300 --sequence 700

The recipe is the one that `palimpsest prepare` has written into DATA, else the model's own. Records at even places are for
tuning; those at odd places are reported. Everything is kept in --out, and a run that was interrupted goes on where it was.

Methods that look for the same value of the same edit share the search, which is kept in --out, too: what they do with it is
what is compared. How many edits a minute are found is therefore to be read where nothing was found before (a new --out).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load, save

from service.covariance.corpus import Corpus
from service.datasets.records import Record, read_records, statements
from service.editing import value_optimizer
from service.editing.context import Toolkit, prepare_steps
from service.editing.methods import rome
from service.editing.value_optimizer import Place, Value, Wish
from service.engine.versioned_model import NoLedger, Replica
from service.evaluation.runner import evaluate_steps
from service.kit.artifact_store import Folder
from service.kit.steps import Steps, finish
from service.models.loading import LoadedModel
from service.schemas import EvaluationPlan
from service.settings import SHIPPED_MODEL, Settings
from workers.resident_model import resident

console = Console(width=150)

SEARCH = value_optimizer.values_steps
#: the published key: averaged over contexts, of the prompt alone
PUBLISHED = {"bare_keys": False, "bare_weight": None, "anchor": "bare", "strength": 1.0}


@dataclass(frozen=True)
class Row:
    """One line of the tables: a method and how it is asked for."""

    name: str
    method: str
    hparams: dict[str, Any]
    strengths: tuple[float, ...] | None = (1.0,)  #: None: those of the recipe
    found_on: str = "base"


def rows(toolkit: Toolkit) -> list[Row]:
    """Every method. Those with one layer edit where r-rome was found to edit best, else the highest of the recipe's."""
    assert toolkit.recipe is not None
    one = {"layers": [max(toolkit.recipe.rome.layers)]} | toolkit.recipe.methods.get("r-rome", {})
    return [
        Row("rome, strength as room allows", "rome", {}, None),
        Row("rome", "rome", {}),
        Row("r-rome", "r-rome", one),
        Row("rome, meng2022", "rome", PUBLISHED | one | {"compat": "meng2022"}),
        Row("r-rome, one after another", "r-rome", one, found_on="edited"),
        Row("memit", "memit", {}),
        Row("emmet", "emmet", {}),
        Row("alphaedit", "alphaedit", {}),
        Row("ft", "ft", {}),
        Row("ft-l", "ft-l", {}),
        Row("ft-attn", "ft-attn", {}),
    ]


class Searches:
    """What was found on a base model, by what was asked for: in a folder that all runs on this model share."""

    def __init__(self, folder: Path, model: LoadedModel) -> None:
        self.folder, self.model = Folder(folder), model
        self.base = {site: model.parameter(site).data_ptr() for site in model.sites}

    def steps(self, model: LoadedModel, place: Place, wishes: Sequence[Wish]) -> Steps[list[Value]]:
        """In the place of the search itself: looks for what is not known."""
        if any(model.parameter(site).data_ptr() != at for site, at in self.base.items()):
            return (yield from SEARCH(model, place, wishes))  # an edited model has values of its own
        names = [self._name(place, w) for w in wishes]
        missing = {n: w for n, w in zip(names, wishes, strict=True) if self.folder.get(n) is None}
        if missing:
            found = yield from SEARCH(model, place, list(missing.values()))
            for name, value in zip(missing, found, strict=True):
                self._keep(name, value)
        return [self._known(n) for n in names]

    def _name(self, place: Place, wish: Wish) -> str:
        p = wish.parameters
        loss = (p.steps, p.learning_rate, p.weight_decay, p.clamp, p.kl_factor, p.stop_loss, wish.objective)
        asked = (self.model.fingerprint, place, [t.ids for t in wish.rows.texts()], wish.rows.targets, loss)
        return sha256(repr(asked).encode()).hexdigest()

    def _keep(self, name: str, value: Value) -> None:
        said = vars(value) | {"losses": torch.tensor(value.losses, dtype=torch.float64)}
        self.folder.put(name, save({part: tensor.clone() for part, tensor in said.items()}))

    def _known(self, name: str) -> Value:
        data = self.folder.get(name)
        assert data is not None
        said: dict[str, Any] = load(data)
        return Value(**said | {"losses": said["losses"].tolist()})


class Shelf(Folder):
    """What one run of a line keeps. What several runs come to alike is kept once, in folders by how its name begins."""

    def __init__(self, path: Path, shared: dict[str, Path]) -> None:
        super().__init__(path)
        self.shared = {start: Folder(folder) for start, folder in shared.items()}

    def get(self, name: str) -> bytes | None:
        other = self._other(name)
        return super().get(name) if other is None else other.get(name)

    def put(self, name: str, data: bytes) -> None:
        other = self._other(name)
        if other is None:
            super().put(name, data)
        else:
            other.put(name, data)

    def _other(self, name: str) -> Folder | None:
        return next((folder for start, folder in self.shared.items() if name.startswith(start)), None)


class Lab:
    """A model with its recipe, the records that are reported, and plain statements of the others."""

    def __init__(self, args: argparse.Namespace, searches: Path | None = None) -> None:
        settings = Settings(model=args.model, data=args.data, corpus=args.corpus, threads=args.threads)
        model = resident(settings)
        self.toolkit = finish(prepare_steps(model, settings.data / "statistics", settings.corpus))
        self.replica = Replica(model, NoLedger())
        source = args.records or Path(args.model) / "facts.jsonl"
        every = read_records(source, 0)
        self.records = list({r.subject: r for r in reversed(every[1::2])}.values())[::-1]
        self.every, self.out = every, args.out / model.name
        rome.values_steps = Searches(searches or self.out / "searches", model).steps

    def run(self, row: Row, mode: str, count: int, checkpoints: Sequence[int]) -> dict[str, Any]:
        """One evaluation, carried out or read. Edits whose strength depends on how many there are land in one company."""
        assert self.toolkit.recipe is not None
        strengths = row.strengths or self.toolkit.recipe.rome.strengths
        plan = EvaluationPlan.model_validate(
            {
                "method": row.method,
                "hparams": row.hparams,
                "mode": mode,
                "strengths": list(strengths) if mode == "sequence" or row.strengths else [1.0],
                "found_on": row.found_on if mode == "sequence" else "base",
                "checkpoints": list(checkpoints),
                "together": min(count, 1000) if row.strengths is None else None,
            }
        )
        records = self.records[:count]
        line = f"{row.name.replace(', ', '-').replace(' ', '-')}-{count}"
        folder = self.out / f"{mode}-{line}"
        done = folder / "result.json"
        if not done.exists():
            began = time.perf_counter()
            shared = {"base-": self.out / f"base-{count}"}  # what the base says to these records
            if (
                plan.found_on == "base" and plan.together is None
            ):  # alone or in a sequence, the edits are the same
                shared |= dict.fromkeys(("found-", "piece-"), self.out / f"found-{line}")
            shelf = Shelf(folder, shared)
            found = finish(
                evaluate_steps(self.replica, self.toolkit, plan, records, shelf, self.plain(records))
            )
            folder.mkdir(parents=True, exist_ok=True)
            done.write_text(json.dumps(found), encoding="utf-8")
            console.print(
                f"{mode}: {row.name}, {count} edits, {time.perf_counter() - began:.0f} s", style="dim"
            )
        result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return result

    def plain(self, edited: Sequence[Record]) -> Corpus:
        subjects = {r.subject for r in edited}
        others = statements([r for r in self.every if r.subject not in subjects])
        return Corpus("statements of facts that are not edited", tuple(others[:1000]))


def percent(found: dict[str, float] | None, interval: bool = False) -> str:
    if found is None:
        return ""
    ends = f" ({100 * found['low']:.1f} to {100 * found['high']:.1f})" if interval else ""
    return f"{100 * found['mean']:.1f}{ends}"


def new_table(title: str, markdown: bool) -> Table:
    return Table(title=title, box=box.MARKDOWN if markdown else box.HEAVY_HEAD)


def show_single(results: dict[str, dict[str, Any]], table: Table) -> None:
    for name in ("method", "ES", "PS", "NS", "S", "EM", "exact", "rise of loss", "edits a minute"):
        table.add_column(name)
    for name, found in results.items():
        m, damage = found["after"], found["damage"]
        rise = f"{100 * damage['loss_rise']['mean']:.2f} %" if damage else ""
        rate = found["edits_per_minute"].get("all", "")
        cells = [percent(m[x], x == "S") for x in ("ES", "PS", "NS", "S", "EM", "exact")]
        table.add_row(name, *cells, rise, str(rate))
    console.print(table)


Checkpoints = list[dict[str, Any]]


def rise_of(checkpoint: dict[str, Any], digits: int = 1) -> str:
    damage = checkpoint["damage"]
    return f"{100 * damage['loss_rise']:.{digits}f} %" if damage else ""


def show_sequences(results: dict[str, Checkpoints], table: Table) -> None:
    """All that there is to say of each checkpoint."""
    for name in ("method", "edits", "ES", "PS", "NS", "S", "rise of loss", "norm", "still hold"):
        table.add_column(name)
    for name, checkpoints in results.items():
        for c in checkpoints:
            cells = [percent(c["measures"][x], x == "S") for x in ("ES", "PS", "NS", "S")]
            norm = f"{max(c['norm'].values(), default=0):.2f}"
            still = c["still"]
            kept = f"{still['hold']} of {still['held_before']}" if still["held_before"] else ""
            table.add_row(name, str(c["edits"]), *cells, rise_of(c), norm, kept)
    console.print(table)


def show_growth(results: dict[str, Checkpoints], table: Table) -> None:
    """S and the rise of the loss by how many edits are active: a line for each method."""
    counts = sorted({c["edits"] for checkpoints in results.values() for c in checkpoints})
    for name in ("S, rise of loss", *map(str, counts)):
        table.add_column(name)
    for name, checkpoints in results.items():
        cells = {c["edits"]: f"{percent(c['measures']['S'])}, {rise_of(c, 0)}" for c in checkpoints}
        table.add_row(name, *(cells.get(count, "") for count in counts))
    console.print(table)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=str(SHIPPED_MODEL))
    p.add_argument("--records", type=Path, help="the model's own table when left out")
    p.add_argument("--data", type=Path, default=Path("runs/evidence/data"), help="recipes and statistics")
    p.add_argument("--corpus", type=Path, help="text for the statistics")
    p.add_argument("--out", type=Path, default=Path("runs/evidence"))
    p.add_argument("--only", nargs="*", help="some of the lines, by name")
    p.add_argument("--single", type=int, default=300, help="single edits; 0: none")
    p.add_argument("--sequence", type=int, default=0, help="edits of the sequences; 0: none")
    p.add_argument("--edited", type=int, default=100, help="edits that are found one after another, at most")
    p.add_argument("--checkpoints", type=int, nargs="*", default=[1, 10, 100, 200, 300, 500, 1000])
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--markdown", action="store_true", help="tables as docs/evidence.md has them")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    lab = Lab(args)
    chosen = [r for r in rows(lab.toolkit) if not args.only or r.name in args.only]
    name = lab.replica.base.name
    if args.single:
        alone = [r for r in chosen if r.found_on == "base" and r.strengths is not None]
        found = {r.name: lab.run(r, "single", args.single, ()) for r in alone}
        show_single(found, new_table(f"{args.single} facts, one edit at a time ({name})", args.markdown))
    if args.sequence:
        sequences: dict[str, Checkpoints] = {}
        for r in chosen:
            count = min(args.sequence, args.edited) if r.found_on == "edited" else args.sequence
            count = min(count, len(lab.records))
            at = sorted({c for c in args.checkpoints if c <= count} | {count})
            # where strengths depend on how many edits there are, each number of them is a company of its own
            runs = [(c, [c]) for c in at if c >= 10] if r.strengths is None else [(count, at)]
            sequences[r.name] = [
                c for n, ends in runs for c in lab.run(r, "sequence", n, ends)["checkpoints"]
            ]
        show_sequences(sequences, new_table(f"edits one after another ({name})", args.markdown))
        show_growth(sequences, new_table(f"edits one after another, in short ({name})", args.markdown))


if __name__ == "__main__":
    main()
