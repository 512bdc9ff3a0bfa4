"""v*: the change of value that makes the model say the new object (ROME, Meng et al. 2022, Eq. 4; methods A.6).

    L(delta) = mean_i -log p(o | x_i + s, delta) / |o|  +  kl * KL(p_delta || p_0)  +  wd * |delta| / |v|^2

delta (d,) is added to the output of one module at the subject's last token in every row: the prompt after each context,
and the bare subject, whose next-token distribution the KL term holds (at the subject's last position: by causality no
suffix such as "is a" could matter). To amplify a fact is to write its true object. To erase it, the first term is the mean
probability of the true object instead, mean_i exp(sum_j log p(o_j | ..)) (Hase et al. 2023; methods F.1).

Nothing constant is computed twice (methods G): what precedes the subject's last token is run once and leaves keys and
values; the blocks up to the edited one are run once and leave their hidden states, in the same pass that reads the keys and
the initial value; a step runs the blocks above on a few positions a row, and the head where the loss reads it. Several
edits of one layer share a pass: their rows stand side by side and their deltas know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from dataclasses import replace as changed

import torch
from torch import Tensor, nn

from service.editing.subject_noise import EmbeddingHook, noise_hooks_split
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import Statement, separator, token_span
from service.methods.parameters import RomeParameters
from service.models.block_runner import BlockInputs, BlockRunner, LayerKV
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.models.token_batch import PaddedBatch, TokenizedStatement, pad, tokenize_statement
from service.schemas import Objective


@dataclass(frozen=True)
class TokenizedContexts:
    """The statements of one edit as tokens: row 0 is the bare prompt, the others stand after contexts."""

    prompts: list[TokenizedStatement]
    targets: list[list[int]]
    bare_subjects: list[
        TokenizedStatement
    ]  #: the subject alone and, where the key is averaged over it, after each context

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def kl_reference_row(self) -> int:
        """The text in which the subject stands bare: the bare prompt where it begins with the subject, else one more."""
        return (
            0
            if self.prompts[0].ids_through_subject == self.bare_subjects[0].ids_through_subject
            else self.size
        )

    def texts(self) -> list[TokenizedStatement]:
        """The prompts, each with its object but for the last token, which nothing follows; then what `essence` needs."""
        with_targets = [
            TokenizedStatement(p.ids + t[:-1], p.subject)
            for p, t in zip(self.prompts, self.targets, strict=True)
        ]
        return (
            with_targets
            if self.kl_reference_row == 0
            else [
                *with_targets,
                TokenizedStatement(self.bare_subjects[0].ids_through_subject, self.bare_subjects[0].subject),
            ]
        )


def _context_prefixes(contexts: Sequence[str]) -> list[str]:
    """Nothing, and the contexts as closed sentences."""
    return ["", *(f"{c}. " if c else "" for c in contexts)]


def tokenize_contexts(
    model: LoadedModel,
    statement: Statement,
    target: str,
    contexts: Sequence[str],
    with_bare_subjects: bool = False,
) -> TokenizedContexts:
    """Tokenise prompt and object together, once for each context that fits beside them; with `bare` the subject, too."""
    prompts, targets = [], []
    for prefix in _context_prefixes(contexts):
        prefixed = statement.with_context(prefix)
        sep = separator(prefixed.text, target)
        ids, offsets = model.encode(prefixed.text + sep + target)
        if prefix and len(ids) > model.max_positions:
            continue
        start = token_span(offsets, (len(prefixed.text), len(prefixed.text + sep + target)))[0]
        prompts.append(TokenizedStatement(ids[:start], token_span(offsets[:start], prefixed.span)))
        targets.append(ids[start:])
    begin, end = statement.span
    subject = statement.text[begin:end]
    subject_statement = Statement(subject, (0, len(subject)))
    prefixes = _context_prefixes(contexts) if with_bare_subjects else [""]
    return TokenizedContexts(
        prompts,
        targets,
        [tokenize_statement(model, subject_statement.with_context(prefix)) for prefix in prefixes],
    )


@dataclass(frozen=True)
class ValueSearchSpec:
    """One edit that a value is wanted for."""

    tokenized: TokenizedContexts
    parameters: RomeParameters
    objective: Objective = field(default="write", kw_only=True)
    noise: Tensor | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )  #: (n, d) on the subject, see `forcing`


@dataclass(frozen=True)
class ValueResult:
    """What the optimisation found, and what the pass before it saw at the subject's last token."""

    delta: Tensor  #: (d,)
    losses: list[float]
    initial: Tensor  #: v (d,): what delta is added to, at the bare prompt
    keys: Tensor  #: (prompts, D): the down-projection's input
    values: Tensor  #: (prompts, d): its output


