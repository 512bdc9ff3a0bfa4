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

from service.editing.subject_noise import Change, parted
from service.kit.steps import Progress, Steps
from service.kit.text import Statement, separator, token_span
from service.models.block_runner import Blocks, Passage, Past
from service.models.hooks import capture, replace
from service.models.loading import LoadedModel
from service.models.precision import wide
from service.models.token_batch import Batch, Tokens, pad, tokens
from service.recipes.recipe import RomeParameters
from service.schemas import Objective


@dataclass(frozen=True)
class Rows:
    """The statements of one edit as tokens: row 0 is the bare prompt, the others stand after contexts."""

    prompts: list[Tokens]
    targets: list[list[int]]
    bare: list[Tokens]  #: the subject alone and, where the key is averaged over it, after each context

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def essence(self) -> int:
        """The text in which the subject stands bare: the bare prompt where it begins with the subject, else one more."""
        return 0 if self.prompts[0].head == self.bare[0].head else self.size

    def texts(self) -> list[Tokens]:
        """The prompts, each with its object but for the last token, which nothing follows; then what `essence` needs."""
        said = [Tokens(p.ids + t[:-1], p.subject) for p, t in zip(self.prompts, self.targets, strict=True)]
        return said if self.essence == 0 else [*said, Tokens(self.bare[0].head, self.bare[0].subject)]


def _leads(contexts: Sequence[str]) -> list[str]:
    """Nothing, and the contexts as closed sentences."""
    return ["", *(f"{c}. " if c else "" for c in contexts)]


def rows(
    model: LoadedModel, statement: Statement, target: str, contexts: Sequence[str], bare: bool = False
) -> Rows:
    """Tokenise prompt and object together, once for each context that fits beside them; with `bare` the subject, too."""
    prompts, targets = [], []
    for lead in _leads(contexts):
        placed = statement.after(lead)
        sep = separator(placed.text, target)
        ids, offsets = model.encode(placed.text + sep + target)
        if lead and len(ids) > model.positions:
            continue
        start = token_span(offsets, (len(placed.text), len(placed.text + sep + target)))[0]
        prompts.append(Tokens(ids[:start], token_span(offsets[:start], placed.span)))
        targets.append(ids[start:])
    begin, end = statement.span
    subject = statement.text[begin:end]
    alone = Statement(subject, (0, len(subject)))
    leads = _leads(contexts) if bare else [""]
    return Rows(prompts, targets, [tokens(model, alone.after(lead)) for lead in leads])


@dataclass(frozen=True)
class Wish:
    """One edit that a value is wanted for."""

    rows: Rows
    parameters: RomeParameters
    objective: Objective = field(default="write", kw_only=True)
    noise: Tensor | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )  #: (n, d) on the subject, see `forcing`


@dataclass(frozen=True)
class Value:
    """What the optimisation found, and what the pass before it saw at the subject's last token."""

    delta: Tensor  #: (d,)
    losses: list[float]
    initial: Tensor  #: v (d,): what delta is added to, at the bare prompt
    keys: Tensor  #: (prompts, D): the down-projection's input
    values: Tensor  #: (prompts, d): its output


@dataclass(frozen=True)
class Place:
    """Where delta is added: to the output of a layer's down-projection, or to the hidden state after the layer."""

    layer: int
    hidden: bool = False


