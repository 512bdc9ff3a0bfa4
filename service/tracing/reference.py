"""Reference implementation of causal tracing by full forward passes, as in the code of Meng et al. (2022).

Every cell (t, l) is one pass of a batch of 1 + R rows: row 0 is clean, and its states are copied into the R corrupted
rows. `fast_trace.py` computes the same numbers with less work; the tests compare it with this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from service.kit.separator import Separator
from service.kit.steps import Phase, Progress, Stepper
from service.kit.text import Statement
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.schemas import Mentions
from service.tracing.noise import corrupt
from service.tracing.result import TraceResult, build_trace_result
from service.tracing.trace_input import TraceInput, build_trace_input

TRACE_KINDS = ("hidden", "mlp", "attn")
SEVERABLE_KINDS = ("mlp", "attn")


def restoration_window(layer: int, window: int, layers: int) -> tuple[int, int]:
    """Return the layers [first, last) restored together around a layer: a window of 10 is l-5 .. l+4, clipped at the
    ends."""
    return max(0, layer - window // 2), min(layers, layer - (-window // 2))


def modules_of_kind(model: LoadedModel, kind: str) -> list[nn.Module]:
    """Return the modules that a kind restores, by layer: blocks, or what adds to the residual stream."""
    pick = {"hidden": model.block, "mlp": model.mlp_output, "attn": model.attention_output}[kind]
    return [pick(layer) for layer in range(model.num_layers)]


def trace_reference(
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
    """Return the trace of a statement, computed with one full pass for every cell."""
    trace_input = build_trace_input(
        model, statement, target, samples, noise, seed, compat, subjects, mentions, separator
    )
    high, low = _high_and_low(model, trace_input)
    done, total = (
        0,
        len(kinds) * trace_input.prompt_length * model.num_layers
        + severed * (1 + len(SEVERABLE_KINDS)) * model.num_layers,
    )
    scores: dict[str, list[list[float]]] = {}
    for kind in kinds:
        scores[kind] = []
        for token in range(trace_input.prompt_length):
            row: list[float] = []
            for layer in range(model.num_layers):
                row.append(_restored_probability(model, trace_input, kind, token, layer, window))
                done += 1
                yield Progress(Phase.TRACE, done, total)
            scores[kind].append(row)
    severed_scores: dict[str, list[float]] = {}
    for path in ("none", *SEVERABLE_KINDS) if severed else ():
        severed_scores[path] = []
        for layer in range(model.num_layers):
            severed_scores[path].append(
                _severed_probability(model, trace_input, None if path == "none" else path, layer)
            )
            done += 1
            yield Progress(Phase.TRACE, done, total)
    return build_trace_result(trace_input, high, low, scores, severed_scores if severed else None, window)


def _answer_probabilities(model: LoadedModel, trace_input: TraceInput) -> Tensor:
    """Return p(answer) (1 + R,) of one full pass with the installed hooks: row 0 clean, the others corrupted."""

    def disturb(embedded: Tensor) -> Tensor:
        corrupt(embedded[1:], trace_input.corrupted_tokens, trace_input.noise)
        return embedded

    ids = torch.tensor([trace_input.ids], device=model.device).expand(1 + trace_input.samples, -1)
    with torch.no_grad(), replace_output(model.embedding, disturb):
        logits = model.model(input_ids=ids, use_cache=False).logits
    return trace_input.answer_probability(logits[:, trace_input.prompt_length - 1 :])


def _high_and_low(model: LoadedModel, trace_input: TraceInput) -> tuple[float, float]:
    p = _answer_probabilities(model, trace_input)
    return p[0].item(), p[1:].mean().item()


@contextmanager
def _edited_outputs(
    modules: Sequence[nn.Module], change: Callable[[int, Tensor], None], rows: int
) -> Iterator[None]:
    """Within the context, `change(i, output (rows, T, d))` writes into the output of each module."""

    def hook(i: int) -> Callable[[Tensor], Tensor]:
        def put(output: Tensor) -> Tensor:
            change(i, output.view(rows, -1, output.shape[-1]))  # OPT's MLP flattens rows and positions
            return output

        return put

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.enter_context(replace_output(module, hook(i)))
        yield


def _restored_probability(
    model: LoadedModel, trace_input: TraceInput, kind: str, token: int, layer: int, window: int
) -> float:
    """Return the mean p(answer) of the corrupted rows with the clean row's state restored at one token."""
    first, last = (
        (layer, layer + 1) if kind == "hidden" else restoration_window(layer, window, model.num_layers)
    )

    def put(_i: int, output: Tensor) -> None:
        output[1:, token] = output[0, token]

    with _edited_outputs(modules_of_kind(model, kind)[first:last], put, 1 + trace_input.samples):
        return _answer_probabilities(model, trace_input)[1:].mean().item()


def _severed_probability(
    model: LoadedModel, trace_input: TraceInput, severed_kind: str | None, layer: int
) -> float:
    """Return p(answer) with a hidden state restored at the subject's last token and its MLPs (or attentions) severed.

    Both passes use the same noise, so the held outputs are those of the run into which they are written.
    """
    if severed_kind is None:
        return _restored_probability(model, trace_input, "hidden", trace_input.subject[1] - 1, layer, 1)
    token, rows = trace_input.subject[1] - 1, 1 + trace_input.samples
    with capture(dict(enumerate(modules_of_kind(model, severed_kind)))) as captured:
        _answer_probabilities(model, trace_input)
    corrupted_outputs = [
        captured[i].reshape(rows, -1, captured[i].shape[-1])[1:, token] for i in range(model.num_layers)
    ]

    def put(i: int, output: Tensor) -> None:
        output[1:, token] = corrupted_outputs[i]

    with _edited_outputs(modules_of_kind(model, severed_kind), put, rows):
        return _restored_probability(model, trace_input, "hidden", token, layer, 1)