@dataclass(frozen=True)
class DeltaSite:
    """Where delta is added: to the output of a layer's down-projection, or to the hidden state after the layer."""

    layer: int
    on_hidden_state: bool = False


@dataclass(frozen=True)
class SuffixBatch:
    """Rows (B, A) from the subject's last token, in column 0, on: what a step starts from.

    What stands before is constant by causality, and so is what lies below: of the one the keys and values are kept,
    of the other the hidden states.
    """

    block_runner: BlockRunner
    ids: Tensor  #: (B, A) right-padded
    mask: Tensor  #: (B, P + A), over the left-padded prefixes and the suffixes
    positions: Tensor  #: (B, A)
    past: list[LayerKV | None]  #: keys and values of the prefixes, by layer
    block_inputs: BlockInputs
    hidden: Tensor  #: (B, A, d) as they enter block `first`
    first_layer: int
    delta_module: nn.Module | None  #: where to add in block `first`; None: to `hidden` itself

    def select_rows(self, rows: Tensor) -> SuffixBatch:
        """Some of the rows."""
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        past = [p and (p[0][rows], p[1][rows]) for p in self.past]
        selected = changed(self, ids=ids, mask=mask, positions=positions, past=past, hidden=self.hidden[rows])
        return changed(selected, block_inputs=selected.inputs_for(0, ids.shape[1]))

    def inputs_for(self, first: int, end: int, rows: Tensor | slice = slice(None)) -> BlockInputs:
        """Columns [first, end) of some rows, as the blocks are called for them."""
        before = self.mask.shape[1] - self.ids.shape[1]
        ids, positions = self.ids[rows, first:end], self.positions[rows, first:end]
        return self.block_runner.capture_block_inputs(
            ids, before + first, None, positions, self.mask[rows, : before + end]
        )

    def forward(self, change: Tensor, end: int | None = None) -> Tensor:
        """The output (B, A, d) of the blocks before `end`, or of all, when `change` (B, d) is added at the subject's last
        token."""

        def add(output: Tensor) -> Tensor:
            shaped = output.view(*self.ids.shape, -1)
            shaped[:, 0] += change.to(shaped.dtype)
            return output

        hidden = self.hidden if self.delta_module else add(self.hidden.clone())
        for layer in range(self.first_layer, self.block_runner.model.num_layers if end is None else end):
            delta_module = self.delta_module if layer == self.first_layer else None
            with replace_output(delta_module, add) if delta_module else nullcontext():
                hidden, _ = self.block_runner.run(self.block_inputs, layer, hidden, self.past[layer])
        return hidden


class LastBlockReader:
    """The last block's output at a few places (row, column), (N,) each, and not much more than that.

    The last block need not run where nobody reads it: there it only leaves keys and values. What is read are the
    columns in which an object is said, at the end of the rows, and column 0 of a few rows.
    """

    def __init__(self, suffix_batch: SuffixBatch, row: Tensor, column: Tensor) -> None:
        self.suffix_batch, self.row, self.column = suffix_batch, row, column
        self.layer, width = suffix_batch.block_runner.model.num_layers - 1, suffix_batch.ids.shape[1]
        in_tail = column > 0
        self.tail_start = int(column[in_tail].min()) if bool(in_tail.any()) else 0
        delta_in_last_block = suffix_batch.first_layer == self.layer and suffix_batch.delta_module is not None
        self.runs_whole_block = (
            self.tail_start < 2 or suffix_batch.first_layer > self.layer or delta_in_last_block
        )
        if self.runs_whole_block:
            return
        self.first_column_rows = row[~in_tail]
        self.head_inputs = suffix_batch.inputs_for(0, self.tail_start)
        self.tail_inputs = suffix_batch.inputs_for(self.tail_start, width)
        self.first_column_inputs = suffix_batch.inputs_for(0, 1, self.first_column_rows)
        self.gather_index = torch.empty_like(row)
        self.gather_index[in_tail] = (
            row[in_tail] * (width - self.tail_start) + column[in_tail] - self.tail_start
        )
        self.gather_index[~in_tail] = len(suffix_batch.ids) * (width - self.tail_start) + torch.arange(
            len(self.first_column_rows), device=row.device
        )

    def __call__(self, change: Tensor) -> Tensor:
        """(N, d), when `change` (B, d) is added at the subject's last token."""
        if self.runs_whole_block:
            return self.suffix_batch.forward(change)[self.row, self.column]
        blocks, layer, tail_start = self.suffix_batch.block_runner, self.layer, self.tail_start
        hidden, past = self.suffix_batch.forward(change, layer), self.suffix_batch.past[layer]
        head_past = blocks.run_kv_only(self.head_inputs, layer, hidden[:, :tail_start], past)
        tail_hidden, _ = blocks.run(self.tail_inputs, layer, hidden[:, tail_start:], head_past)
        first_column_past = past and (past[0][self.first_column_rows], past[1][self.first_column_rows])
        first_column_hidden, _ = blocks.run(
            self.first_column_inputs, layer, hidden[self.first_column_rows, :1], first_column_past
        )
        return torch.cat([tail_hidden.flatten(0, 1), first_column_hidden[:, 0]])[self.gather_index]


