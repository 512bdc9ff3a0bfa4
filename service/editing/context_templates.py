"""Contexts: texts before a prompt, over which the key of a subject is averaged (Meng et al. 2022, section 3.1).

Contexts are sampled from the base model with a seed. They are never passed to `str.format`: a brace in a sampled text
is a brace.
"""

from __future__ import annotations

import torch

from service.kit.answer import strip_trailing_marks
from service.kit.steps import Phase, Stepper
from service.models.loading import LoadedModel
from service.models.sampling import sample_texts

CONTEXT_LENGTHS = (5, 10)  # tokens, the start token included; half of the contexts each
TOP_K = 5


def _clean_context(text: str) -> str:
    return strip_trailing_marks(" ".join(text.replace("\ufffd", " ").split()))


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
