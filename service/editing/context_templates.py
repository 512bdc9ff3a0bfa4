"""Texts put in front of a prompt, so that a key stands for its subject rather than for one wording (methods A.2).

Sampled from the *base* model with a seed and stored with it, never cached by name and never formatted: a brace in a
sampled text is only a brace.
"""

from __future__ import annotations

import torch

from service.kit.steps import Phase, Stepper
from service.models.loading import LoadedModel
from service.models.sampling import sample_texts

CONTEXT_LENGTHS = (5, 10)  # tokens, the start token included; half of the contexts each
TOP_K = 5


def _clean_context(text: str) -> str:
    return " ".join(text.replace("\ufffd", " ").split()).rstrip(" .,;:!?")


def sample_contexts(model: LoadedModel, count: int, seed: int) -> Stepper[list[str]]:
    """`count` contexts without closing punctuation; the bare prompt is not among them."""
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    for i, length in enumerate(CONTEXT_LENGTHS):
        share = count // 2 if i == 0 else count - count // 2
        if share:
            texts += yield from sample_texts(
                model, share, length, generator, top_k=TOP_K, phase=Phase.CONTEXTS
            )
    return [_clean_context(t) for t in texts]