@dataclass(frozen=True)
class PrefillActivations:
    """What the one pass over all rows shows at the subject's last token."""

    keys: Tensor  #: (rows, D)
    values: Tensor  #: (rows, d), the down-projection's output
    initial: Tensor  #: (rows, d), what delta is added to


def prefill_suffixes(
    model: LoadedModel,
    texts: Sequence[TokenizedStatement],
    delta_site: DeltaSite,
    noises: Sequence[Tensor | None] = (),
) -> tuple[SuffixBatch, PrefillActivations]:
    """Run what is constant, once: the prefixes through all blocks, the suffixes up to the edited one; the subjects noised where
    there is noise for a text."""
    blocks, starts = BlockRunner(model), [t.last_subject_index for t in texts]
    prefixes = pad([t.ids[:s] for t, s in zip(texts, starts, strict=True)], model, side="left")
    suffix_tokens = pad([t.ids[s:] for t, s in zip(texts, starts, strict=True)], model)
    noise_hooks = noise_hooks_split(texts, noises or [None] * len(texts), prefixes.ids.shape[1])
    past = _run_prefixes(model, blocks, prefixes, noise_hooks[0])
    mask = torch.cat([prefixes.mask, suffix_tokens.mask], 1)
    positions = torch.tensor(starts, device=model.device)[:, None] + suffix_tokens.positions
    block_inputs = blocks.capture_block_inputs(
        suffix_tokens.ids, prefixes.ids.shape[1], noise_hooks[1], positions, mask
    )
    hidden = block_input = block_inputs.hidden
    down = model.down_proj(delta_site.layer)
    with capture({0: down}, "input") as keys, capture({0: down}) as values:
        for layer in range(delta_site.layer + 1):
            block_input = hidden
            hidden, _ = blocks.run(block_inputs, layer, hidden, past[layer])
    resume_point: tuple[int, Tensor, nn.Module | None] = (delta_site.layer + 1, hidden, None)
    at = slice(None), 0
    outputs = values[0].reshape(*suffix_tokens.ids.shape, -1)[at].clone()
    if not delta_site.on_hidden_state and not _is_additive(
        blocks, block_inputs, delta_site.layer, block_input, hidden, past[delta_site.layer]
    ):
        resume_point = (delta_site.layer, block_input, down)
    suffixes = SuffixBatch(
        blocks,
        suffix_tokens.ids,
        mask,
        positions,
        past,
        block_inputs,
        resume_point[1],
        resume_point[0],
        resume_point[2],
    )
    subject_keys = keys[0].reshape(*suffix_tokens.ids.shape, -1)[at].clone()
    return suffixes, PrefillActivations(
        subject_keys, outputs, hidden[at].clone() if delta_site.on_hidden_state else outputs
    )


def _run_prefixes(
    model: LoadedModel, blocks: BlockRunner, prefixes: PaddedBatch, noise_hook: EmbeddingHook | None
) -> list[LayerKV | None]:
    """Keys and values of what precedes, by layer; a row without anything before it is all padding."""
    if not prefixes.ids.shape[1]:
        return [None] * model.num_layers
    block_inputs = blocks.capture_block_inputs(prefixes.ids, 0, noise_hook, prefixes.positions, prefixes.mask)
    hidden = block_inputs.hidden
    past: list[LayerKV | None] = []
    for layer in range(model.num_layers):
        hidden, layer_past = blocks.run(block_inputs, layer, hidden, None)
        past.append(layer_past)
    return past


