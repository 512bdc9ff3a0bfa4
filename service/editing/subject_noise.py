"""Fact forcing: factors computed while noise is added to the subject's embeddings (Hase et al. 2023).

One fixed noise (n, d) is added to the embeddings of the subject's tokens in every row, in all steps of the search. A
subject may have other tokens after a context than alone: noise and subject are aligned at their ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from service.kit.text import Span
from service.models.token_batch import TokenizedStatement

EmbeddingHook = Callable[[Tensor], Tensor]
#: the columns of a row that are a subject's tokens, and its noise (n, d)
NoisedSpan = tuple[Span, Tensor | None]


def noise_hook(rows: Sequence[NoisedSpan]) -> EmbeddingHook | None:
    """Return a hook that adds the noise to a batch's embeddings (rows, T, d) in place: summed in fp64, rounded once.
    None without noise."""
    if all(noise is None for _, noise in rows):
        return None

    def disturb(embedded: Tensor) -> Tensor:
        for row, ((begin, end), noise) in zip(embedded, rows, strict=True):
            if noise is not None and (size := min(end - begin, len(noise))):
                part = row[end - size : end]
                part.copy_(part.double() + noise[-size:].to(part.device).double())
        return embedded

    return disturb


def noise_hook_right_padded(
    texts: Sequence[TokenizedStatement], noises: Sequence[Tensor | None]
) -> EmbeddingHook | None:
    """Return the hook for right-padded texts."""
    return noise_hook([(t.subject, noise) for t, noise in zip(texts, noises, strict=True)])


def noise_hooks_split(
    texts: Sequence[TokenizedStatement], noises: Sequence[Tensor | None], width: int
) -> tuple[EmbeddingHook | None, EmbeddingHook | None]:
    """Return the hooks for texts that are split before the subject's edited token: for prefixes left-padded to
    `width`, and for suffixes."""
    prefix_spans: list[NoisedSpan] = []
    suffix_spans: list[NoisedSpan] = []
    for text, noise in zip(texts, noises, strict=True):
        (begin, end), edited = text.subject, text.edited_index
        before = None if noise is None else noise[: -(end - edited)]
        prefix_spans.append(((width - (edited - begin), width), before))
        suffix_spans.append(((0, end - edited), noise))
    return noise_hook(prefix_spans), noise_hook(suffix_spans)
