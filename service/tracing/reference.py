"""Causal tracing by full forward passes, as the paper's code does it: slow, plain, the oracle.

Every cell (t, l) is one pass of a batch of 1 + R rows: row 0 is clean and hands its states to the R corrupted
rows below it. `suffix.py` beside it gives the same numbers with far less work; tests hold it to this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from service.kit.steps import Progress, Steps
from service.kit.text import Statement
from service.models.hooks import capture, replace
from service.models.loading import LoadedModel
from service.tracing.noise import corrupt
from service.tracing.result import TraceResult, conclude
from service.tracing.trace_input import Question, ask

KINDS = ("hidden", "mlp", "attn")
CUTS = ("mlp", "attn")


def window_of(layer: int, window: int, layers: int) -> tuple[int, int]:
    """The layers [first, last) restored together around a layer: 10 are l-5 .. l+4, cut off at the ends."""
    return max(0, layer - window // 2), min(layers, layer - (-window // 2))


def modules(model: LoadedModel, kind: str) -> list[nn.Module]:
    """What a kind restores, by layer: outputs of blocks, of MLPs, or of attentions after their projection."""
    pick = {"hidden": model.block, "mlp": model.down, "attn": model.attention}[kind]
    return [pick(layer) for layer in range(model.layers)]


def oracle_steps(
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
    """Trace with one full pass for every cell."""
    q = ask(model, statement, target, samples, noise, seed, compat, subjects)
    high, low = _high_and_low(model, q)
    done, total = 0, len(kinds) * q.length * model.layers + severed * (1 + len(CUTS)) * model.layers
    scores: dict[str, list[list[float]]] = {}
    for kind in kinds:
        scores[kind] = []
        for token in range(q.length):
            row: list[float] = []
            for layer in range(model.layers):
                row.append(_restored(model, q, kind, token, layer, window))
                done += 1
                yield Progress("trace", done, total)
            scores[kind].append(row)
    cut: dict[str, list[float]] = {}
    for path in ("none", *CUTS) if severed else ():
        cut[path] = []
        for layer in range(model.layers):
            cut[path].append(_severed(model, q, None if path == "none" else path, layer))
            done += 1
            yield Progress("trace", done, total)
    return conclude(q, high, low, scores, cut if severed else None, window)


def _pass(model: LoadedModel, q: Question) -> Tensor:
    """p(answer) (1 + R,) of one full pass with the hooks in place: row 0 clean, the others corrupted."""

    def disturb(embedded: Tensor) -> Tensor:
        corrupt(embedded[1:], q.subject, q.noise)
        return embedded

    ids = torch.tensor([q.ids], device=model.device).expand(1 + q.samples, -1)
    with torch.no_grad(), replace(model.embedding, disturb):
        logits = model.model(input_ids=ids, use_cache=False).logits
    return q.joint(logits[:, q.length - 1 :])


def _high_and_low(model: LoadedModel, q: Question) -> tuple[float, float]:
    p = _pass(model, q)
    return p[0].item(), p[1:].mean().item()


@contextmanager
def _putting(
    modules: Sequence[nn.Module], change: Callable[[int, Tensor], None], rows: int
) -> Iterator[None]:
    """Within the block, `change(i, output (rows, T, d))` writes into the output of each module."""

    def hook(i: int) -> Callable[[Tensor], Tensor]:
        def put(output: Tensor) -> Tensor:
            change(i, output.view(rows, -1, output.shape[-1]))  # OPT's MLP flattens rows and positions
            return output

        return put

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.enter_context(replace(module, hook(i)))
        yield


def _restored(model: LoadedModel, q: Question, kind: str, token: int, layer: int, window: int) -> float:
    """Mean p(answer) of the corrupted rows with the clean row's state put back at one token."""
    first, last = (layer, layer + 1) if kind == "hidden" else window_of(layer, window, model.layers)

    def put(_i: int, output: Tensor) -> None:
        output[1:, token] = output[0, token]

    with _putting(modules(model, kind)[first:last], put, 1 + q.samples):
        return _pass(model, q)[1:].mean().item()


def _severed(model: LoadedModel, q: Question, cut: str | None, layer: int) -> float:
    """A hidden state restored at the subject's last token, whose MLPs (or attentions) stay as when corrupted.

    Both passes have the same noise: what is held comes from the very run it is put into.
    """
    if cut is None:
        return _restored(model, q, "hidden", q.subject[1] - 1, layer, 1)
    token, rows = q.subject[1] - 1, 1 + q.samples
    with capture(dict(enumerate(modules(model, cut)))) as seen:
        _pass(model, q)
    held = [seen[i].reshape(rows, -1, seen[i].shape[-1])[1:, token] for i in range(model.layers)]

    def put(i: int, output: Tensor) -> None:
        output[1:, token] = held[i]

    with _putting(modules(model, cut), put, rows):
        return _restored(model, q, "hidden", token, layer, 1)