def _is_additive(
    blocks: BlockRunner,
    block_inputs: BlockInputs,
    layer: int,
    block_input: Tensor,
    hidden: Tensor,
    past: LayerKV | None,
) -> bool:
    """Whether what is added to the down-projection's output comes out of the block as it is; not with a norm behind it."""
    probe = hidden[:, 0].detach().roll(1, -1)

    def add(output: Tensor) -> Tensor:
        output.view(*hidden.shape[:2], -1)[:, 0] += probe
        return output

    with replace_output(blocks.model.down_proj(layer), add):
        probed, _ = blocks.run(block_inputs, layer, block_input, past)
    return torch.allclose(probed[:, 0], hidden[:, 0] + probe, rtol=1e-2, atol=1e-2 * float(probe.abs().max()))


@dataclass(frozen=True)
class TargetPositions:
    """Where an object's tokens are to be said: row, column of the suffix, token, and weight 1 / |o|; flat, (N,) each."""

    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor


def _target_positions(rows: TokenizedContexts, first_row: int, device: torch.device) -> TargetPositions:
    """Of the rows of one edit, which stand from `first` on."""
    positions = [
        (first_row + i, len(p.ids) - 1 - p.last_subject_index + j, token, 1 / len(t))
        for i, (p, t) in enumerate(zip(rows.prompts, rows.targets, strict=True))
        for j, token in enumerate(t)
    ]
    *indices, weights = zip(*positions, strict=True)
    row, column, token = (torch.tensor(x, device=device) for x in indices)
    return TargetPositions(row, column, token, torch.tensor(weights, dtype=torch.float64, device=device))


@dataclass(eq=False)
class ValueOptimizer:
    """One edit's delta on its way down its loss. It knows nothing of the searches beside it."""

    spec: ValueSearchSpec
    initial: Tensor
    delta: Tensor
    adam: torch.optim.Adam
    kl_reference: Tensor | None = None  #: log-probabilities after the bare subject, before any change
    losses: list[float] = field(default_factory=list)
    finished: bool = False

    @classmethod
    def start(cls, spec: ValueSearchSpec, initial: Tensor) -> ValueOptimizer:
        initial = at_least_fp32(initial)
        delta = torch.zeros_like(initial, requires_grad=True)
        return cls(spec, initial, delta, torch.optim.Adam([delta], lr=spec.parameters.learning_rate))

    def loss(self, target_log_probs: Tensor, targets: TargetPositions, subject_log_probs: Tensor) -> Tensor:
        """From the log-probabilities where the object is said (N, V) and after the bare subject (V,)."""
        parameters = self.spec.parameters
        log_p = target_log_probs.gather(1, targets.token[:, None])[:, 0]
        if self.spec.objective == "erase":
            joint = log_p.new_zeros(self.spec.tokenized.size).index_add(
                0, targets.row - targets.row[0], log_p
            )
            objective_term = joint.exp().mean()
        else:
            objective_term = -(log_p * targets.weight.to(log_p.dtype)).sum() / self.spec.tokenized.size
        if self.kl_reference is None:
            self.kl_reference = subject_log_probs.detach().clone()
        kl = (subject_log_probs.exp() * (subject_log_probs - self.kl_reference)).sum()
        decay = parameters.weight_decay * self.delta.norm() / self.initial.norm() ** 2
        loss: Tensor = objective_term + parameters.kl_factor * kl + decay
        return loss

    def record_loss(self, loss: float) -> None:
        """What the loss was; it may be low enough, or the last."""
        parameters = self.spec.parameters
        self.losses.append(loss)
        self.finished = (
            below_stop_loss(self.losses, parameters.stop_loss, self.spec.objective)
            or len(self.losses) == parameters.steps
        )

    def step(self, gradient: Tensor) -> None:
        """One update, kept inside the clamp; nothing here waits for the device."""
        self.delta.grad = gradient
        self.adam.step()
        with torch.no_grad():
            limit = self.spec.parameters.clamp * self.initial.norm()
            self.delta.mul_((limit / self.delta.norm()).clamp(max=1))


