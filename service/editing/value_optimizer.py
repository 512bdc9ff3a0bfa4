"""v*: the value that makes the model generate the new object (ROME, Meng et al. 2022, Eq. 4).

    L(delta) = mean_i -log p(o | x_i + s, delta) / |o|  +  kl * KL(p_delta || p_0)  +  wd * |delta| / |v|^2

delta (d,) is added to the output of one module at the subject's edited token in every row (`subject_token.py`; as
published the last one): the prompt after each context, the bare subject, and the restatement (`restatement.py`) at
both of its mentions. With a restatement the first term is the weighted mean of the continuations, with weight 1 - w,
and of the object in the restatement, with weight w, plus the weighted -log p of the subject's name there, per token:
it keeps which subject the model reads. The KL term preserves the next-token distribution after the bare subject. It
is read at the subject's last position: by causality a suffix such as "is a" has no influence. To amplify a fact is to
write its true object. To erase it, the first term is the mean probability of the true object, mean_i exp(sum_j log
p(o_j | ..)) (Hase et al. 2023).

The search ends after a number of steps, below a loss, or with `stop_margin` when every token of the object leads all
other tokens by a margin in every row (ENCORE, 2025, stops when it is the most probable one).

Several edits of one layer are optimized in one batch (`suffix_batch.py`), each as it would be alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.editing.suffix_batch import DeltaSite, LastBlockReader, SuffixBatch, prefill_suffixes
from service.editing.tokenized_contexts import TokenizedContexts
from service.kit.steps import Phase, Progress, Stepper
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.schemas import Objective


@dataclass(frozen=True)
class ValueSearchSpec:
    """An edit whose value is optimized."""

    tokenized: TokenizedContexts
    parameters: RomeParameters
    objective: Objective = field(default="write", kw_only=True)
    noise: Tensor | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )  #: (n, d) on the subject, see `subject_noise.py`


@dataclass(frozen=True)
class ValueResult:
    """The result of the optimization, and the activations of the pass before it at the subject's edited token."""

    delta: Tensor  #: (d,)
    losses: list[float]
    initial: Tensor  #: v (d,): what delta is added to, at the bare prompt
    keys: Tensor  #: (prompts, D): the down-projection's input
    values: Tensor  #: (prompts, d): its output


@dataclass(frozen=True)
class TargetPositions:
    """The positions whose next token is a token of a target: row, column of the suffix, and token; (N,) each.

    `weight` is the weight of an object's token, relative to the mean over rows and tokens: 1 / |o| without a
    restatement. `name_weight` is that of a token of the subject's name in a restatement.
    """

    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor
    name_weight: Tensor


def _target_positions(spec: ValueSearchSpec, first_row: int, device: torch.device) -> TargetPositions:
    """Return the positions of one edit, whose rows begin at `first_row` of the batch."""
    rows = spec.tokenized
    positions = [
        (first_row + i, len(p.ids) - 1 - p.edited_index + j, token)
        for i, (p, t) in enumerate(zip(rows.prompts, rows.targets, strict=True))
        for j, token in enumerate(t)
    ]
    row, column, token = (torch.tensor(x, device=device) for x in zip(*positions, strict=True))
    weights = (torch.tensor(w, dtype=torch.float64, device=device) for w in _token_weights(spec))
    return TargetPositions(row, column, token, *weights)


def _token_weights(spec: ValueSearchSpec) -> tuple[list[float], list[float]]:
    """Return the weights of the tokens of all targets: as parts of an object, and as parts of a subject's name."""
    rows, parameters = spec.tokenized, spec.parameters
    restatement = rows.restatement
    if restatement is None:
        weights = [1 / len(t) for t in rows.targets for _ in t]
        return weights, [0.0] * len(weights)
    share = (1 - parameters.restatement_weight) * rows.size / rows.continuations
    weights = [share / len(t) for t in rows.targets[:-1] for _ in t]
    names = [0.0] * len(weights)
    name, other = restatement.subject_end, restatement.object_start
    size = len(restatement.target) - other
    weights += [0.0] * other + [parameters.restatement_weight * rows.size / size] * size
    names += [parameters.subject_weight / name] * name + [0.0] * (len(restatement.target) - name)
    return weights, names


