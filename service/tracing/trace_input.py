"""The input of a trace: tokens, subject, answer and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.errors import InvalidInput
from service.kit.separator import Separator
from service.kit.steps import run_to_completion
from service.kit.text import Span, Statement, find_mentions, token_span
from service.models.loading import LoadedModel
from service.models.precision import at_least_fp32
from service.models.separator_choice import choose_separator
from service.models.token_batch import forward, pad
from service.schemas import Mentions
from service.tracing.noise import NoiseLevel, draw_noise, parse_noise_level


@dataclass(frozen=True)
class TraceInput:
    """The input of a trace. `ids` are the prompt's T tokens and the answer's tokens except the last, which is not an
    input."""

    text: str
    tokens: tuple[str, ...]  #: labels of the prompt's T tokens
    ids: tuple[int, ...]
    subject: Span  #: token range [b, e) of the mention at which states are restored
    mentions: tuple[
        Span, ...
    ]  #: token ranges of the corrupted mentions of the subject, with `subject` among them
    answer: str
    answer_ids: tuple[int, ...]
    answer_tokens: tuple[str, ...]
    noise_level: NoiseLevel
    noise: Tensor  #: (R, corrupted tokens, d) in fp64, scaled, on the model's device
    seed: int
    compat: str | None

    @property
    def prompt_length(self) -> int:
        """T: the number of the prompt's tokens."""
        return len(self.tokens)

    @property
    def corrupted_tokens(self) -> list[int]:
        """The positions whose embeddings are corrupted, in their order."""
        return corrupted_positions(self.mentions)

    @property
    def samples(self) -> int:
        return int(self.noise.shape[0])

    def answer_probability(self, logits: Tensor) -> Tensor:
        """Return the joint probability (rows,) of the answer's n tokens from logits (rows, n, V) at T-1 .. T+n-2."""
        target_ids = torch.tensor(self.answer_ids, device=logits.device).expand(len(logits), -1)
        logp = at_least_fp32(logits).log_softmax(-1).gather(2, target_ids[..., None])[..., 0]
        return logp.sum(1).exp()


def corrupted_positions(mentions: Sequence[Span]) -> list[int]:
    """Return the positions of the tokens of some mentions, in their order. Two mentions can share a token."""
    return sorted({position for mention in mentions for position in range(*mention)})


def build_trace_input(
    model: LoadedModel,
    statement: Statement,
    target: str | None,
    samples: int,
    noise: float | str,
    seed: int,
    compat: str | None,
    subjects: Sequence[str],
    mentions: Mentions = "all",
    separator: Separator | None = None,
) -> TraceInput:
    """Tokenize prompt and answer together, locate the subject by character offsets, and draw the noise.

    With "all" every mention of the subject in the prompt is corrupted, otherwise that of the statement alone.
    """
    answer_text = ""
    if target:
        choice = choose_separator(model, statement.text, [target], separator)
        answer_text = run_to_completion(choice) + target
    ids, offsets = model.encode(statement.text + answer_text)
    if len(ids) > model.max_positions:
        raise InvalidInput(
            f"prompt and target have {len(ids)} tokens and the model has {model.max_positions} positions: "
            "shorten them.",
            "prompt",
        )
    subject = token_span(offsets, statement.span)
    answer_span = (len(statement.text), len(statement.text) + len(answer_text))
    first, last = token_span(offsets, answer_span) if target else (len(ids), len(ids))
    if first < subject[1]:
        raise InvalidInput("the target merges with the subject: end the prompt at a word boundary.", "target")
    prompt, answer = ids[:first], ids[first:last]
    labels = token_labels(model, statement.text + answer_text, ids, offsets)
    if not answer:
        answer = [_greedy_token(model, prompt)]
        answer_text = model.tokenizer.decode(answer)
    noise_level = parse_noise_level(model, noise, subjects)
    mention_spans = find_mentions(statement) if mentions == "all" else [statement.span]
    corrupted = tuple(token_span(offsets[:first], span) for span in mention_spans)
    unit_noise = draw_noise(samples, len(corrupted_positions(corrupted)), model.embedding_size, seed, compat)
    return TraceInput(
        text=statement.text,
        tokens=tuple(labels[:first]),
        ids=tuple(prompt + answer[:-1]),
        subject=subject,
        mentions=corrupted,
        answer=answer_text,
        answer_ids=tuple(answer),
        answer_tokens=tuple(labels[first:last] or [answer_text]),
        noise_level=noise_level,
        noise=(noise_level.value * unit_noise).to(model.device),
        seed=seed,
        compat=compat,
    )


def _greedy_token(model: LoadedModel, prompt: list[int]) -> int:
    with torch.no_grad():
        return int(forward(model, pad([prompt], model))[0, -1].argmax())


def token_labels(model: LoadedModel, text: str, ids: Sequence[int], offsets: Sequence[Span]) -> list[str]:
    """Return a label for each token: its text with the preceding space; the name of a special token.

    When several tokens share one character, each label shows the whole character and a count: "京 (2/3)".
    """
    labels: list[str] = []
    shared: list[int] = []  # indices of tokens that share characters
    end = 0
    for i, (a, b) in enumerate(offsets):
        if shared and a < end:
            labels.append(text[a:b])
            shared.append(i)
        else:
            _number_shared_tokens(labels, shared)
            labels.append(text[end:b] or str(model.tokenizer.convert_ids_to_tokens([ids[i]])[0]))
            shared = [i] if b > a else []
        end = max(end, b)
    _number_shared_tokens(labels, shared)
    return labels


def _number_shared_tokens(labels: list[str], shared: list[int]) -> None:
    if len(shared) > 1:
        for n, i in enumerate(shared, 1):
            labels[i] += f" ({n}/{len(shared)})"
