"""`prepare`: find a recipe for a model by editing facts that it knows; computed here, and gone on with when it was interrupted."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.evaluate import ENOUGH, chosen, others_of
from cli.flags import read_settings
from cli.local_model import FACTS, shown, table_of, unstarted
from cli.terminal import err, out, plain, print_json, table
from service.datasets.records import Record, read
from service.errors import InvalidInput
from service.kit.artifact_store import Folder
from service.recipes.recipe import METHODS
from service.settings import SHIPPED_MODEL, Settings

if TYPE_CHECKING:
    from service.models.loading import LoadedModel
    from service.tuning.recipe_search import Preparation

COLUMNS = ("stage", "tried", "ES", "PS", "NS", "S alone", "S at once", "rise of loss", "merit")
PREPARED = "prepared"  # folder of what a later run goes on with


def run(args: argparse.Namespace) -> int:
    """Find a recipe, write it where the worker finds it, and show what it was chosen by."""
    settings, methods = read_settings(args, Settings), methods_of(args.methods)
    records = read(facts_of(args.facts, settings.model), args.seed).records
    edited = chosen(records, args)
    model = unstarted(settings)
    from service.editing.context import RECIPES, recipe_file
    from service.tuning.recipe_search import START, known_steps, reading_steps, wants_start

    many = shown(known_steps(model, edited, max(args.most, args.many)))
    known = many[: args.most]
    reading = shown(reading_steps(model, known))
    start = wants_start(model, reading)
    for name, log_p in reading.items():
        err.print(plain(f"Facts are read with a mean log-probability of {log_p:.3f} {name}."))
    found = prepared(model, settings, known, many if args.many else [], records, start, methods)
    path = recipe_file(model, settings.data / RECIPES)
    path.parent.mkdir(parents=True, exist_ok=True)
    recipe = found.recipe.model_dump_json(indent=1)
    path.write_text(recipe, encoding="utf-8")
    if args.json:
        print_json({"recipe": json.loads(recipe), "tried": found.history, "path": str(path)})
        return 0
    out.print(table("", COLUMNS, [row(h, START) for h in found.history]))
    out.print(plain(f"The recipe: {found.recipe.rome.model_dump_json(exclude_defaults=True)}"))
    err.print(
        plain(f"It stands in {path}, where `palimpsest serve` and `work` find it with this data folder.")
    )
    return 0


def prepared(
    model: LoadedModel,
    settings: Settings,
    known: list[Record],
    many: list[Record],
    records: list[Record],
    start: bool,
    methods: tuple[str, ...],
) -> Preparation:
    """The search, under a bar; what was tried is kept in the data folder."""
    from service.editing.context import prepare_steps
    from service.models.loading import with_start
    from service.tuning.recipe_search import recipe_steps

    reader = with_start(model) if start else model
    statistics = settings.data / "statistics"
    toolkit = shown(prepare_steps(reader, statistics, settings.corpus, settings.stat_tokens))
    others = others_of(records, [*known, *many])
    if len(others) < ENOUGH:
        others = list(toolkit.corpus.texts)
    about = [reader.fingerprint, toolkit.corpus.digest, [r.name + r.subject for r in [*known, *many]], others]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    kept = Folder(settings.data / PREPARED / digest)
    return shown(recipe_steps(reader, toolkit, known, others, kept, start, methods, many))


def facts_of(source: str | None, model: str) -> Path:
    """A file by its name; else the table beside the model; else that of the shipped model, whose facts many models know."""
    if source is not None:
        return table_of(source, model)
    beside = Path(model) / FACTS
    return beside if beside.is_file() else SHIPPED_MODEL / FACTS


def methods_of(text: str | None) -> tuple[str, ...]:
    """The methods that are tuned beside "rome"."""
    named = tuple(word.strip() for word in (text or "").split(",") if word.strip())
    others = [name for name in METHODS if name != "rome"]
    if unknown := [name for name in named if name not in others]:
        raise InvalidInput(f"--methods cannot be {unknown[0]!r}: name some of {','.join(others)}.")
    return named


def row(tried: dict[str, Any], usual: dict[str, Any]) -> tuple[Any, ...]:
    """One candidate as a line of the table, by what it has that is not usual; what has no figures says why."""
    words = " ".join(f"{k}={json.dumps(v)}" for k, v in tried["hparams"].items() if usual.get(k) != v)
    if "edits" in tried:
        words = f"{tried['edits']} edits {words}"
    if "together" not in tried:
        return tried["stage"], words, *("" for _ in range(5)), tried.get("reason", ""), 0.0
    together = tried["together"]
    alone = tried.get("alone", {"S": None})
    shown = tried.get("alone", together)
    figures = (
        shown["ES"],
        shown["PS"],
        shown["NS"],
        alone["S"],
        together["S"],
        tried["rise"],
        tried["merit"],
    )
    return tried["stage"], words, *(None if x is None else round(x, 3) for x in figures)
