"""The answers of a version to the questions of suites: service.evaluation.suites.answers."""

from __future__ import annotations

import torch

from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.evaluation.suites.answers import answer_questions
from service.evaluation.suites.question import (
    ANSWER_TOKENS,
    Choice,
    Divergence,
    FreeText,
    NextToken,
    Question,
    choice_of,
    end_statement,
    text_of,
)
from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel, WeightRef
from service.models.scoring import log_probs_blocking
from service.patches.patch import BASE, PatchSet, weights_patch
from tests.support.tiny_models import tiny

PROMPTS = ("The Eiffel Tower is in", "Big Ben can be found in the city of", "Marie")


def edited(model: LoadedModel) -> PatchSet:
    weight = model.weight(1).data
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return weights_patch({WeightRef(1): weight + 0.3 * noise})


def answers_of(model: LoadedModel, questions: list[Question], patch: PatchSet) -> dict[Question, object]:
    replica = VersionedModel(model, EmptyLedger())
    return dict(run_to_completion(answer_questions(replica, questions, patch)))


def greedy_text(model: LoadedModel, prompt: str) -> str:
    """Return the greedy continuation, one whole pass for each token."""
    ids = model.encode(prompt)[0]
    start = len(ids)
    for _ in range(ANSWER_TOKENS):
        ids = [*ids, int(model.model(torch.tensor([ids])).logits[0, -1].argmax())]
    return model.decode(ids[start:])


def test_free_text_is_the_greedy_continuation_to_the_end_of_its_statement() -> None:
    """With an edit and without, the text is that of whole passes, cut at the end of its statement."""
    model = tiny()
    patch = edited(model)
    replica = VersionedModel(model, EmptyLedger())
    for chosen in (BASE, patch):
        answers = run_to_completion(answer_questions(replica, [FreeText(p) for p in PROMPTS], chosen))
        with replica.use_patch(chosen), torch.no_grad():
            expected = [end_statement(greedy_text(model, p))[0] for p in PROMPTS]
        found = [text_of(answers, p).text for p in PROMPTS]
        # the last character may lack bytes, which a decoded text shows and a generated one leaves out
        assert [text.rstrip("\ufffd") for text in found] == [text.rstrip("\ufffd") for text in expected]


def test_choice_has_the_joint_probability_of_each_object() -> None:
    """An object's log-probability is the sum over its tokens."""
    model = tiny()
    choice = Choice(PROMPTS[0], ("Rome", "a city in Japan"))
    found = run_to_completion(answer_questions(VersionedModel(model, EmptyLedger()), [choice], BASE))
    means = log_probs_blocking(model, [(choice.prompt, o) for o in choice.objects])
    lengths = [
        len(model.encode(f"{choice.prompt} {o}")[0]) - len(model.encode(choice.prompt)[0])
        for o in choice.objects
    ]
    for log_prob, (mean, _), length in zip(choice_of(found, choice).log_probs, means, lengths, strict=True):
        assert abs(log_prob - mean * length) < 1e-5


def test_divergence_is_that_of_the_next_token() -> None:
    """KL(p_base || p) of the next token, from two whole passes in fp64; that of the base model is 0."""
    model = tiny()
    patch, replica = edited(model), VersionedModel(model, EmptyLedger())
    questions: list[Question] = [NextToken(p) for p in PROMPTS]
    found = run_to_completion(answer_questions(replica, questions, patch))

    def log_probs(prompt: str) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model.model(torch.tensor([model.encode(prompt)[0]])).logits[0, -1]
            return logits.double().log_softmax(-1)

    for prompt in PROMPTS:
        before = log_probs(prompt)
        with replica.use_patch(patch):
            after = log_probs(prompt)
        answer = found[NextToken(prompt)]
        assert isinstance(answer, Divergence)
        assert abs(answer.kl - float((before.exp() * (before - after)).sum())) < 1e-6 and answer.kl > 1e-4
    base = run_to_completion(answer_questions(replica, questions, BASE))
    assert all(isinstance(a, Divergence) and a.kl == 0 for a in base.values())


def test_equal_questions_are_asked_once() -> None:
    """Suites that ask the same share one answer, and company changes no answer."""
    model = tiny()
    question, other = FreeText(PROMPTS[0]), FreeText(PROMPTS[1])
    alone = answers_of(model, [question], BASE)
    assert answers_of(model, [question, other, question], BASE) == alone | answers_of(model, [other], BASE)
