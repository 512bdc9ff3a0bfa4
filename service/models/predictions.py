"""A check of a loaded model's predictions: weights that do not belong to their configuration can be loaded, and predict
noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from service.errors import Misconfigured
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad

#: texts for a model without its own; one of them should resemble the text that it was trained on
BUILT_IN_TEXTS = (
    "Paris is the capital of France. She opened the door and went into the house. The sun rises in the east.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(add(i, 1))\n",
    "Paris est la capitale de la France. Elle ouvrit la porte et entra dans la maison.",
    "Paris es la capital de Francia. Ella abrió la puerta y entró en la casa.",
    "Paris ist die Hauptstadt von Frankreich. Sie öffnete die Tür und ging in das Haus.",
    "Париж является столицей Франции. Она открыла дверь и вошла в дом.",
    "巴黎是法国的首都。太阳从东方升起。她打开门走进了房子。",
    "パリはフランスの首都です。彼女はドアを開けて家に入りました。",
    "파리는 프랑스의 수도이다. 그녀는 문을 열고 집으로 들어갔다.",
    "باريس هي عاصمة فرنسا. فتحت الباب ودخلت إلى البيت.",
    "पेरिस फ्रांस की राजधानी है। उसने दरवाज़ा खोला और घर में गई।",
)
MIN_TOKENS, MAX_TOKENS = 6, 64  # of a text
# A small model of one subject can predict other text worse than a uniform guess. Measured on the English text with
# models of 6,000 tokens: 1.1 and 3.6 times its perplexity; 300 to 1,000 times with the tokenizer of another model.
TOLERANCE = 10.0


def check_predictions(model: LoadedModel, own_texts: Sequence[str] = ()) -> None:
    """Raise Misconfigured when logits are not finite or every text has a perplexity above the limit.

    The limit is the vocabulary size, the perplexity of a uniform guess; for the built-in texts, which are used where
    the model has no `own_texts`, it is `TOLERANCE` times that. The first text within the limit ends the check.
    """
    vocabulary = int(model.embedding.weight.shape[0])  # type: ignore[index]
    limit = vocabulary * (1.0 if own_texts else TOLERANCE)
    lowest = None
    for text in own_texts or BUILT_IN_TEXTS:
        ids = model.encode(text)[0][: min(MAX_TOKENS, model.max_positions)]
        if len(ids) < MIN_TOKENS:
            continue
        perplexity = _perplexity(model, ids)
        if perplexity <= limit:
            return
        lowest = min(perplexity, lowest or perplexity)
    if lowest is not None:
        raise _noise(
            model,
            f"its perplexity is {lowest:.0f}, and a guess among its {vocabulary} tokens has {vocabulary}",
        )


def _perplexity(model: LoadedModel, ids: list[int]) -> float:
    """Return the perplexity of a text. Raise Misconfigured when a logit is not finite."""
    with torch.no_grad():
        logits = forward(model, pad([ids], model))[0].float()
    if not torch.isfinite(logits).all():
        raise _noise(model, "its logits are not finite", ", or use --dtype float32 if another one is set")
    targets = torch.tensor(ids[1:], device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits[:-1], targets).double().exp())


def _noise(model: LoadedModel, reason: str, remedy: str = "") -> Misconfigured:
    return Misconfigured(
        f"the model {model.name!r} predicts noise: {reason}. Its weights, config.json and tokenizer.json do not belong "
        f"together: give all three from one model{remedy}."
    )
