"""Causal tracing without recomputing what causality makes constant. Exact, not an approximation.

With one clean state put back at token t, all positions before t are those of the corrupted run in every
layer, so their keys and values are reused; and nothing below the restored layer changes. So a cell starts with the
corrupted run's block outputs just above its entry layer, with token t exchanged, and runs the blocks above on
positions t .. T-1 alone; the last block on the positions that say the answer, with no more than keys and values of
the others.

Cells of all kinds that restore one token go up together as rows of one batch, called tracks. As long as nothing tells
two cells apart they are one track; a track parts from another (or from the corrupted run, which is kept) in the
block where a window begins or ends. There the two differ in what one module gives at token t, and within a block that
reaches only token t: so what parts is run for that one position. Windows hold token t's module output in the blocks
after; severed paths are hidden cells that hold it at its corrupted value up to the last layer.

The work is cut into steps of bounded cost: one block on some tracks of one token, or the head on some of their ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from service.kit.steps import Progress, Steps
from service.kit.text import Statement
from service.models.block_runner import Blocks, Passage, Past
from service.models.budget import block_operations, step_budget
from service.models.hooks import capture, replace
from service.models.loading import LoadedModel
from service.models.memory_estimates import admit, trace_bytes
from service.tracing.interventions import PATHS, Cell, Track, cells_of
from service.tracing.noise import corrupt
from service.tracing.reference import CUTS, KINDS, modules
from service.tracing.result import TraceResult, conclude
from service.tracing.trace_input import Question, ask

Key = tuple[str, int, int]
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
    tracer = Tracer(model, q, cells_of(q, kinds, window, severed, model.layers))
    yield Progress("prepare", 1, 1)
    yield from tracer.run_steps()
    found = yield from tracer.score_steps()
    layers, last = range(model.layers), q.subject[1] - 1
    grids = {kind: [[found[kind, t, m] for m in layers] for t in range(q.length)] for kind in kinds}
    paths = {cut: [found[name, last, m] for m in layers] for cut, name in PATHS.items()} if severed else None
    return conclude(q, tracer.high, tracer.low, grids, paths, window)


@dataclass(frozen=True)
class Run:
    """What whole texts leave behind, by layer. Row 0 is the clean run; the others are the corrupted ones."""

    states: list[Tensor]  #: what enters a block, and at the end what leaves the last: (1 + R, T, d)
    past: list[Past]
    outputs: dict[str, list[Tensor]]  #: of the modules, by kind: (1 + R, T, d)


@dataclass(frozen=True)
class Suffix:
    """The positions from a token on, as blocks are called with them."""

    token: int
    whole: Passage
    first: Passage  #: the token alone
    quiet: Passage | None  #: those that say nothing of the answer


class Tracer:
    """The clean run and the corrupted runs of one question, and what they say about cells."""

    run: Run
    high: float
    low: float

    def __init__(self, model: LoadedModel, q: Question, cells: Sequence[Cell]) -> None:
        self.model, self.q, self.cells = model, q, cells
        self.said = len(q.answer_ids)  # positions that say the answer: the last ones
        self.tokens = step_budget(model) // block_operations(model)  # that one step may take through a block
        head = 2 * model.head.weight.numel() * self.said  # type: ignore[operator]
        self.ends = max(1, step_budget(model) // head)  # tracks that one step may take through the head
        self.tracks = {
            c: [c.track(sample, q, model.layers) for sample in range(q.samples)]
            for c in cells
            if not c.is_low(q, model.layers)
        }
        tokens = sorted({c.token for c in self.tracks})
        plan = {at: {t for c, some in self.tracks.items() if c.token == at for t in some} for at in tokens}
        counts = {token: len(some) for token, some in plan.items()} or None
        needed = trace_bytes(model, len(q.ids), q.samples, counts, self.said)
        admit("this trace", needed, model.device, "use fewer samples or a shorter prompt", "samples")
        self.plan = {token: self._chunks(token, some) for token, some in plan.items()}
        self.modules = {kind: modules(model, kind) for kind in CUTS}
        self.blocks = Blocks(model)
        self.ids = torch.tensor([q.ids], device=model.device)
        self.saying = self.blocks.enter(self.ids[:, -self.said :], q.length - 1)

    def run_steps(self) -> Steps[None]:
        """The clean run and the corrupted ones, through all blocks."""
        passage = self.blocks.enter(self.ids, 0)
        rows = self.ids.expand(1 + self.q.samples, -1)
        self.run = Run([self.blocks.enter(rows, 0, self._disturb).hidden], [], {kind: [] for kind in CUTS})
        size = self._rows(len(self.q.ids))
        tick = _counter("run", self.model.layers * -(-len(rows) // size))
        for layer in range(self.model.layers):
            done = []
            for part in torch.split(self.run.states[layer], size):
                with capture({kind: self.modules[kind][layer] for kind in CUTS}) as seen:
                    hidden, past = self.blocks.run(passage, layer, part, None)
                done.append((hidden, *past, *(seen[kind].reshape(hidden.shape) for kind in CUTS)))
                yield tick()
            state, keys, values, *outputs = (torch.cat(parts) for parts in zip(*done, strict=True))
            self.run.states.append(state)
            self.run.past.append((keys, values))
            for kind, output in zip(CUTS, outputs, strict=True):
                self.run.outputs[kind].append(output)
        p = self._joint(self.run.states[-1][:, -self.said :])
        self.high, self.low = p[0].item(), p[1:].mean().item()

    def _disturb(self, embedded: Tensor) -> Tensor:
        corrupt(embedded[1:], self.q.subject, self.q.noise)
        return embedded

    def score_steps(self) -> Steps[dict[Key, float]]:
        """The score of every cell."""
        tick = _counter("trace", sum(map(self._steps, self.plan.values())))
        p: dict[tuple[int, Track], float] = {}
        for token, chunks in self.plan.items():
            found = yield from self._token_steps(token, chunks, tick)
            p |= {(token, track): value for track, value in found.items()}
        scores = {c.key: self.low for c in self.cells}
        for cell, tracks in self.tracks.items():
            scores[cell.key] = sum(p[cell.token, track] for track in tracks) / len(tracks)
        return scores

    def _rows(self, positions: int) -> int:
        return max(1, self.tokens // positions)

    def _chunks(self, token: int, tracks: set[Track]) -> list[list[Track]]:
        """Tracks of one token, cut evenly so that no step is long."""
        rows = sorted(tracks)
        parts = -(-len(rows) // self._rows(len(self.q.ids) - token))
        size = -(-len(rows) // parts)
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def _steps(self, chunks: Sequence[Sequence[Track]]) -> int:
        heads = -(-sum(map(len, chunks)) // self.ends)
        return heads + sum(self.model.layers - chunk[0].entry for chunk in chunks)

    def _token_steps(
        self, token: int, chunks: Sequence[Sequence[Track]], tick: Tick
    ) -> Steps[dict[Track, float]]:
        """p(answer) of all tracks of one token."""
        suffix = self._suffix(token)
        tracks: list[Track] = []
        said: list[Tensor] = []
        for chunk in chunks:
            there, hidden = yield from self._sweep(suffix, chunk, tick)
            tracks += there
            said.append(hidden[:, -self.said :].clone())
        p: list[float] = []
        for part in torch.split(torch.cat(said), self.ends):
            p += self._joint(part).tolist()
            yield tick()
        return dict(zip(tracks, p, strict=True))

    def _suffix(self, token: int) -> Suffix:
        ids, enter = self.ids[:, token:], self.blocks.enter
        quiet = ids[:, : -self.said]
        return Suffix(
            token,
            enter(ids, token),
            enter(ids[:, :1], token),
            enter(quiet, token) if quiet.shape[1] else None,
        )

    def _sweep(self, suffix: Suffix, chunk: Sequence[Track], tick: Tick) -> Steps[tuple[list[Track], Tensor]]:
        """One way up the blocks: what the last one gives for each track."""
        tracks: list[Track] = []
        hidden = self.run.states[0][:0, suffix.token :]
        for layer in range(chunk[0].entry, self.model.layers):
            above = dict.fromkeys(track.below(layer + 1) for track in chunk if track.entry <= layer)
            tracks, hidden = self._climb(suffix, layer, tracks, hidden, list(above))
            yield tick()
        return tracks, hidden

    def _climb(
        self, suffix: Suffix, layer: int, tracks: list[Track], hidden: Tensor, above: list[Track]
    ) -> tuple[list[Track], Tensor]:
        """One block: the tracks that enter it -> those above it, and their states (tracks, positions, d).

        A track whose window ends where that of others goes on stays as it is, and the others part from it.
        """
        wanted = set(above)
        same = [track if track in wanted else track._replace(until=layer + 1) for track in tracks]
        out = self._block(suffix, layer, same, hidden) if same else hidden
        if len(same) == len(above):
            return same, out
        place = {track: i for i, track in enumerate(same)}
        parting = [t for t in above if t not in place and t.entry < layer]
        entering = [t for t in above if t.entry == layer]
        old, rows = [place[t.below(layer)] for t in parting], [1 + t.sample for t in entering]
        before = torch.cat([hidden[old, :1], self.run.states[layer][rows, suffix.token, None]])
        after = torch.cat([out[old], self.run.states[layer + 1][rows, suffix.token :]])
        new = parting + entering
        after[:, 0] = self._exchanged(suffix, layer, new, before)
        return same + new, torch.cat([out, after])

    def _exchanged(self, suffix: Suffix, layer: int, tracks: list[Track], hidden: Tensor) -> Tensor:
        """What a block gives at the token itself (tracks, d): the clean run's output, or its own with a module held."""
        out = self.run.states[layer + 1][[0] * len(tracks), suffix.token]
        held = [i for i, t in enumerate(tracks) if t.entry < layer or t.source != "hidden"]
        if held:
            some = [tracks[i] for i in held]
            past = self._past(suffix.token, layer, some)
            with self._holding(suffix.token, layer, some):
                out[held] = self.blocks.run(suffix.first, layer, hidden[held], past)[0][:, 0]
        return out

    def _block(self, suffix: Suffix, layer: int, tracks: list[Track], hidden: Tensor) -> Tensor:
        """One block on tracks; of the last one only what says the answer."""
        past = self._past(suffix.token, layer, tracks)
        if layer == self.model.layers - 1 and suffix.quiet:
            kept = self.blocks.keep(suffix.quiet, layer, hidden[:, : -self.said], past)
            return self.blocks.run(self.saying, layer, hidden[:, -self.said :], kept)[0]
        with self._holding(suffix.token, layer, tracks):
            return self.blocks.run(suffix.whole, layer, hidden, past)[0]

    def _past(self, token: int, layer: int, tracks: Sequence[Track]) -> Past:
        """The corrupted run's keys and values before the token."""
        keys, values = self.run.past[layer]
        rows = [1 + track.sample for track in tracks]
        return keys[rows, :, :token], values[rows, :, :token]

    @contextmanager
    def _holding(self, token: int, layer: int, tracks: Sequence[Track]) -> Iterator[None]:
        """Within the context, the first position's module outputs are held where a track says so."""
        with ExitStack() as stack:
            for kind in CUTS:
                held = [i for i, track in enumerate(tracks) if track.holds(kind, layer)]
                if held:
                    rows = [1 + tracks[i].sample if tracks[i].cut else 0 for i in held]
                    put = _putting(len(tracks), held, self.run.outputs[kind][layer][rows, token])
                    stack.enter_context(replace(self.modules[kind][layer], put))
            yield

    def _joint(self, said: Tensor) -> Tensor:
        """p(answer) (rows,) from the last block's output (rows, n, d) where the answer is said."""
        logits = self.blocks.logits(said.reshape(-1, said.shape[-1]))
        return self.q.joint(logits.view(*said.shape[:2], -1))


def _putting(rows: int, held: list[int], values: Tensor) -> Callable[[Tensor], Tensor]:
    """Writes values (held, d) into a module's output at the first position of some rows."""

    def put(output: Tensor) -> Tensor:
        output.view(rows, -1, output.shape[-1])[held, 0] = values
        return output

    return put


def _counter(phase: str, total: int) -> Tick:
    """Each call is one more step of a phase."""
    steps = count(1)
    return lambda: Progress(phase, next(steps), total)