@dataclass(frozen=True)
class Suffixes:
    """Rows (B, A) from the subject's last token, in column 0, on: what a step starts from.

    What stands before is constant by causality, and so is what lies below: of the one the keys and values are kept,
    of the other the hidden states.
    """

    blocks: Blocks
    ids: Tensor  #: (B, A) right-padded
    mask: Tensor  #: (B, P + A), over the left-padded prefixes and the suffixes
    positions: Tensor  #: (B, A)
    past: list[Past | None]  #: keys and values of the prefixes, by layer
    passage: Passage
    hidden: Tensor  #: (B, A, d) as they enter block `first`
    first: int
    module: nn.Module | None  #: where to add in block `first`; None: to `hidden` itself

    def of(self, rows: Tensor) -> Suffixes:
        """Some of the rows."""
        ids, mask, positions = self.ids[rows], self.mask[rows], self.positions[rows]
        past = [p and (p[0][rows], p[1][rows]) for p in self.past]
        some = changed(self, ids=ids, mask=mask, positions=positions, past=past, hidden=self.hidden[rows])
        return changed(some, passage=some.enter(0, ids.shape[1]))

    def enter(self, first: int, end: int, rows: Tensor | slice = slice(None)) -> Passage:
        """Columns [first, end) of some rows, as the blocks are called for them."""
        before = self.mask.shape[1] - self.ids.shape[1]
        ids, positions = self.ids[rows, first:end], self.positions[rows, first:end]
        return self.blocks.enter(ids, before + first, None, positions, self.mask[rows, : before + end])

    def forward(self, change: Tensor, end: int | None = None) -> Tensor:
        """The output (B, A, d) of the blocks before `end`, or of all, when `change` (B, d) is added at the subject's last
        token."""

        def add(output: Tensor) -> Tensor:
            shaped = output.view(*self.ids.shape, -1)
            shaped[:, 0] += change.to(shaped.dtype)
            return output

        hidden = self.hidden if self.module else add(self.hidden.clone())
        for layer in range(self.first, self.blocks.model.layers if end is None else end):
            here = self.module if layer == self.first else None
            with replace(here, add) if here else nullcontext():
                hidden, _ = self.blocks.run(self.passage, layer, hidden, self.past[layer])
        return hidden


class Reading:
    """The last block's output at a few places (row, column), (N,) each, and not much more than that.

    The last block need not run where nobody reads it: there it only leaves keys and values. What is read are the
    columns in which an object is said, at the end of the rows, and column 0 of a few rows.
    """

    def __init__(self, suffixes: Suffixes, row: Tensor, column: Tensor) -> None:
        self.suffixes, self.row, self.column = suffixes, row, column
        self.layer, width = suffixes.blocks.model.layers - 1, suffixes.ids.shape[1]
        late = column > 0
        self.tail = int(column[late].min()) if bool(late.any()) else 0
        inside = suffixes.first == self.layer and suffixes.module is not None
        self.whole = self.tail < 2 or suffixes.first > self.layer or inside
        if self.whole:
            return
        self.few = row[~late]
        self.kept = suffixes.enter(0, self.tail)
        self.ending = suffixes.enter(self.tail, width)
        self.start = suffixes.enter(0, 1, self.few)
        self.place = torch.empty_like(row)
        self.place[late] = row[late] * (width - self.tail) + column[late] - self.tail
        self.place[~late] = len(suffixes.ids) * (width - self.tail) + torch.arange(
            len(self.few), device=row.device
        )

    def __call__(self, change: Tensor) -> Tensor:
        """(N, d), when `change` (B, d) is added at the subject's last token."""
        if self.whole:
            return self.suffixes.forward(change)[self.row, self.column]
        blocks, layer, tail = self.suffixes.blocks, self.layer, self.tail
        hidden, past = self.suffixes.forward(change, layer), self.suffixes.past[layer]
        kept = blocks.keep(self.kept, layer, hidden[:, :tail], past)
        ending, _ = blocks.run(self.ending, layer, hidden[:, tail:], kept)
        before = past and (past[0][self.few], past[1][self.few])
        start, _ = blocks.run(self.start, layer, hidden[self.few, :1], before)
        return torch.cat([ending.flatten(0, 1), start[:, 0]])[self.place]


@dataclass(frozen=True)
class Seen:
    """What the one pass over all rows shows at the subject's last token."""

    keys: Tensor  #: (rows, D)
    values: Tensor  #: (rows, d), the down-projection's output
    initial: Tensor  #: (rows, d), what delta is added to


def look(
    model: LoadedModel, texts: Sequence[Tokens], place: Place, noises: Sequence[Tensor | None] = ()
) -> tuple[Suffixes, Seen]:
    """Run what is constant, once: the prefixes through all blocks, the suffixes up to the edited one; the subjects noised where
    there is noise for a text."""
    blocks, starts = Blocks(model), [t.last_subject for t in texts]
    before = pad([t.ids[:s] for t, s in zip(texts, starts, strict=True)], model, side="left")
    after = pad([t.ids[s:] for t, s in zip(texts, starts, strict=True)], model)
    disturbed = parted(texts, noises or [None] * len(texts), before.ids.shape[1])
    past = _prefix(model, blocks, before, disturbed[0])
    mask = torch.cat([before.mask, after.mask], 1)
    positions = torch.tensor(starts, device=model.device)[:, None] + after.positions
    passage = blocks.enter(after.ids, before.ids.shape[1], disturbed[1], positions, mask)
    hidden = entering = passage.hidden
    down = model.down(place.layer)
    with capture({0: down}, "input") as keys, capture({0: down}) as values:
        for layer in range(place.layer + 1):
            entering = hidden
            hidden, _ = blocks.run(passage, layer, hidden, past[layer])
    first: tuple[int, Tensor, nn.Module | None] = (place.layer + 1, hidden, None)
    at = slice(None), 0
    outputs = values[0].reshape(*after.ids.shape, -1)[at].clone()
    if not place.hidden and not _adds(blocks, passage, place.layer, entering, hidden, past[place.layer]):
        first = (place.layer, entering, down)
    suffixes = Suffixes(blocks, after.ids, mask, positions, past, passage, first[1], first[0], first[2])
    found = keys[0].reshape(*after.ids.shape, -1)[at].clone()
    return suffixes, Seen(found, outputs, hidden[at].clone() if place.hidden else outputs)


