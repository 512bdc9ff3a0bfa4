"""Speed of gated edits: of a token with many of them, of applying and reverting one more, and of several versions.

    python bench/gated_speed.py
    python bench/gated_speed.py --parts tokens --model smollm2-135m --rows 0 1000
    python bench/gated_speed.py --parts versions --active 1000 --callers 32

Gates have 8 random keys of norm 1 and 16 random blocked keys, the most that a gate can have; directions and values are
random. That does not affect the arithmetic of a closed gate. A random key opens none of them. So "one open" adds an
edit whose gate opens at every token, and the versions of "versions" have a further edit each, whose gate opens at the
last token of every prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.generation import without_end_tokens
from bench.harness import Report, Spread, device_synchronizer, time_interleaved
from bench.model_shapes import build_model
from service.engine.batch_executor import BatchExecutor
from service.engine.decoding import DecodingBatch, DecodingSequence, new_sequence
from service.engine.scheduler import Scheduler
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.fetching.models_folder import resolve_model
from service.methods.gate_sizes import MAX_BLOCKED, MAX_KEYS, SKETCH_SIZE
from service.models.hooks import capture
from service.models.loading import LoadedModel
from service.patches.patch import BASE, PatchSet
from service.schemas import Sampling
from service.settings import Settings
from service.weights.factors import Association, Gate, serialize_updates
from service.weights.gate_space import GateSpace

LAYER = 0  # of the edits; all layers have the same sizes
THRESHOLD = 0.5
PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "Marie Curie was born in",
    "The capital of Poland is",
    "Mount Fuji rises in the country of",
)
STEPS = {False: 16, True: 6}  # of decoding that are timed, for a single sequence and for several
UNBOUNDED = 2**40  # bytes of the caches, so that the memory of the machine does not decide


def random_unit_rows(count: int, generator: torch.Generator) -> Tensor:
    """Return random vectors of norm 1, (count, SKETCH_SIZE)."""
    return torch.nn.functional.normalize(torch.randn(count, SKETCH_SIZE, generator=generator), dim=1)


def random_space(model: LoadedModel) -> GateSpace:
    generator = torch.Generator().manual_seed(0)
    return GateSpace(LAYER, torch.randn(SKETCH_SIZE, model.intermediate_size, generator=generator))


def random_edit(model: LoadedModel, space: GateSpace, number: int) -> Association:
    """Return a gated edit with a full gate that no random key opens."""
    generator = torch.Generator().manual_seed(number)
    keys, blocked = random_unit_rows(MAX_KEYS, generator), random_unit_rows(MAX_BLOCKED, generator)
    key = torch.randn(model.intermediate_size, generator=generator)
    direction = key + torch.randn(model.intermediate_size, generator=generator)
    value = 0.01 * torch.randn(model.hidden_size, generator=generator)
    gate = Gate(space, keys, blocked, THRESHOLD)
    return Association(f"edit_{number:06}", f"subject {number}", LAYER, key, direction, value, gate=gate)


def edit_at(model: LoadedModel, space: GateSpace, number: int, prompts: Sequence[str]) -> Association:
    """Return a gated edit that opens at the last tokens of prompts."""
    keys = []
    for prompt in prompts:
        with capture({0: model.down_proj(LAYER)}, "input") as captured, torch.no_grad():
            model.model(input_ids=torch.tensor([model.encode(prompt)[0]], device=model.device))
        keys.append(captured[0].flatten(0, -2)[-1].float().cpu())
    edit = random_edit(model, space, number)
    gate = Gate(space, space.project(torch.stack(keys)), space.project(keys[0][None])[:0], THRESHOLD)
    return replace(edit, key=keys[0], direction=keys[0], gate=gate)


def open_edit(model: LoadedModel, space: GateSpace, number: int) -> Association:
    """Return a gated edit that opens at every token."""
    edit = random_edit(model, space, number)
    assert edit.gate is not None
    return replace(edit, gate=replace(edit.gate, blocked=edit.gate.blocked[:0], threshold=-1.01))


def new_replica(model: LoadedModel, ledger: Any = None) -> VersionedModel:
    return VersionedModel(
        model, ledger or EmptyLedger(), max_weight_bytes=UNBOUNDED, max_factor_bytes=UNBOUNDED
    )


# a token


def bench_tokens(
    model: LoadedModel,
    edits: Sequence[Association],
    counts: Sequence[int],
    batch_sizes: Sequence[int],
    rounds: int,
) -> list[list[Any]]:
    """Return rows of a table: the time of a decode step with numbers of active edits."""
    replicas = {f"{n:,}": (new_replica(model), list(edits[:n])) for n in counts}
    many = max(counts)
    if many:
        always = open_edit(model, random_space(model), many)
        replicas[f"{many:,}, one open"] = (new_replica(model), [*edits[:many], always])
    patches = {name: (replica, replica.compose_patch(active)) for name, (replica, active) in replicas.items()}
    rows = []
    for size in batch_sizes:
        steps = STEPS[size > 1]
        tasks = {name: DecodingTask(*pair, size, steps) for name, pair in patches.items()}
        synchronise = device_synchronizer(str(model.device))
        seconds = time_interleaved(tasks, rounds, synchronise=synchronise, prepare=partial(_prefill, tasks))
        first = next(iter(seconds.values()))
        for name, spread in seconds.items():
            rows.append([size, name, spread.scaled(1000 / steps / size), spread.ratio_to(first)])
    return rows


def _prefill(tasks: Mapping[str, DecodingTask], name: str) -> None:
    tasks[name].prefill()


class DecodingTask:
    """Decodes tokens of a batch at one version, after a prefill that is not timed."""

    def __init__(self, replica: VersionedModel, patch: PatchSet, size: int, steps: int) -> None:
        self._replica, self._patch, self._size, self._steps = replica, patch, size, steps

    def prefill(self) -> None:
        sampling = Sampling(max_new_tokens=self._steps + 2)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(self._size)]
        with without_end_tokens(self._replica.base):
            sequences = [new_sequence(self._replica.base, p, sampling) for p in prompts]
            self._batch = DecodingBatch(self._replica.base, sequences)
        self._step()

    def _step(self) -> None:
        with self._replica.use_patch(self._patch):
            self._batch.step()

    def __call__(self) -> None:
        for _ in range(self._steps):
            self._step()
        assert len(self._batch) == self._size


# one edit more, one edit fewer


class EditsLedger:
    """A ledger in memory, whose versions are lists of edits."""

    def __init__(self, edits: Sequence[Association], space: GateSpace) -> None:
        self.factors = {e.edit: serialize_updates([e]) for e in edits}
        self.bodies = {e.edit: {"subject": e.subject} for e in edits}
        self.space = space
        self.versions: list[list[str]] = [[]]

    def add_version(self, edits: Sequence[str]) -> int:
        self.versions.append(list(edits))
        return self.head()

    def head(self) -> int:
        return len(self.versions) - 1

    def active_at(self, version: int) -> list[tuple[str, dict[str, Any]]]:
        return [(edit, self.bodies[edit]) for edit in self.versions[version]]

    def factors_of(self, edits: Sequence[str]) -> dict[str, bytes]:
        return {edit: self.factors[edit] for edit in edits}

    def gate_space(self, digest: str) -> bytes:
        return self.space.serialize()


@dataclass
class ActiveEdits:
    """A replica at a version with a number of active edits, and one more edit that comes and goes."""

    ledger: EditsLedger
    replica: VersionedModel
    edits: list[str]
    next: str

    def apply(self) -> None:
        self.replica.attest_version(self.ledger.add_version([*self.edits, self.next]))

    def revert(self) -> None:
        self.replica.attest_version(self.ledger.add_version(self.edits))

    def from_nothing(self) -> None:
        """Build the version with the further edit in another replica, which has read no factors."""
        new_replica(self.replica.base, self.ledger).attest_version(
            self.ledger.add_version([*self.edits, self.next])
        )


def bench_versions_made(
    model: LoadedModel, edits: Sequence[Association], counts: Sequence[int], rounds: int
) -> list[list[Any]]:
    """Return rows of a table: the time to make the version with one edit more, and that with one fewer, out of the
    known one, and to make it from nothing."""
    tasks: dict[str, Callable[[], object]] = {}
    states = []
    for count in counts:
        some = edits[: count + 1]
        ledger = EditsLedger(some, random_space(model))
        names = [e.edit for e in some]
        state = ActiveEdits(ledger, new_replica(model, ledger), names[:-1], names[-1])
        state.revert()
        states.append(state)
        tasks |= {
            f"{count:,} apply": state.apply,
            f"{count:,} revert": state.revert,
            f"{count:,} from nothing": state.from_nothing,
        }
    seconds = time_interleaved(tasks, rounds)
    columns = ("apply", "revert", "from nothing")
    return [[f"{n:,}", *(seconds[f"{n:,} {column}"].scaled(1000) for column in columns)] for n in counts]


# several versions


def bench_versions(
    model: LoadedModel, edits: Sequence[Association], callers: int, versions: int, tokens: int, rounds: int
) -> list[list[Any]]:
    """Return rows of a table: tokens per second of callers at one version, and at several versions."""
    space, replica = random_space(model), new_replica(model)
    own = [edit_at(model, space, len(edits) + i, PROMPTS) for i in range(versions)]
    gated = [replica.compose_patch([*edits, edit]) for edit in own]
    solved = [replica.compose_patch([replace(edit, gate=None)]) for edit in own]
    tasks = {
        "base model": [BASE],
        "one gated version": gated[:1],
        f"{versions} gated versions": gated,
        "one version of other weights": solved[:1],
        f"{versions} versions of other weights": solved,
    }
    seconds = time_interleaved(
        {name: partial(_serve, replica, patches, callers, tokens) for name, patches in tasks.items()},
        rounds,
        synchronise=device_synchronizer(str(model.device)),
    )
    base = seconds["one gated version"]
    return [
        [name, Spread(tuple(callers * tokens / s for s in spread.values)), base.ratio_to(spread)]
        for name, spread in seconds.items()
    ]


def _serve(replica: VersionedModel, patches: Sequence[PatchSet], callers: int, tokens: int) -> None:
    """Run a stream of each caller to its end, as the engine does: the callers are divided between the versions."""
    scheduler = Scheduler(callers, lambda rows, positions: rows * positions)
    executor = BatchExecutor(replica, scheduler)
    sequences: list[DecodingSequence] = []
    with without_end_tokens(replica.base):
        for number in range(callers):
            prompt = PROMPTS[number % len(PROMPTS)]
            sequence = new_sequence(replica.base, prompt, Sampling(max_new_tokens=tokens))
            executor.add(patches[number % len(patches)], [sequence], f"caller {number}", 1.0)
            sequences.append(sequence)
        while scheduler:
            for _ in executor.step():
                pass
    assert all(len(s.output_ids) == tokens for s in sequences)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("tokens", "edits", "versions")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--model", nargs="+", default=["shipped"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[0, 100, 1000, 10000], help="active edits")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="sequences of a batch")
    parser.add_argument("--active", type=int, default=1000, help="edits that all versions have")
    parser.add_argument("--versions", type=int, default=8)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24, help="of each caller")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    report = Report("gated_speed", arguments.device)
    for name in arguments.model:
        model = build_model(resolve_model(name, Settings().models_dir), arguments.device)
        space = random_space(model)
        most = max([*arguments.rows, arguments.active]) + 1
        edits = [random_edit(model, space, number) for number in range(most)]
        if "tokens" in arguments.parts:
            report.add_table(
                f"{name}: a token of the greedy decoding",
                ("batch", "active edits", "ms per token", "ratio"),
                bench_tokens(model, edits, arguments.rows, arguments.batch, arguments.rounds),
            )
        if "edits" in arguments.parts:
            report.add_table(
                f"{name}: a version",
                ("active edits", "apply one more, ms", "revert it, ms", "from nothing, ms"),
                bench_versions_made(model, edits, [n for n in arguments.rows if n], arguments.rounds),
            )
        if "versions" in arguments.parts:
            active, callers = edits[: arguments.active], arguments.callers
            report.add_table(
                f"{name}: {callers} callers, {len(active):,} gated edits active and one of each version",
                ("versions", "tokens per second", "ratio to one gated version"),
                bench_versions(
                    model, active, callers, arguments.versions, arguments.tokens, arguments.rounds
                ),
            )


if __name__ == "__main__":
    main()
