"""Short texts sampled from a model, seeded: contexts for keys, text for statistics where there is no corpus."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from service.kit.steps import Progress, Steps
from service.models.loading import LoadedModel, start_token

ROWS = 32  # texts sampled side by side


def sample_texts(
    model: LoadedModel,
    count: int,
    length: int,
    generator: torch.Generator,
    top_k: int | None = None,
    phase: str = "sample",
) -> Steps[list[str]]:
    """`count` texts of `length` tokens, the start token included (the published lengths count it, methods A.2)."""
    texts: list[str] = []
    while len(texts) < count:
        rows = min(ROWS, count - len(texts))
        ids = torch.full((rows, 1), start_token(model) or 0, device=model.device)
        cache = DynamicCache(config=model.model.config)
        for _ in range(length - 1):
            with torch.no_grad():
                out = model.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            logits = out.logits[:, -1].float().cpu()
            if top_k is not None:
                least = logits.topk(min(top_k, logits.shape[1])).values[:, -1:]
                logits = logits.masked_fill(logits < least, float("-inf"))
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn.to(ids.device)], 1)
            yield Progress(phase, len(texts), count)
        texts += [model.decode(row) for row in ids.tolist()]
    return texts
