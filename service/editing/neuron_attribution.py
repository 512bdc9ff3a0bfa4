"""Which neurons carry an answer: integrated gradients at the input of the down-projections (Dai et al. 2022, Eq. 2).

k (D,) is the input of a layer's down-projection at the last token of a prompt, after the activation, and p(a) the joint
probability of an answer's tokens when k is replaced by a k there. Neuron i of the layer has

    IG_i = k_i * integral over a from 0 to 1 of dp(a)/dk_i        sum_i IG_i = p(1) - p(0)

The integral is a mean over m midpoints (j - 1/2)/m; the published code takes the left ends. The output of the layer at
a k is its own plus (a - 1) W k, so that one batch of m rows from that layer on gives all derivatives: with g (d,) the
mean of dp/dy over the midpoints, IG = k * (W^T g).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from service.editing.suffix_batch import DeltaSite, LastBlockReader, prefill_suffixes
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.models.object_gradients import TokenRow
from service.models.precision import at_least_fp32
from service.models.token_batch import TokenizedStatement

SHARE_STEP = 0.05  # by which the share of prompts is moved
SHARE_MOVES = 6  # at most
FEWEST, MOST = 2, 5  # neurons of a fact, as far as moving the share leads there
LEAST_PROMPTS = 3  # in which a neuron must be found, where there are so many

Neuron = tuple[int, int]  #: layer and number


@dataclass(frozen=True)
class NeuronAttribution:
    """The attributions of one prompt and answer."""

    layers: list[int]
    scores: Tensor = field(repr=False)  #: IG (layers, D) in fp32
    probability: float  #: p(1), of the answer
    without: list[float]  #: p(0) of each layer: with its neurons switched off at the last token of the prompt

    def completeness_errors(self) -> list[float]:
        """Return |sum_i IG_i - (p(1) - p(0))| of each layer."""
        sums = self.scores.double().sum(1).tolist()
        return [abs(total - (self.probability - p0)) for total, p0 in zip(sums, self.without, strict=True)]


def attribute_neurons(
    model: LoadedModel, rows: Sequence[TokenRow], layers: Sequence[int], nodes: int
) -> Stepper[list[NeuronAttribution]]:
    """Return the attributions of all neurons of some layers for each prompt and its answer; a layer a step."""
    scores: list[Tensor] = []
    ends: list[list[tuple[float, float]]] = []
    for number, layer in enumerate(layers):
        found, probabilities = _attribute_layer(model, rows, layer, nodes)
        scores.append(found)
        ends.append(probabilities)
        yield Progress(Phase.TRACE, number + 1, len(layers))
    return [
        NeuronAttribution(
            list(layers),
            torch.stack([of_layer[i] for of_layer in scores]),
            ends[-1][i][0],
            [of_layer[i][1] for of_layer in ends],
        )
        for i in range(len(rows))
    ]


def _attribute_layer(
    model: LoadedModel, rows: Sequence[TokenRow], layer: int, nodes: int
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Return IG (rows, D) of one layer, and p(1) and p(0) of each row."""
    texts = [TokenizedStatement([*p, *a[:-1]], (len(p) - 1, len(p))) for p, a in rows]
    prefilled, activations = prefill_suffixes(model, texts, DeltaSite(layer))
    keys = at_least_fp32(activations.keys)  # (rows, D)
    weight = at_least_fp32(model.weight(layer).detach()).to(keys.device)
    weight = weight.T if model.architecture.conv1d else weight  # (d, D)
    midpoints = (torch.arange(nodes, dtype=keys.dtype) + 0.5) / nodes
    factors = torch.cat([midpoints, torch.tensor([0.0, 1.0], dtype=keys.dtype)]).to(keys.device)
    count = len(factors)
    batch = prefilled.select_rows(torch.arange(len(rows), device=model.device).repeat_interleave(count))
    widths = [len(answer) for _, answer in rows for _ in range(count)]
    places = [(i, column) for i, width in enumerate(widths) for column in range(width)]
    row_of, columns = torch.tensor(places, device=model.device).T
    own = keys @ weight.T  # (rows, d)
    change = ((factors - 1)[None, :, None] * own[:, None]).flatten(0, 1).requires_grad_()
    with torch.enable_grad():
        hidden = LastBlockReader(batch, row_of, columns)(change)
        log_p = at_least_fp32(batch.block_runner.logits(hidden)).log_softmax(-1)
        ids = torch.tensor(
            [t for _, answer in rows for _ in range(count) for t in answer], device=log_p.device
        )
        chosen = log_p.gather(1, ids[:, None])[:, 0]
        p = torch.stack([part.sum() for part in chosen.split(widths)]).exp().view(len(rows), count)
        (gradients,) = torch.autograd.grad(p[:, :nodes].sum(), [change])
    means = gradients.view(len(rows), count, -1)[:, :nodes].mean(1)  # (rows, d)
    ends = [(on, off) for off, on in p[:, nodes:].detach().tolist()]
    return (keys * (means @ weight)).float().cpu(), ends


def choose_neurons(
    attributions: Sequence[NeuronAttribution], threshold: float, share: float, most: int
) -> list[Neuron]:
    """Return the neurons of a fact from the attributions of its wordings, sorted; at least one and at most `most`.

    A wording keeps neurons with IG >= threshold times its greatest, over all layers. Those kept in at least a share of
    the wordings, and in three of them, are the fact's. The share moves up or down by .05, at most six times, until
    there are two to five. Where none is left, or more than `most`, those with the greatest mean attribution are taken.
    """
    layers = attributions[0].layers
    counts: Counter[Neuron] = Counter()
    for a in attributions:
        kept = (a.scores >= threshold * a.scores.max()).nonzero().tolist()
        counts.update((layers[row], neuron) for row, neuron in kept)
    chosen = _kept_in(counts, share, len(attributions))
    for _ in range(SHARE_MOVES):
        if FEWEST <= len(chosen) <= MOST:
            break
        share += SHARE_STEP if len(chosen) > MOST else -SHARE_STEP
        chosen = _kept_in(counts, share, len(attributions))
    if 0 < len(chosen) <= most:
        return sorted(chosen)
    means = torch.stack([a.scores for a in attributions]).double().mean(0)
    candidates = chosen or [
        (layers[int(means.argmax()) // means.shape[1]], int(means.argmax()) % means.shape[1])
    ]
    row_of = {layer: row for row, layer in enumerate(layers)}
    by_mean = sorted(candidates, key=lambda n: (-float(means[row_of[n[0]], n[1]]), n))
    return sorted(by_mean[:most])


def _kept_in(counts: Counter[Neuron], share: float, prompts: int) -> list[Neuron]:
    """Return the neurons that are kept in at least a share of the prompts."""
    least = max(share * prompts, min(LEAST_PROMPTS, prompts))
    return [neuron for neuron, count in counts.items() if count >= least - 1e-9]
