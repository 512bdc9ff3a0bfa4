"""What a trace asks of a model: the tokens, the subject among them, the answer, and the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.errors import InvalidInput
from service.kit.text import Span, Statement, separator, token_span
from service.models.loading import LoadedModel
from service.models.precision import wide
from service.models.token_batch import forward, pad
from service.tracing.noise import Level, draw, level


@dataclass(frozen=True)
class Question:
    """`ids` are the prompt's T tokens and all tokens of the answer but the last, which nothing reads."""

    text: str
    tokens: tuple[str, ...]  #: the prompt's T tokens as a person reads them
    ids: tuple[int, ...]
    subject: Span  #: token range [b, e)
    answer: str
    answer_ids: tuple[int, ...]
    answer_tokens: tuple[str, ...]
    level: Level
    noise: Tensor  #: (R, e - b, d) in fp64, scaled, on the model's device
    seed: int
    compat: str | None

    @property
    def length(self) -> int:
        """T: how many tokens the prompt has."""
        return len(self.tokens)

    @property
    def samples(self) -> int:
        return int(self.noise.shape[0])

    def joint(self, logits: Tensor) -> Tensor:
        """Joint probability (rows,) of the answer's n tokens; logits (rows, n, V) at T-1 .. T+n-2."""
        wanted = torch.tensor(self.answer_ids, device=logits.device).expand(len(logits), -1)
        logp = wide(logits).log_softmax(-1).gather(2, wanted[..., None])[..., 0]
        return logp.sum(1).exp()


def ask(
    model: LoadedModel,
    statement: Statement,
    target: str | None,
    samples: int,
    noise: float | str,
    seed: int,
    compat: str | None,
    subjects: Sequence[str],
) -> Question:
    """Tokenise prompt and answer together, find the subject by characters, and draw the noise."""
    joined = separator(statement.text, target) + target if target else ""
    ids, offsets = model.encode(statement.text + joined)
    if len(ids) > model.positions:
        raise InvalidInput(
            f"prompt and target have {len(ids)} tokens and the model has {model.positions} positions: "
            "shorten them.",
            "prompt",
        )
    subject = token_span(offsets, statement.span)
    end = (len(statement.text), len(statement.text) + len(joined))
    first, last = token_span(offsets, end) if target else (len(ids), len(ids))
    if first < subject[1]:
        raise InvalidInput("the target merges with the subject: end the prompt at a word boundary.", "target")
    prompt, answer = ids[:first], ids[first:last]
    shown = readable(model, statement.text + joined, ids, offsets)
    if not answer:
        answer = [_greedy(model, prompt)]
        joined = model.tokenizer.decode(answer)
    strength = level(model, noise, subjects)
    z = draw(samples, subject[1] - subject[0], model.width, seed, compat)
    return Question(
        text=statement.text,
        tokens=tuple(shown[:first]),
        ids=tuple(prompt + answer[:-1]),
        subject=subject,
        answer=joined,
        answer_ids=tuple(answer),
        answer_tokens=tuple(shown[first:last] or [joined]),
        level=strength,
        noise=(strength.value * z).to(model.device),
        seed=seed,
        compat=compat,
    )


def _greedy(model: LoadedModel, prompt: list[int]) -> int:
    with torch.no_grad():
        return int(forward(model, pad([prompt], model))[0, -1].argmax())


def readable(model: LoadedModel, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> list[str]:
    """Each token as the text it stands for, with the space before it; a special token by its own name.

    A character that is spread over several tokens cannot be cut, so each of them shows all of it and a count:
    "京 (2/3)".
    """
    shown: list[str] = []
    shared: list[int] = []  # tokens so far that overlap one another
    end = 0
    for i, (a, b) in enumerate(offsets):
        if shared and a < end:
            shown.append(text[a:b])
            shared.append(i)
        else:
            _count(shown, shared)
            shown.append(text[end:b] or str(model.tokenizer.convert_ids_to_tokens([ids[i]])[0]))
            shared = [i] if b > a else []
        end = max(end, b)
    _count(shown, shared)
    return shown


def _count(shown: list[str], shared: list[int]) -> None:
    if len(shared) > 1:
        for n, i in enumerate(shared, 1):
            shown[i] += f" ({n}/{len(shared)})"
