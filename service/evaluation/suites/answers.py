"""The answers of a version to the questions of suites."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from service.editing.greedy_text import generate_greedy
from service.engine.versioned_model import VersionedModel
from service.evaluation.suites.question import (
    ANSWER_TOKENS,
    Answer,
    Choice,
    ChoiceAnswer,
    Divergence,
    FreeText,
    NextToken,
    Question,
    TextAnswer,
    end_statement,
)
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.models.score import TargetScore
from service.models.scoring import score_targets
from service.models.token_batch import forward, pad
from service.patches.patch import PatchSet

DIVERGENCE_ROWS = 16  # prompts whose distributions are compared in one step


def answer_questions(
    replica: VersionedModel, questions: Iterable[Question], patch: PatchSet
) -> Stepper[dict[Question, Answer]]:
    """Return the answer of a version to each question. Equal questions are asked once."""
    asked = list(dict.fromkeys(questions))
    texts = [q for q in asked if isinstance(q, FreeText)]
    choices = [q for q in asked if isinstance(q, Choice)]
    next_tokens = [q for q in asked if isinstance(q, NextToken)]
    answers: dict[Question, Answer] = {}
    answers |= zip(texts, (yield from _free_answers(replica, texts, patch)), strict=True)
    answers |= zip(choices, (yield from _choice_answers(replica, choices, patch)), strict=True)
    answers |= zip(next_tokens, (yield from _divergences(replica, next_tokens, patch)), strict=True)
    return answers


def _free_answers(
    replica: VersionedModel, questions: Sequence[FreeText], patch: PatchSet
) -> Stepper[list[TextAnswer]]:
    prompts = [q.prompt for q in questions]
    generating = generate_greedy(replica.base, prompts, ANSWER_TOKENS, lambda text: end_statement(text)[1])
    texts = yield from replica.step_with_patch(patch, generating)
    answers = []
    for generated in texts:
        text, ended = end_statement(generated.text)
        answers.append(TextAnswer(text, ended or generated.complete))
    return answers


def _choice_answers(
    replica: VersionedModel, questions: Sequence[Choice], patch: PatchSet
) -> Stepper[list[ChoiceAnswer]]:
    pairs = [(q.prompt, object_) for q in questions for object_ in q.objects]
    scores = iter((yield from replica.step_with_patch(patch, score_targets(replica.base, pairs))))
    return [ChoiceAnswer(tuple(_joint(next(scores)) for _ in q.objects)) for q in questions]


def _joint(score: TargetScore) -> float:
    """Return the log-probability of all tokens of an object."""
    return score.log_p * score.num_tokens


def _divergences(
    replica: VersionedModel, questions: Sequence[NextToken], patch: PatchSet
) -> Stepper[list[Divergence]]:
    """Return KL(p_base || p) of the next token after each prompt."""
    model = replica.base
    rows = [model.encode(q.prompt)[0][-model.max_positions :] for q in questions]
    found: list[Divergence] = []
    for start in range(0, len(rows), DIVERGENCE_ROWS):
        batch = rows[start : start + DIVERGENCE_ROWS]
        before = _next_log_probs(model, batch)
        with replica.use_patch(patch):
            after = _next_log_probs(model, batch)
        kl = (before.exp() * (before - after)).sum(-1).clamp(min=0)
        found += [Divergence(x) for x in kl.tolist()]
        yield Progress(Phase.DRIFT, start + len(batch), len(rows))
    return found


@torch.no_grad()
def _next_log_probs(model: LoadedModel, rows: Sequence[list[int]]) -> Tensor:
    """Return log p (B, V) of the next token, in fp64."""
    return forward(model, pad(rows, model, side="left"), 1)[:, -1].double().log_softmax(-1)