def _prefix(model: LoadedModel, blocks: Blocks, before: Batch, change: Change | None) -> list[Past | None]:
    """Keys and values of what precedes, by layer; a row without anything before it is all padding."""
    if not before.ids.shape[1]:
        return [None] * model.layers
    passage = blocks.enter(before.ids, 0, change, before.positions, before.mask)
    hidden = passage.hidden
    past: list[Past | None] = []
    for layer in range(model.layers):
        hidden, kept = blocks.run(passage, layer, hidden, None)
        past.append(kept)
    return past


def _adds(
    blocks: Blocks, passage: Passage, layer: int, entering: Tensor, hidden: Tensor, past: Past | None
) -> bool:
    """Whether what is added to the down-projection's output comes out of the block as it is; not with a norm behind it."""
    probe = hidden[:, 0].detach().roll(1, -1)

    def add(output: Tensor) -> Tensor:
        output.view(*hidden.shape[:2], -1)[:, 0] += probe
        return output

    with replace(blocks.model.down(layer), add):
        moved, _ = blocks.run(passage, layer, entering, past)
    return torch.allclose(moved[:, 0], hidden[:, 0] + probe, rtol=1e-2, atol=1e-2 * float(probe.abs().max()))


@dataclass(frozen=True)
class Aim:
    """Where an object's tokens are to be said: row, column of the suffix, token, and weight 1 / |o|; flat, (N,) each."""

    row: Tensor
    column: Tensor
    token: Tensor
    weight: Tensor


def _aim(rows: Rows, first: int, device: torch.device) -> Aim:
    """Of the rows of one edit, which stand from `first` on."""
    places = [
        (first + i, len(p.ids) - 1 - p.last_subject + j, token, 1 / len(t))
        for i, (p, t) in enumerate(zip(rows.prompts, rows.targets, strict=True))
        for j, token in enumerate(t)
    ]
    *indices, weights = zip(*places, strict=True)
    row, column, token = (torch.tensor(x, device=device) for x in indices)
    return Aim(row, column, token, torch.tensor(weights, dtype=torch.float64, device=device))


@dataclass(eq=False)
class Search:
    """One edit's delta on its way down its loss. It knows nothing of the searches beside it."""

    wish: Wish
    initial: Tensor
    delta: Tensor
    adam: torch.optim.Adam
    essence: Tensor | None = None  #: log-probabilities after the bare subject, before any change
    losses: list[float] = field(default_factory=list)
    ended: bool = False

    @classmethod
    def start(cls, wish: Wish, initial: Tensor) -> Search:
        initial = wide(initial)
        delta = torch.zeros_like(initial, requires_grad=True)
        return cls(wish, initial, delta, torch.optim.Adam([delta], lr=wish.parameters.learning_rate))

    def loss(self, said: Tensor, aim: Aim, now: Tensor) -> Tensor:
        """From the log-probabilities where the object is said (N, V) and after the bare subject (V,)."""
        parameters = self.wish.parameters
        log_p = said.gather(1, aim.token[:, None])[:, 0]
        if self.wish.objective == "erase":
            joint = log_p.new_zeros(self.wish.rows.size).index_add(0, aim.row - aim.row[0], log_p)
            goal = joint.exp().mean()
        else:
            goal = -(log_p * aim.weight.to(log_p.dtype)).sum() / self.wish.rows.size
        if self.essence is None:
            self.essence = now.detach().clone()
        kl = (now.exp() * (now - self.essence)).sum()
        decay = parameters.weight_decay * self.delta.norm() / self.initial.norm() ** 2
        loss: Tensor = goal + parameters.kl_factor * kl + decay
        return loss

    def note(self, loss: float) -> None:
        """What the loss was; it may be low enough, or the last."""
        parameters = self.wish.parameters
        self.losses.append(loss)
        self.ended = (
            low(self.losses, parameters.stop_loss, self.wish.objective)
            or len(self.losses) == parameters.steps
        )

    def step(self, gradient: Tensor) -> None:
        """One update, kept inside the clamp; nothing here waits for the device."""
        self.delta.grad = gradient
        self.adam.step()
        with torch.no_grad():
            limit = self.wish.parameters.clamp * self.initial.norm()
            self.delta.mul_((limit / self.delta.norm()).clamp(max=1))


