"""Random ledger histories: does every version build, and does reverting everything give the base bytes?

    python bench/histories.py --histories 1000 --seed 0
    python bench/histories.py --sets 10000

A history is a service with a tiny model and an empty ledger. It computes edits of every method, imports edits whose
tensors are at the limits of what an import accepts (equal, negated, parallel and nearly parallel keys, zeros, denormal
and very large numbers, several solve modes, dense changes), supersedes and reverts, in random order, and reverts
everything at the end. Then every version of the ledger is built. `--sets` also composes random subsets of such edits
without a ledger. A history that fails is printed with its seed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from bench.harness import Report, console
from service.models.loading import LoadedModel, WeightRef
from service.weights.composition import apply_delta, compose, is_in_range
from tests.support.histories import HISTORY_MODEL, History
from tests.support.hostile_factors import random_updates
from tests.support.tiny_models import tiny

WIDTH, INNER_WIDTH = 5, 12  # of the weights of `--sets`
SUBSETS = 4  # subsets that are composed of each set of edits
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run_history(model: LoadedModel, seed: int, operations: int) -> Counter[str]:
    """Run one history and return its counts. Raise an error when it fails."""
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder), model, seed)
        try:
            history.run(operations)
            if history.internal_errors:
                raise AssertionError(f"jobs ended in internal errors: {history.internal_errors}")
            counts = {"versions": history.head, "reverts": history.reverts, "edits": history.outcomes.total()}
            return Counter({**counts, **{f"edits {status}": n for status, n in history.outcomes.items()}})
        finally:
            history.close()


def compose_subsets(seed: int) -> Counter[str]:
    """Compose random subsets of random edits. Raise an error when a weight is not finite or depends on the order."""
    random, counts = Random(seed), Counter[str]()
    edits = list(random_updates(random, WIDTH, INNER_WIDTH, random.randint(1, 14)).values())
    base = torch.randn(WIDTH, INNER_WIDTH, generator=torch.Generator().manual_seed(seed)).to(
        random.choice(DTYPES)
    )
    for _ in range(SUBSETS):
        updates = [u for group in random.sample(edits, random.randint(1, len(edits))) for u in group]
        edited = apply_delta(base, compose(updates)[WeightRef(0)], conv1d=False)
        random.shuffle(updates)
        again = apply_delta(base, compose(updates)[WeightRef(0)], conv1d=False)
        if not edited.isfinite().all():
            raise AssertionError("a weight is not finite")
        if not torch.equal(edited.view(torch.uint8), again.view(torch.uint8)):
            raise AssertionError("the weight depends on the order of the edits")
        counts += Counter(
            {"subsets": 1, "subsets beyond the range of the dtype": int(not is_in_range(edited))}
        )
    return counts


def main() -> int:
    args = _parse_arguments()
    torch.set_num_threads(1)
    model, report = tiny(**HISTORY_MODEL), Report("histories")

    def history(seed: int) -> Counter[str]:
        return run_history(model, seed, args.operations)

    failures = run_all(report, "histories", history, range(args.seed, args.seed + args.histories))
    failures += run_all(report, "sets of edits", compose_subsets, range(args.seed, args.seed + args.sets))
    return int(failures > 0)


def run_all(report: Report, name: str, run: Callable[[int], Counter[str]], seeds: Sequence[int]) -> int:
    """Run every seed and report the counts. Return the number of failures."""
    counts, failures = Counter[str](), 0
    with _progress_bar() as bar:
        for seed in bar.track(seeds, description=name):
            try:
                counts += run(seed)
            except Exception as error:
                failures += 1
                bar.console.print(f"{name}, seed {seed}: {error!r}")
    report.add_table(
        name, ["", "count"], [("run", len(seeds)), *sorted(counts.items()), ("failures", failures)]
    )
    return failures


def _progress_bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def _parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--histories", type=int, default=100, help="number of histories (default: 100)")
    p.add_argument(
        "--operations", type=int, default=12, help="operations of a history before the last reverts"
    )
    p.add_argument("--sets", type=int, default=1000, help="sets of edits to compose without a ledger")
    p.add_argument("--seed", type=int, default=0, help="seed of the first history and of the first set")
    return p.parse_args()


if __name__ == "__main__":
    sys.exit(main())
