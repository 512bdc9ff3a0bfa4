"""Sample short texts from a model with a seed: contexts for keys, and text for statistics when there is no corpus."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel, bos_token_id

SAMPLE_BATCH_SIZE = 32  # texts in one batch


def sample_texts(
    model: LoadedModel,
    count: int,
    length: int,
    generator: torch.Generator,
    top_k: int | None = None,
    phase: Phase = Phase.SAMPLE,
    batch_size: int = SAMPLE_BATCH_SIZE,
) -> Stepper[list[str]]:
    """Return `count` texts of `length` tokens, including the BOS token, which the published lengths count (Meng et al.
    2022). Progress is in tokens."""
    texts: list[str] = []
    while len(texts) < count:
        rows = min(batch_size, count - len(texts))
        ids = torch.full((rows, 1), bos_token_id(model) or 0, device=model.device)
        cache = DynamicCache(config=model.model.config)
        for position in range(1, length):
            with torch.no_grad():
                out = model.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1].float().cpu()
            if top_k is not None:
                threshold = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < threshold, float("-inf"))
            next_ids = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, next_ids.to(ids.device)], 1)
            yield Progress(phase, len(texts) * length + rows * (position + 1), count * length)
        texts += [model.decode(row) for row in ids.tolist()]
    return texts
