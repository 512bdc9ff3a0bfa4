"""Restatements of a statement and their loss: service.editing.restatement, service.editing.value_optimizer."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.editing.edit_spec import ValueEditSpec, build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.editing.restatement import (
    QUESTION,
    Restatement,
    RestatementText,
    restatement_text,
    tokenize_restatement,
)
from service.editing.suffix_batch import DeltaSite
from service.editing.tokenized_contexts import TokenizedContexts, tokenize_contexts
from service.editing.value_optimizer import ValueResult, ValueSearchSpec, optimize_values
from service.kit.steps import run_to_completion
from service.kit.text import RenderedText, Statement, fill_prompt
from service.methods.parameters import RomeParameters
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.schemas import Objective
from service.weights.factors import Association
from tests.support.chat_templates import CHATML
from tests.support.tiny_models import MODEL_TYPES, tiny

CONTEXTS = ["In Japan", "The city of Rome is"]
STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")
STATEMENTS = {
    "in the middle": STATEMENT,
    "at the beginning": fill_prompt("{} is located in", "Eiffel Tower"),
    "without spaces": fill_prompt("日本の{}は", "東京"),
    "at the end": fill_prompt("Here is {}", "Japan"),
}


def chat_model(template: str | None = CHATML, model_type: str = "gpt2", **options: object) -> LoadedModel:
    model = tiny(model_type, positions=512, **options)  # type: ignore[arg-type]
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return replace(model, tokenizer=tokenizer)


def restate(model: LoadedModel, statement: Statement, target: str = "Rome") -> Restatement:
    found = tokenize_restatement(model, statement, " ", target)
    assert found is not None
    return found


def parts_of(model: LoadedModel, statement: Statement) -> RestatementText:
    found = restatement_text(model, statement)
    assert found is not None
    return found


def test_the_restatement_of_a_chat_model_is_a_conversation() -> None:
    """The question contains the statement, the answer is the statement, and the template puts both into their turns."""
    parts = parts_of(chat_model(), STATEMENT)
    assert isinstance(parts.text, RenderedText)
    assert parts.text.endswith(
        f"<|im_start|>user\n{QUESTION}{STATEMENT.text}<|im_end|>\n<|im_start|>assistant\n{STATEMENT.text}"
    )
    assert parts.text[slice(*parts.asked)] == parts.text[slice(*parts.restated)] == "Eiffel Tower"
    assert parts.asked[1] < parts.restated[0]


REFUSING = "{{ raise_exception('no') }}"
CHANGING = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"


@pytest.mark.parametrize("template", [None, REFUSING, CHANGING])
def test_without_a_usable_template_the_restatement_is_plain_text(template: str | None) -> None:
    """A model without a template, or with one that refuses or changes the question, gets a text with both mentions."""
    parts = parts_of(chat_model(template), STATEMENT)
    assert not isinstance(parts.text, RenderedText)
    assert parts.text == f"A sentence about Eiffel Tower: {STATEMENT.text}"
    assert parts.text[slice(*parts.asked)] == parts.text[slice(*parts.restated)] == "Eiffel Tower"


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("name", STATEMENTS)
def test_the_parts_of_the_target_are_the_subject_and_the_object(name: str, template: str | None) -> None:
    """The prompt ends before the second mention; the target begins with the subject and ends with the object."""
    model, statement = chat_model(template), STATEMENTS[name]
    found = restate(model, statement)
    subject = statement.text[slice(*statement.span)]
    ids = found.prompt.ids + found.target
    assert model.decode(found.target[: found.subject_end]).strip() == subject
    assert model.decode(found.target[found.object_start :]).strip() == "Rome"
    assert model.decode(ids[slice(*found.prompt.subject)]).strip() == subject
    assert ids[found.later_mention] == found.target[found.subject_end - 1]
    text = parts_of(model, statement).text
    assert model.decode(ids) == text + " Rome"


def test_a_restatement_that_does_not_fit_is_left_out() -> None:
    """A restatement that exceeds the context length is left out, and the other rows stay."""
    model = tiny()
    statement = fill_prompt("The {} " + "x " * (model.max_positions // 2), "Eiffel Tower")
    assert tokenize_restatement(model, statement, " ", "Rome") is None
    tokenized = tokenize_contexts(model, statement, "Rome", [], restated=True)
    assert tokenized.size == tokenized.continuations == 1


def oracle_loss(
    model: LoadedModel,
    tokenized: TokenizedContexts,
    p: RomeParameters,
    objective: Objective,
    value: ValueResult,
) -> float:
    """The loss from one forward pass per row, with delta at the mentions that an edit changes."""
    module, found = model.down_proj(1), tokenized.restatement
    assert found is not None

    def log_probs(ids: list[int], mentions: list[int], change: torch.Tensor) -> torch.Tensor:
        def add(output: torch.Tensor) -> torch.Tensor:
            output.view(len(ids), -1)[mentions] += change
            return output

        with replace_output(module, add), torch.no_grad():
            return forward(model, pad([ids], model))[0].log_softmax(-1)

    def score(log_p: torch.Tensor, start: int, tokens: list[int]) -> float:
        return float(sum(log_p[start - 1 + j, t] for j, t in enumerate(tokens)))

    objects: list[float] = []
    *plain, _ = zip(tokenized.prompts, tokenized.targets, strict=True)
    for prompt, target in plain:
        joint = score(
            log_probs(prompt.ids + target, [prompt.last_subject_index], value.delta), len(prompt.ids), target
        )
        objects.append(math.exp(joint) if objective == "erase" else -joint / len(target))
    prompt, target = found.prompt, found.target
    log_p = log_probs(prompt.ids + target, [prompt.last_subject_index, found.later_mention], value.delta)
    name = score(log_p, len(prompt.ids), target[: found.subject_end]) / found.subject_end
    rest = target[found.object_start :]
    joint = score(log_p, len(prompt.ids) + found.object_start, rest)
    restated = math.exp(joint) if objective == "erase" else -joint / len(rest)
    subject = tokenized.bare_subjects[0]
    at = subject.last_subject_index
    before, after = (log_probs(subject.ids, [at], x)[at] for x in (0 * value.delta, value.delta))
    kl = float((after.exp() * (after - before)).sum())
    w = p.restatement_weight
    decay = p.weight_decay * float(value.delta.norm() / value.initial.norm() ** 2)
    mean = (1 - w) * sum(objects) / len(objects) + w * restated
    return mean - p.subject_weight * name + p.kl_factor * kl + decay


@pytest.mark.parametrize("objective", ["write", "erase"])
@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_loss_has_the_name_and_the_object_of_the_restatement(
    model_type: str, template: str | None, objective: Objective
) -> None:
    """The batched loss equals the weighted sum that is computed row by row, with delta at both mentions."""
    model = chat_model(template, model_type, dtype=torch.float64)
    p = RomeParameters(
        layers=(1,),
        steps=4,
        learning_rate=0.01,
        stop_loss=0,
        restatement_weight=0.3,
        subject_weight=0.7,
    )
    tokenized = tokenize_contexts(model, STATEMENT, "São Paulo", CONTEXTS, restated=True)
    spec = ValueSearchSpec(tokenized, p, objective=objective)
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1), [spec]))
    expected = oracle_loss(model, tokenized, p, objective, value)
    assert value.losses[-1] == pytest.approx(expected, rel=1e-5)


def test_a_small_step_makes_the_name_and_the_object_more_probable() -> None:
    """Without the terms of the size of delta, the first small step lowers the loss of the restatement."""
    model = chat_model(dtype=torch.float64)
    p = RomeParameters(
        layers=(1,),
        steps=2,
        learning_rate=1e-3,
        stop_loss=0,
        weight_decay=0,
        kl_factor=0,
        restatement_weight=1,
    )
    spec = ValueSearchSpec(tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS, restated=True), p)
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1), [spec]))
    assert value.losses[1] < value.losses[0]


def test_rows_of_other_edits_are_not_changed_at_later_mentions() -> None:
    """In a batch the values of an edit with a restatement and of one without are those of each alone."""
    model = chat_model(dtype=torch.float64)
    specs = [
        ValueSearchSpec(
            tokenize_contexts(model, statement, "Rome", CONTEXTS, restated=weight > 0),
            RomeParameters(layers=(1,), steps=steps, stop_loss=0, restatement_weight=weight),
        )
        for statement, weight, steps in (
            (STATEMENT, 0.5, 3),
            (STATEMENTS["at the beginning"], 0.0, 6),
            (STATEMENTS["at the end"], 1.0, 5),
        )
    ]
    together = run_to_completion(optimize_values(model, DeltaSite(1), specs))
    for spec, value in zip(specs, together, strict=True):
        (alone,) = run_to_completion(optimize_values(model, DeltaSite(1), [spec]))
        torch.testing.assert_close(value.delta, alone.delta, rtol=1e-8, atol=1e-10)


def test_the_key_is_the_mean_of_the_prompts_and_the_restatement() -> None:
    """The key of an edit is half the mean key of the continued prompts and half that of the question's subject, which
    is read in the chat template."""
    model = chat_model(dtype=torch.float64)
    p = RomeParameters(layers=(1,), steps=2, restatement_weight=0.5, anchor="own")
    spec = build_edit_spec(model, CONTEXTS, STATEMENT, "Rome", p)
    moment = collect_statistics(model, [1], Corpus("text", ("The tower is in Rome.", "Japan is old.")))
    (factors,) = run_to_completion(find_batch_factors(model, run_to_completion(moment), [spec]))
    assert isinstance(spec, ValueEditSpec)
    tokenized = spec.tokenized

    def key(ids: list[int]) -> torch.Tensor:
        with capture({0: model.down_proj(1)}, "input") as seen, torch.no_grad():
            forward(model, pad([ids], model))
        return seen[0].reshape(len(ids), -1)[-1]

    *plain, restated = [key(t.ids_through_subject) for t in tokenized.prompts]
    (association,) = factors.updates
    assert isinstance(association, Association)
    expected = (torch.stack(plain).mean(0) + restated) / 2
    torch.testing.assert_close(association.key.double(), expected, rtol=1e-5, atol=1e-6)