@dataclass(eq=False)
class ValueOptimizer:
    """The optimization of one edit's delta. It does not depend on the other edits of the batch."""

    spec: ValueSearchSpec
    initial: Tensor
    delta: Tensor
    adam: torch.optim.Adam
    kl_reference: Tensor | None = None  #: log-probabilities after the bare subject, before any change
    losses: list[float] = field(default_factory=list)
    finished: bool = False
    lead: Tensor | None = None  #: least lead of a token of the object, in nats, where the search reads it

    @classmethod
    def start(cls, spec: ValueSearchSpec, initial: Tensor) -> ValueOptimizer:
        initial = at_least_fp32(initial)
        delta = torch.zeros_like(initial, requires_grad=True)
        return cls(spec, initial, delta, torch.optim.Adam([delta], lr=spec.parameters.learning_rate))

    def loss(self, target_log_probs: Tensor, targets: TargetPositions, subject_log_probs: Tensor) -> Tensor:
        """Return the loss from the log-probabilities at the target positions (N, V) and after the bare subject (V,)."""
        parameters = self.spec.parameters
        log_p = target_log_probs.gather(1, targets.token[:, None])[:, 0]
        if self.spec.objective == "erase":
            objective_term = self._mean_probability(log_p, targets)
        else:
            objective_term = -(log_p * targets.weight.to(log_p.dtype)).sum() / self.spec.tokenized.size
        if self.spec.tokenized.restatement is not None:
            objective_term = objective_term - (log_p * targets.name_weight.to(log_p.dtype)).sum()
        if parameters.stop_margin is not None and self.spec.objective != "erase":
            in_object = targets.weight > 0
            self.lead = least_lead(target_log_probs.detach()[in_object], targets.token[in_object])
        if self.kl_reference is None:
            self.kl_reference = subject_log_probs.detach().clone()
        kl = (subject_log_probs.exp() * (subject_log_probs - self.kl_reference)).sum()
        decay = parameters.weight_decay * self.delta.norm() / self.initial.norm() ** 2
        loss: Tensor = objective_term + parameters.kl_factor * kl + decay
        return loss

    def _mean_probability(self, log_p: Tensor, targets: TargetPositions) -> Tensor:
        """Return the weighted mean over the rows of the joint probability of the object."""
        size, row = self.spec.tokenized.size, targets.row - targets.row[0]
        in_object = targets.weight > 0
        joint = log_p.new_zeros(size).index_add(0, row, log_p * in_object)
        weight = log_p.new_zeros(size).index_add(0, row, targets.weight.to(log_p.dtype))
        return (joint.exp() * weight).mean()

    def record_loss(self, loss: float) -> None:
        """Record the loss of a step. The search is finished when the loss is low enough, the lead is large enough, or
        the last step is done."""
        parameters = self.spec.parameters
        self.losses.append(loss)
        leads = (
            self.lead is not None
            and parameters.stop_margin is not None
            and bool(self.lead >= parameters.stop_margin)
        )
        self.finished = (
            leads
            or below_stop_loss(self.losses, parameters.stop_loss, self.spec.objective)
            or len(self.losses) == parameters.steps
        )

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, from 0."""
        parameters = self.spec.parameters
        return parameters.learning_rate * (1 - (1 - parameters.final_rate) * step / parameters.steps)

    def step(self, gradient: Tensor) -> None:
        """Update delta and clamp its norm. No operation synchronizes with the device."""
        self.adam.param_groups[0]["lr"] = self._learning_rate(len(self.losses) - 1)
        self.delta.grad = gradient
        self.adam.step()
        with torch.no_grad():
            limit = self.spec.parameters.clamp * self.initial.norm()
            self.delta.mul_((limit / self.delta.norm()).clamp(max=1))


def least_lead(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return the least difference, over the rows (N, V), between the log-probability of a row's token and that of the
    most probable other one."""
    own = log_probs.gather(1, tokens[:, None])
    others = log_probs.scatter(1, tokens[:, None], -torch.inf).amax(1, keepdim=True)
    return (own - others).min()


def below_stop_loss(losses: Sequence[float], limit: float, objective: Objective) -> bool:
    """Whether the last loss is below `limit`. The loss of an erasure is a probability: it must be below that fraction
    of the first loss."""
    return losses[-1] < limit * (losses[0] if objective == "erase" else 1)


class OptimizerBatch:
    """The unfinished searches: their rows in one suffix batch, and the positions that their losses read."""

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
            _target_positions(s.spec, at, device) for s, at in zip(optimizers, firsts, strict=True)
        ]
        kl_rows = torch.tensor(
            [at + s.spec.tokenized.kl_reference_row for at, s in zip(firsts, optimizers, strict=True)],
            device=device,
        )
        kl_columns = [s.spec.tokenized.kl_reference_column for s in optimizers]
        row = torch.cat([*(a.row for a in self.targets), kl_rows])
        column = torch.cat([*(a.column for a in self.targets), torch.tensor(kl_columns, device=device)])
        self.reader = LastBlockReader(self.suffix_batch, row, column)

    def step(self) -> None:
        """Compute the loss of every search and update those that are not finished. The device is synchronized once."""
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
        """Return the loss of each search at its delta, (searches,), from one forward pass."""
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
    """Return the optimized values of edits with one delta site, each as it would be alone.

    Adam makes at most `steps - 1` updates, as in the published code.
    """
    texts = [w.tokenized.texts() for w in specs]
    noises = [w.noise for w, some in zip(specs, texts, strict=True) for _ in some]
    firsts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    later_mentions = [
        (first + row, position)
        for first, w in zip(firsts, specs, strict=True)
        for row, position in w.tokenized.later_mentions()
    ]
    suffix_batch, activations = prefill_suffixes(
        model, [t for some in texts for t in some], delta_site, noises, later_mentions
    )
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