def low(losses: Sequence[float], limit: float, objective: Objective) -> bool:
    """Whether the last loss is low enough: below a limit; of an erasure, whose loss begins as a probability, below that share of
    the first."""
    return losses[-1] < limit * (losses[0] if objective == "erase" else 1)


class Round:
    """The searches that go on, side by side: which rows are whose, and what of them the loss reads."""

    def __init__(self, every: Suffixes, searches: Sequence[Search], rows: Mapping[Search, range]) -> None:
        device = every.ids.device
        self.searches = list(searches)
        self.suffixes = every.of(torch.tensor([i for s in searches for i in rows[s]], device=device))
        sizes = [len(rows[s]) for s in searches]
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.owner = torch.repeat_interleave(torch.tensor(sizes)).to(device)
        self.aims = [_aim(s.wish.rows, at, device) for s, at in zip(searches, firsts, strict=True)]
        essences = torch.tensor(
            [at + s.wish.rows.essence for at, s in zip(firsts, searches, strict=True)], device=device
        )
        row = torch.cat([*(a.row for a in self.aims), essences])
        column = torch.cat([*(a.column for a in self.aims), torch.zeros_like(essences)])
        self.reading = Reading(self.suffixes, row, column)

    def step(self) -> None:
        """Every search learns its loss, and those that go on take their step; the device is waited for once."""
        with torch.enable_grad():
            losses = self._losses()
            for search, loss in zip(self.searches, losses.tolist(), strict=True):
                search.note(loss)
            on = [i for i, search in enumerate(self.searches) if not search.ended]
            deltas = [self.searches[i].delta for i in on]
            gradients = torch.autograd.grad(losses[on].sum(), deltas) if on else ()
        for i, gradient in zip(on, gradients, strict=True):
            self.searches[i].step(gradient)

    def _losses(self) -> Tensor:
        """Each search's loss at its delta, from one pass for all; (searches,)."""
        change = torch.stack([s.delta for s in self.searches])[self.owner]
        hidden = self.reading(change)
        logp = wide(self.suffixes.blocks.logits(hidden)).log_softmax(-1)
        *said, now = torch.split(logp, [*(len(a.row) for a in self.aims), len(self.searches)])
        together = zip(self.searches, said, self.aims, now, strict=True)
        return torch.stack([search.loss(s, w, n) for search, s, w, n in together])


def values_steps(model: LoadedModel, place: Place, wishes: Sequence[Wish]) -> Steps[list[Value]]:
    """The values of several edits of one place, each as it would be found alone.

    Each is optimised with Adam and makes at most `steps - 1` updates, as published.
    """
    texts = [w.rows.texts() for w in wishes]
    noises = [w.noise for w, some in zip(wishes, texts, strict=True) for _ in some]
    suffixes, seen = look(model, [t for some in texts for t in some], place, noises)
    firsts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    searches = [Search.start(w, seen.initial[at]) for w, at in zip(wishes, firsts, strict=True)]
    rows = {s: range(at, at + len(t)) for s, at, t in zip(searches, firsts, texts, strict=True)}
    total = max(w.parameters.steps for w in wishes)
    yield Progress("optimise", 0, total)
    turn = Round(suffixes, searches, rows)
    for step in range(total):
        turn.step()
        still = [s for s in searches if not s.ended]
        if not still:
            break
        if still != turn.searches:
            turn = Round(suffixes, still, rows)
        yield Progress("optimise", step + 1, total)
    prompts = [slice(at, at + w.rows.size) for w, at in zip(wishes, firsts, strict=True)]
    return [
        Value(s.delta.detach(), s.losses, s.initial, seen.keys[at], seen.values[at])
        for s, at in zip(searches, prompts, strict=True)
    ]
