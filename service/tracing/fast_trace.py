"""Exact causal tracing (Meng et al. 2022) that reuses what causality leaves unchanged.

When the clean state of token t is restored, all positions before t equal the corrupted run in every layer, so their
keys and values are reused; nothing below the restored layer changes either. A cell therefore starts from the corrupted
run's block outputs above its entry layer, with token t replaced, and runs the blocks above on positions t .. T-1 only.
The last block runs on the positions that predict the answer, and needs only keys and values of the others.

Cells of all kinds that restore the same token advance together as rows of one batch. Cells that are still identical
share one row (`CorruptedRun`). A row diverges from another, or from the corrupted run, in the block where a window
begins or ends. There the two differ in one module's output at token t, which within that block affects token t only, so
the diverging row is computed for that one position. A window holds the module output of token t in the following
blocks. A severed path is a hidden cell that holds the module output at its corrupted value up to the last layer.

The work is split into steps of bounded cost: one block on some rows of one token, or the head on some final states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from service.kit.separator import Separator
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import Statement
from service.models.block_runner import BlockInputs, BlockRunner, LayerKV
from service.models.budget import block_flops, step_budget
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.memory_estimates import require_memory, trace_bytes
from service.schemas import Mentions
from service.tracing.interventions import CELL_NAME_BY_PATH, CorruptedRun, TraceCell, list_cells
from service.tracing.noise import corrupt
from service.tracing.reference import SEVERABLE_KINDS, TRACE_KINDS, modules_of_kind
from service.tracing.result import TraceResult, build_trace_result
from service.tracing.trace_input import TraceInput, build_trace_input

CellKey = tuple[str, int, int]
NextProgress = Callable[[], Progress]


def trace_statement(
    model: LoadedModel,
    statement: Statement,
    target: str | None = None,
    *,
    kinds: Sequence[str] = TRACE_KINDS,
    window: int = 10,
    samples: int = 10,
    noise: float | str = "3sigma",
    severed: bool = False,
    seed: int = 1,
    compat: str | None = None,
    subjects: Sequence[str] = (),
    mentions: Mentions = "all",
    separator: Separator | None = None,
) -> Stepper[TraceResult]:
    """Return the trace of a statement: the paper's three maps and, with `severed`, the severed paths.

    `target` is the answer whose probability is measured, of any number of tokens; by default the model's next token.
    `mentions`: whether noise is added to every mention of the subject, or to that of the statement alone. States are
    restored at every token; severed paths at the last token of the statement's mention.
    `subjects` are the subjects over which "3sigma" is measured (see `noise.embedding_deviation`).
    """
    trace_input = build_trace_input(
        model, statement, target, samples, noise, seed, compat, subjects, mentions, separator
    )
    tracer = FastTracer(model, trace_input, list_cells(trace_input, kinds, window, severed, model.num_layers))
    yield Progress(Phase.PREPARE, 1, 1)
    yield from tracer.compute_base_runs()
    scores = yield from tracer.score_cells()
    layers, last = range(model.num_layers), trace_input.subject[1] - 1
    grids = {
        kind: [[scores[kind, t, m] for m in layers] for t in range(trace_input.prompt_length)]
        for kind in kinds
    }
    paths = (
        {cut: [scores[name, last, m] for m in layers] for cut, name in CELL_NAME_BY_PATH.items()}
        if severed
        else None
    )
    return build_trace_result(trace_input, tracer.high, tracer.low, grids, paths, window)


@dataclass(frozen=True)
class BaseRuns:
    """States of the complete texts, by layer. Row 0 is the clean run; the other rows are the corrupted runs."""

    states: list[Tensor]  #: the input of each block, then the output of the last: (1 + R, T, d)
    past: list[LayerKV]
    outputs: dict[str, list[Tensor]]  #: module outputs by kind: (1 + R, T, d)


@dataclass(frozen=True)
class SuffixInputs:
    """Block inputs for the positions from a token on."""

    token: int
    all_positions: BlockInputs
    first_position: BlockInputs  #: the token alone
    before_answer: BlockInputs | None  #: the positions that do not predict the answer


class FastTracer:
    """Computes the base runs of one trace input and the scores of its cells."""

    base_runs: BaseRuns
    high: float
    low: float

    def __init__(self, model: LoadedModel, trace_input: TraceInput, cells: Sequence[TraceCell]) -> None:
        self.model, self.trace_input, self.cells = model, trace_input, cells
        self.answer_length = len(trace_input.answer_ids)  # the last positions predict the answer
        self.tokens_per_step = step_budget(model) // block_flops(model)  # tokens through one block
        head = 2 * model.lm_head.weight.numel() * self.answer_length  # type: ignore[operator]
        self.head_rows_per_step = max(1, step_budget(model) // head)  # rows through the head
        self.runs_by_cell = {
            c: [
                c.corrupted_run(sample, trace_input, model.num_layers)
                for sample in range(trace_input.samples)
            ]
            for c in cells
            if not c.is_low(trace_input, model.num_layers)
        }
        tokens = sorted({c.token for c in self.runs_by_cell})
        runs_by_token = {
            at: {t for c, some in self.runs_by_cell.items() if c.token == at for t in some} for at in tokens
        }
        counts = {token: len(some) for token, some in runs_by_token.items()} or None
        needed = trace_bytes(model, len(trace_input.ids), trace_input.samples, counts, self.answer_length)
        require_memory("this trace", needed, model.device, "use fewer samples or a shorter prompt", "samples")
        self.chunks_by_token = {token: self._chunks(token, some) for token, some in runs_by_token.items()}
        self.modules_by_kind = {kind: modules_of_kind(model, kind) for kind in SEVERABLE_KINDS}
        self.block_runner = BlockRunner(model)
        self.ids = torch.tensor([trace_input.ids], device=model.device)
        self.answer_inputs = self.block_runner.capture_block_inputs(
            self.ids[:, -self.answer_length :], trace_input.prompt_length - 1
        )

    def compute_base_runs(self) -> Stepper[None]:
        """Run the clean and the corrupted rows through all blocks."""
        inputs = self.block_runner.capture_block_inputs(self.ids, 0)
        rows = self.ids.expand(1 + self.trace_input.samples, -1)
        self.base_runs = BaseRuns(
            [self.block_runner.capture_block_inputs(rows, 0, self._corrupt_rows).hidden],
            [],
            {kind: [] for kind in SEVERABLE_KINDS},
        )
        size = self._rows_per_step(len(self.trace_input.ids))
        tick = _progress_counter(Phase.RUN, self.model.num_layers * -(-len(rows) // size))
        for layer in range(self.model.num_layers):
            outputs_by_part = []
            for part in torch.split(self.base_runs.states[layer], size):
                with capture(
                    {kind: self.modules_by_kind[kind][layer] for kind in SEVERABLE_KINDS}
                ) as captured:
                    hidden, past = self.block_runner.run(inputs, layer, part, None)
                outputs_by_part.append(
                    (hidden, *past, *(captured[kind].reshape(hidden.shape) for kind in SEVERABLE_KINDS))
                )
                yield tick()
            state, keys, values, *outputs = (torch.cat(parts) for parts in zip(*outputs_by_part, strict=True))
            self.base_runs.states.append(state)
            self.base_runs.past.append((keys, values))
            for kind, output in zip(SEVERABLE_KINDS, outputs, strict=True):
                self.base_runs.outputs[kind].append(output)
        p = self._answer_probability(self.base_runs.states[-1][:, -self.answer_length :])
        self.high, self.low = p[0].item(), p[1:].mean().item()

    def _corrupt_rows(self, embedded: Tensor) -> Tensor:
        corrupt(embedded[1:], self.trace_input.corrupted_tokens, self.trace_input.noise)
        return embedded

    def score_cells(self) -> Stepper[dict[CellKey, float]]:
        """Return the score of every cell."""
        tick = _progress_counter(Phase.TRACE, sum(map(self._count_steps, self.chunks_by_token.values())))
        p: dict[tuple[int, CorruptedRun], float] = {}
        for token, chunks in self.chunks_by_token.items():
            token_scores = yield from self._score_token(token, chunks, tick)
            p |= {(token, run): value for run, value in token_scores.items()}
        scores = {c.key: self.low for c in self.cells}
        for cell, runs in self.runs_by_cell.items():
            scores[cell.key] = sum(p[cell.token, run] for run in runs) / len(runs)
        return scores

    def _rows_per_step(self, positions: int) -> int:
        return max(1, self.tokens_per_step // positions)

    def _chunks(self, token: int, runs: set[CorruptedRun]) -> list[list[CorruptedRun]]:
        """Split the runs of one token evenly, so that each step stays within the budget."""
        rows = sorted(runs)
        parts = -(-len(rows) // self._rows_per_step(len(self.trace_input.ids) - token))
        size = -(-len(rows) // parts)
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def _count_steps(self, chunks: Sequence[Sequence[CorruptedRun]]) -> int:
        heads = -(-sum(map(len, chunks)) // self.head_rows_per_step)
        return heads + sum(self.model.num_layers - chunk[0].entry_layer for chunk in chunks)

    def _score_token(
        self, token: int, chunks: Sequence[Sequence[CorruptedRun]], tick: NextProgress
    ) -> Stepper[dict[CorruptedRun, float]]:
        """Return p(answer) of all runs of one token."""
        suffix = self._suffix_inputs(token)
        runs: list[CorruptedRun] = []
        answer_hidden: list[Tensor] = []
        for chunk in chunks:
            finished_runs, hidden = yield from self._run_blocks(suffix, chunk, tick)
            runs += finished_runs
            answer_hidden.append(hidden[:, -self.answer_length :].clone())
        p: list[float] = []
        for part in torch.split(torch.cat(answer_hidden), self.head_rows_per_step):
            p += self._answer_probability(part).tolist()
            yield tick()
        return dict(zip(runs, p, strict=True))

    def _suffix_inputs(self, token: int) -> SuffixInputs:
        ids, capture_inputs = self.ids[:, token:], self.block_runner.capture_block_inputs
        ids_before_answer = ids[:, : -self.answer_length]
        return SuffixInputs(
            token,
            capture_inputs(ids, token),
            capture_inputs(ids[:, :1], token),
            capture_inputs(ids_before_answer, token) if ids_before_answer.shape[1] else None,
        )

    def _run_blocks(
        self, suffix: SuffixInputs, chunk: Sequence[CorruptedRun], tick: NextProgress
    ) -> Stepper[tuple[list[CorruptedRun], Tensor]]:
        """Run a chunk through all blocks. Return its runs and their outputs of the last block."""
        runs: list[CorruptedRun] = []
        hidden = self.base_runs.states[0][:0, suffix.token :]
        for layer in range(chunk[0].entry_layer, self.model.num_layers):
            next_runs = dict.fromkeys(run.clipped_at(layer + 1) for run in chunk if run.entry_layer <= layer)
            runs, hidden = self._advance_block(suffix, layer, runs, hidden, list(next_runs))
            yield tick()
        return runs, hidden

    def _advance_block(
        self,
        suffix: SuffixInputs,
        layer: int,
        runs: list[CorruptedRun],
        hidden: Tensor,
        next_runs: list[CorruptedRun],
    ) -> tuple[list[CorruptedRun], Tensor]:
        """Advance the runs that enter a block. Return the runs above it and their states (runs, positions, d).

        Where a window ends for one run and continues for others, the first keeps its row and the others diverge from
        it.
        """
        next_set = set(next_runs)
        continuing = [run if run in next_set else run._replace(end_layer=layer + 1) for run in runs]
        out = self._run_block(suffix, layer, continuing, hidden) if continuing else hidden
        if len(continuing) == len(next_runs):
            return continuing, out
        index_of = {run: i for i, run in enumerate(continuing)}
        diverging = [t for t in next_runs if t not in index_of and t.entry_layer < layer]
        entering = [t for t in next_runs if t.entry_layer == layer]
        diverging_rows, entering_rows = (
            [index_of[t.clipped_at(layer)] for t in diverging],
            [1 + t.sample for t in entering],
        )
        before = torch.cat(
            [hidden[diverging_rows, :1], self.base_runs.states[layer][entering_rows, suffix.token, None]]
        )
        after = torch.cat(
            [out[diverging_rows], self.base_runs.states[layer + 1][entering_rows, suffix.token :]]
        )
        new = diverging + entering
        after[:, 0] = self._exchanged_output(suffix, layer, new, before)
        return continuing + new, torch.cat([out, after])

    def _exchanged_output(
        self, suffix: SuffixInputs, layer: int, runs: list[CorruptedRun], hidden: Tensor
    ) -> Tensor:
        """Return a block's output at the restored token (runs, d): the clean run's, or its own with a module output
        held."""
        out = self.base_runs.states[layer + 1][[0] * len(runs), suffix.token]
        held = [i for i, t in enumerate(runs) if t.entry_layer < layer or t.source_kind != "hidden"]
        if held:
            held_runs = [runs[i] for i in held]
            past = self._corrupted_past(suffix.token, layer, held_runs)
            with self._held_outputs(suffix.token, layer, held_runs):
                out[held] = self.block_runner.run(suffix.first_position, layer, hidden[held], past)[0][:, 0]
        return out

    def _run_block(
        self, suffix: SuffixInputs, layer: int, runs: list[CorruptedRun], hidden: Tensor
    ) -> Tensor:
        """Run one block; of the last block, only the positions that predict the answer."""
        past = self._corrupted_past(suffix.token, layer, runs)
        if layer == self.model.num_layers - 1 and suffix.before_answer:
            extended_past = self.block_runner.run_kv_only(
                suffix.before_answer, layer, hidden[:, : -self.answer_length], past
            )
            return self.block_runner.run(
                self.answer_inputs, layer, hidden[:, -self.answer_length :], extended_past
            )[0]
        with self._held_outputs(suffix.token, layer, runs):
            return self.block_runner.run(suffix.all_positions, layer, hidden, past)[0]

    def _corrupted_past(self, token: int, layer: int, runs: Sequence[CorruptedRun]) -> LayerKV:
        """Return the corrupted runs' keys and values before the token."""
        keys, values = self.base_runs.past[layer]
        rows = [1 + run.sample for run in runs]
        return keys[rows, :, :token], values[rows, :, :token]

    @contextmanager
    def _held_outputs(self, token: int, layer: int, runs: Sequence[CorruptedRun]) -> Iterator[None]:
        """Within the context, hold the first position's module outputs of the runs that hold them in this block."""
        with ExitStack() as stack:
            for kind in SEVERABLE_KINDS:
                held = [i for i, run in enumerate(runs) if run.is_held(kind, layer)]
                if held:
                    rows = [1 + runs[i].sample if runs[i].severed else 0 for i in held]
                    put = _first_position_writer(
                        len(runs), held, self.base_runs.outputs[kind][layer][rows, token]
                    )
                    stack.enter_context(replace_output(self.modules_by_kind[kind][layer], put))
            yield

    def _answer_probability(self, hidden: Tensor) -> Tensor:
        """Return p(answer) (rows,) from the last block's output (rows, n, d) at the positions that predict the
        answer."""
        logits = self.block_runner.logits(hidden.reshape(-1, hidden.shape[-1]))
        return self.trace_input.answer_probability(logits.view(*hidden.shape[:2], -1))


def _first_position_writer(rows: int, held: list[int], values: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that writes values (held, d) into a module's output at the first position of some rows."""

    def put(output: Tensor) -> Tensor:
        output.view(rows, -1, output.shape[-1])[held, 0] = values
        return output

    return put


def _progress_counter(phase: Phase, total: int) -> NextProgress:
    """Return a function that returns the progress after each further step of a phase."""
    steps = count(1)
    return lambda: Progress(phase, next(steps), total)
