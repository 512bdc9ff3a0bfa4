"""Causal tracing without recomputing what causality makes constant. Exact, not an approximation.

With one clean state put back at token t, all positions before t are those of the corrupted run in every
layer, so their keys and values are reused; and nothing below the restored layer changes. So a cell starts with the
corrupted run's block outputs just above its entry layer, with token t exchanged, and runs the blocks above on
positions t .. T-1 alone.

What token t holds after the entry block comes from the clean run's block output ("hidden"), or from the
corrupted run's block with its MLP (attention) output exchanged. Within a block a position's module output reaches
only that position, so one extra run of each block with *all* positions exchanged gives the entry states of all
tokens. Windows then hold token t's module output in the blocks after the entry, and severed paths are hidden
cells that hold it at its corrupted value up to the last layer.

The work is cut into steps of bounded cost: one block on some rows of one token, where a row is one sample of
one cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import count, groupby

import torch
from torch import Tensor

from service.errors import InvalidInput
from service.models.blocks import Blocks, Passage, Past
from service.models.hooks import capture, replace
from service.models.loading import LoadedModel
from service.progress import Progress, Steps
from service.text import Statement
from service.tracing.cells import PATHS, Cell, cells_of
from service.tracing.effects import CUTS, KINDS, modules
from service.tracing.noise import corrupt
from service.tracing.question import Question, ask
from service.tracing.result import TraceResult, conclude

STEP = {
    "cpu": 10**10,
    "cuda": 5 * 10**11,
}  # floating-point operations in one step: tenths of a second at the most
MEMORY = 16 * 2**30  # bytes that the two runs may take

Key = tuple[str, int, int]
Row = tuple[Cell, int]  # one sample of one cell
Track = tuple[int, int, int]  # entry, end of the window as far as it matters yet, sample
Tick = Callable[[], Progress]


def trace_steps(
    model: LoadedModel,
    statement: Statement,
    target: str | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    window: int = 10,
    samples: int = 10,
    noise: float | str = "3sigma",
    severed: bool = False,
    seed: int = 1,
    compat: str | None = None,
    subjects: Sequence[str] = (),
) -> Steps[TraceResult]:
    """Trace a statement: the paper's three maps, and the severed paths when asked for.

    `target` is the answer whose probability is followed, of any number of tokens; the model's own next
    token when left out. `subjects` are those over which "3sigma" is measured (see `noise.embedding_deviation`).
    """
    q = ask(model, statement, target, samples, noise, seed, compat, subjects)
    tracer = Tracer(model, q)
    yield Progress("prepare", 1, 1)
    cells = cells_of(q, kinds, window, severed, model.layers)
    yield from tracer.run_steps(sorted({c.source for c in cells} - {"hidden"}), CUTS if severed else ())
    found = yield from tracer.score_steps(cells)
    layers, last = range(model.layers), q.subject[1] - 1
    grids = {kind: [[found[kind, t, m] for m in layers] for t in range(q.length)] for kind in kinds}
    paths = {cut: [found[name, last, m] for m in layers] for cut, name in PATHS.items()} if severed else None
    return conclude(q, tracer.high, tracer.low, grids, paths, window)


@dataclass
class Run:
    """What rows of whole texts leave behind, by layer."""

    states: list[Tensor] = field(default_factory=list)  #: block outputs (rows, T, d)
    past: list[Past] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)  #: of the modules, by kind: (rows, T, d)
    #: block outputs with a kind's module output as in the clean run: (rows, T, d)
    exchanged: dict[str, list[Tensor]] = field(default_factory=dict)


class Tracer:
    """The clean run and the corrupted runs of one question, and what they say about cells."""

    clean: Run
    corrupted: Run
    high: float
    low: float

    def __init__(self, model: LoadedModel, q: Question) -> None:
        self.model, self.q = model, q
        self.modules = {kind: modules(model, kind) for kind in CUTS}
        _check_memory(model, q)
        self.blocks = Blocks(model)
        self.ids = torch.tensor([q.ids], device=model.device)
        block = sum(p.numel() for p in model.block(0).parameters())
        self.cost = 2 * block  # operations for one token in one block
        self.head_cost = 2 * model.head.weight.numel() * len(q.answer_ids)  # type: ignore[operator]
        self.budget = STEP.get(model.device.type, STEP["cuda"])

    def run_steps(self, exchange: Iterable[str], keep: Iterable[str]) -> Steps[None]:
        """The clean run, and the corrupted ones with every block run again for each kind of `exchange`."""
        q, size = self.q, self._rows(len(self.q.ids))
        noises = torch.split(q.noise, size)
        tick = _counter("run", self.model.layers * (1 + len(noises)))
        passage = self.blocks.enter(self.ids, 0)
        self.clean = yield from self._run(passage, passage.hidden, (), CUTS, tick)
        parts: list[Run] = []
        for noise in noises:
            hidden = self._corrupted(noise)
            parts.append((yield from self._run(passage, hidden, exchange, keep, tick)))
        self.corrupted = _joined(parts)
        self.high = self._joint(self.clean.states[-1]).item()
        self.low = self._joint(self.corrupted.states[-1]).mean().item()

    def _corrupted(self, noise: Tensor) -> Tensor:
        """Block 0's input (rows, T, d) under some rows of the noise."""
        ids = self.ids.expand(len(noise), -1)
        return self.blocks.enter(ids, 0, lambda x: corrupt(x, self.q.subject, noise)).hidden

    def _run(
        self, passage: Passage, hidden: Tensor, exchange: Iterable[str], keep: Iterable[str], tick: Tick
    ) -> Steps[Run]:
        """Take rows of the whole text up through the blocks."""
        run = Run()
        for layer in range(self.model.layers):
            for kind in exchange:
                out = self._exchanged(passage, layer, hidden, kind)
                run.exchanged.setdefault(kind, []).append(out)
            with capture({kind: self.modules[kind][layer] for kind in keep}) as seen:
                hidden, past = self.blocks.run(passage, layer, hidden, None)
            for kind, output in seen.items():
                run.outputs.setdefault(kind, []).append(output.reshape(hidden.shape))
            run.states.append(hidden)
            run.past.append(past)
            yield tick()
        return run

    def _exchanged(self, passage: Passage, layer: int, hidden: Tensor, kind: str) -> Tensor:
        """One block's output with the clean run's module output at every position."""
        clean = self.clean.outputs[kind][layer].expand(hidden.shape)
        with replace(self.modules[kind][layer], lambda output: clean.reshape(output.shape)):
            return self.blocks.run(passage, layer, hidden, None)[0]

    def score_steps(self, cells: Sequence[Cell]) -> Steps[dict[Key, float]]:
        """The score of every cell."""
        found = {c.key: self.low for c in cells}
        work = [c for c in cells if not c.is_low(self.q, self.model.layers)]
        found |= {c.key: 0.0 for c in work}
        groups = [list(group) for _, group in groupby(work, key=lambda c: (c.name, c.token))]
        plan = [chunk for group in groups for chunk in self._chunks(group)]
        tick = _counter("trace", sum(self.model.layers - chunk[0][0].entry for chunk in plan))
        passage, token = self.blocks.enter(self.ids, 0), 0
        for chunk in plan:
            if chunk[0][0].token != token:
                token = chunk[0][0].token
                passage = self.blocks.enter(self.ids[:, token:], token)
            p = yield from self._sweep(passage, chunk, tick)
            for (cell, _), value in zip(chunk, p, strict=True):
                found[cell.key] += value / self.q.samples
        return found

    def _rows(self, positions: int) -> int:
        return max(1, self.budget // max(self.cost * positions, self.head_cost))

    def _chunks(self, cells: Sequence[Cell]) -> list[list[Row]]:
        """Rows (cell, sample) of one token in order of entry, cut so that no step is long."""
        rows = [(c, r) for c in sorted(cells, key=lambda c: c.entry) for r in range(self.q.samples)]
        size = self._rows(len(self.q.ids) - cells[0].token)
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def _sweep(self, passage: Passage, rows: Sequence[Row], tick: Tick) -> Steps[list[float]]:
        """p(answer) of rows of one token, in one way up the blocks.

        Rows are the same as long as their entries are the same and none of their windows has ended, and then
        they are one track; a track joins above its entry block and splits where a window ends.
        """
        cell = rows[0][0]
        tracks: list[Track] = []
        hidden = self.corrupted.states[0][:0, cell.token :]
        for layer in range(cell.entry, self.model.layers):
            now = list(
                dict.fromkeys((c.entry, min(c.until, layer + 1), r) for c, r in rows if c.entry <= layer)
            )
            below = [t for t in now if t[0] < layer]
            if below:
                at = {track: i for i, track in enumerate(tracks)}
                hidden = hidden[[at[entry, min(until, layer), r] for entry, until, r in below]]
                hidden = self._block(passage, cell, below, layer, hidden)
            joining = [t for t in now if t[0] == layer]
            if joining:
                hidden = torch.cat([hidden, self._entering(cell, joining, layer)])
            tracks = below + joining
            if layer < self.model.layers - 1:
                yield tick()
        p = dict(zip(tracks, self._joint(hidden).tolist(), strict=True))
        yield tick()
        return [p[c.entry, min(c.until, self.model.layers), r] for c, r in rows]

    def _block(self, passage: Passage, cell: Cell, tracks: list[Track], layer: int, hidden: Tensor) -> Tensor:
        """One block on tracks (rows, positions, d), with the corrupted run's keys and values before them."""
        samples = [r for _, _, r in tracks]
        keys, values = self.corrupted.past[layer]
        past = keys[samples, :, : cell.token], values[samples, :, : cell.token]
        with self._holding(cell, tracks, layer):
            return self.blocks.run(passage, layer, hidden, past)[0]

    def _entering(self, cell: Cell, tracks: list[Track], layer: int) -> Tensor:
        """The corrupted run's states above a block, with the token exchanged: (rows, positions, d)."""
        samples = [r for _, _, r in tracks]
        hidden = self.corrupted.states[layer][samples, cell.token :]
        if cell.source == "hidden":
            hidden[:, 0] = self.clean.states[layer][0, cell.token]
        else:
            hidden[:, 0] = self.corrupted.exchanged[cell.source][layer][samples, cell.token]
        return hidden

    def _holding(self, cell: Cell, tracks: list[Track], layer: int) -> AbstractContextManager[None]:
        """Within the context, the first position's module output is held where a track's window goes on."""
        held = [i for i, (_, until, _) in enumerate(tracks) if until > layer]
        if not (cell.held and held):
            return nullcontext()
        if cell.cut:
            values = self.corrupted.outputs[cell.held][layer][[tracks[i][2] for i in held], cell.token]
        else:
            values = self.clean.outputs[cell.held][layer][0, cell.token]

        def put(output: Tensor) -> Tensor:
            output.view(len(tracks), -1, output.shape[-1])[held, 0] = values
            return output

        return replace(self.modules[cell.held][layer], put)

    def _joint(self, states: Tensor) -> Tensor:
        """p(answer) (rows,) from the last block's output at the positions up to the end of the text."""
        n = len(self.q.answer_ids)
        said = states[:, -n:]
        logits = self.blocks.logits(said.reshape(-1, said.shape[-1]))
        return self.q.joint(logits.view(len(said), n, -1))


def _counter(phase: str, total: int) -> Tick:
    """Each call is one more step of a phase."""
    steps = count(1)
    return lambda: Progress(phase, next(steps), total)


def _joined(parts: Sequence[Run]) -> Run:
    """Runs of some samples each as one run of all."""

    def join(lists: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return [torch.cat(layer) if len(layer) > 1 else layer[0] for layer in zip(*lists, strict=True)]

    keys, values = (join([[past[i] for past in part.past] for part in parts]) for i in (0, 1))
    return Run(
        join([p.states for p in parts]),
        list(zip(keys, values, strict=True)),
        {kind: join([p.outputs[kind] for p in parts]) for kind in parts[0].outputs},
        {kind: join([p.exchanged[kind] for p in parts]) for kind in parts[0].exchanged},
    )


def _check_memory(model: LoadedModel, q: Question) -> None:
    """Refuse what would not fit: states, keys, values, two exchanged and two held outputs for every layer."""
    size: int = next(model.model.parameters()).element_size()
    needed = 7 * (q.samples + 1) * len(q.ids) * model.layers * model.width * size
    if needed > MEMORY:
        raise InvalidInput(
            f"this trace would take {needed / 2**30:.0f} GiB: use fewer samples or a shorter prompt.",
            "samples",
        )