def below_stop_loss(losses: Sequence[float], limit: float, objective: Objective) -> bool:
    """Whether the last loss is low enough: below a limit; of an erasure, whose loss begins as a probability, below that share of
    the first."""
    return losses[-1] < limit * (losses[0] if objective == "erase" else 1)


class OptimizerBatch:
    """The searches that go on, side by side: which rows are whose, and what of them the loss reads."""

    def __init__(
        self,
        all_suffixes: SuffixBatch,
        optimizers: Sequence[ValueOptimizer],
        rows: Mapping[ValueOptimizer, range],
    ) -> None:
        device = all_suffixes.ids.device
        self.optimizers = list(optimizers)
        self.suffix_batch = all_suffixes.select_rows(
            torch.tensor([i for s in optimizers for i in rows[s]], device=device)
        )
        sizes = [len(rows[s]) for s in optimizers]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.optimizer_of_row = torch.repeat_interleave(torch.tensor(sizes)).to(device)
        self.targets = [
            _target_positions(s.spec.tokenized, at, device) for s, at in zip(optimizers, firsts, strict=True)
        ]
        kl_rows = torch.tensor(
            [at + s.spec.tokenized.kl_reference_row for at, s in zip(firsts, optimizers, strict=True)],
            device=device,
        )
        row = torch.cat([*(a.row for a in self.targets), kl_rows])
        column = torch.cat([*(a.column for a in self.targets), torch.zeros_like(kl_rows)])
        self.reader = LastBlockReader(self.suffix_batch, row, column)

    def step(self) -> None:
        """Every search learns its loss, and those that go on take their step; the device is waited for once."""
        with torch.enable_grad():
            losses = self._losses()
            for optimizer, loss in zip(self.optimizers, losses.tolist(), strict=True):
                optimizer.record_loss(loss)
            unfinished = [i for i, optimizer in enumerate(self.optimizers) if not optimizer.finished]
            deltas = [self.optimizers[i].delta for i in unfinished]
            gradients = torch.autograd.grad(losses[unfinished].sum(), deltas) if unfinished else ()
        for i, gradient in zip(unfinished, gradients, strict=True):
            self.optimizers[i].step(gradient)

    def _losses(self) -> Tensor:
        """Each search's loss at its delta, from one pass for all; (searches,)."""
        change = torch.stack([s.delta for s in self.optimizers])[self.optimizer_of_row]
        hidden = self.reader(change)
        logp = at_least_fp32(self.suffix_batch.block_runner.logits(hidden)).log_softmax(-1)
        *target_log_probs, subject_log_probs = torch.split(
            logp, [*(len(a.row) for a in self.targets), len(self.optimizers)]
        )
        per_optimizer = zip(self.optimizers, target_log_probs, self.targets, subject_log_probs, strict=True)
        return torch.stack([search.loss(s, w, n) for search, s, w, n in per_optimizer])


def optimize_values(
    model: LoadedModel, delta_site: DeltaSite, specs: Sequence[ValueSearchSpec]
) -> Stepper[list[ValueResult]]:
    """The values of several edits of one place, each as it would be found alone.

    Each is optimised with Adam and makes at most `steps - 1` updates, as published.
    """
    texts = [w.tokenized.texts() for w in specs]
    noises = [w.noise for w, some in zip(specs, texts, strict=True) for _ in some]
    suffix_batch, activations = prefill_suffixes(
        model, [t for some in texts for t in some], delta_site, noises
    )
    firsts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    optimizers = [
        ValueOptimizer.start(w, activations.initial[at]) for w, at in zip(specs, firsts, strict=True)
    ]
    rows = {s: range(at, at + len(t)) for s, at, t in zip(optimizers, firsts, texts, strict=True)}
    total = max(w.parameters.steps for w in specs)
    yield Progress(Phase.OPTIMIZE, 0, total)
    batch = OptimizerBatch(suffix_batch, optimizers, rows)
    for step in range(total):
        batch.step()
        unfinished = [s for s in optimizers if not s.finished]
        if not unfinished:
            break
        if unfinished != batch.optimizers:
            batch = OptimizerBatch(suffix_batch, unfinished, rows)
        yield Progress(Phase.OPTIMIZE, step + 1, total)
    prompts = [slice(at, at + w.tokenized.size) for w, at in zip(specs, firsts, strict=True)]
    return [
        ValueResult(s.delta.detach(), s.losses, s.initial, activations.keys[at], activations.values[at])
        for s, at in zip(optimizers, prompts, strict=True)
    ]
