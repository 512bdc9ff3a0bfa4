"""The divergence of a subject's description: service.editing.description."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from service.editing.description import (
    DESCRIPTION_TOKENS,
    ROWS_PER_STEP,
    Description,
    describe_subjects,
    measure_descriptions,
)
from service.editing.greedy_text import generate_greedy
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel, WeightRef
from service.models.token_batch import forward, pad
from service.patches.patch import BASE, PatchSet, weights_patch
from tests.support.chat_templates import CHATML
from tests.support.tiny_models import tiny

SUBJECTS = ["Japan", "Eiffel Tower", "São Paulo", "the city of Rome"]
REFUSING = "{{ raise_exception('no') }}"
PLAIN = "A sentence about Japan:"


def chat_model(template: str | None, model_type: str = "gpt2", positions: int = 256) -> LoadedModel:
    model = tiny(model_type, positions=positions, dtype=torch.float64)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = template
    return replace(model, tokenizer=tokenizer)


def changed_weights(model: LoadedModel) -> PatchSet:
    weight = model.weight(1).data
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    return weights_patch({WeightRef(1): weight + 0.5 * noise})


def expected_divergence(replica: VersionedModel, weights: PatchSet, prompt: str) -> float:
    """The mean over the description's tokens of the sum over the vocabulary, from one unpadded pass per version."""
    model = replica.base
    (text,) = run_to_completion(generate_greedy(model, [prompt], DESCRIPTION_TOKENS))
    ids, offsets = model.encode(prompt + text.text)
    positions = [i - 1 for i, (_, end) in enumerate(offsets) if end > len(prompt)] or [len(ids) - 1]
    with torch.no_grad():
        p = forward(model, pad([ids], model))[0].softmax(-1)
        with replica.use_patch(weights):
            q = forward(model, pad([ids], model))[0].softmax(-1)
    terms = [
        sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p[i], q[i], strict=True))
        for i in positions
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("template", "model_type"), [(CHATML, "gpt2"), (CHATML, "llama"), (None, "llama")])
def test_the_divergence_is_the_sum_over_the_vocabulary(template: str | None, model_type: str) -> None:
    """Descriptions of unequal lengths in one batch have the divergences that are computed one by one in fp64."""
    replica = VersionedModel(chat_model(template, model_type), EmptyLedger())
    weights = changed_weights(replica.base)
    descriptions = run_to_completion(describe_subjects(replica.base, SUBJECTS))
    measured = run_to_completion(measure_descriptions(replica, weights, descriptions))
    prompts = [d.prompt for d in descriptions if d is not None and d.predicted > 1]
    assert len(set(prompts)) == len(SUBJECTS)
    for divergence, prompt in zip(measured, prompts, strict=True):
        assert divergence is not None and divergence > 1e-6
        assert divergence == pytest.approx(expected_divergence(replica, weights, prompt), rel=1e-6)
    assert replica.applied_patches == 0


def test_the_base_model_has_no_divergence() -> None:
    """The divergence of the base model is 0, without a step and with its own weights as an edit."""
    replica = VersionedModel(chat_model(None), EmptyLedger())
    descriptions = run_to_completion(describe_subjects(replica.base, SUBJECTS))
    with pytest.raises(StopIteration) as stopped:
        next(measure_descriptions(replica, BASE, descriptions))
    assert stopped.value.value == [0.0] * len(SUBJECTS)
    same = weights_patch({WeightRef(1): replica.base.weight(1).data.clone()})
    assert run_to_completion(measure_descriptions(replica, same, descriptions)) == [0.0] * len(SUBJECTS)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (CHATML, "<|im_start|>user\nTell me about Japan.<|im_end|>\n<|im_start|>assistant\n"),
        (None, PLAIN),
        (REFUSING, PLAIN),
    ],
)
def test_the_prompt_asks_for_a_description(template: str | None, prompt: str) -> None:
    """A chat model is asked in a conversation, another one, or one whose template refuses, continues a text; the tokens
    are those of the prompt and of the greedy continuation but for its last one."""
    model = chat_model(template, "llama")
    (found,) = run_to_completion(describe_subjects(model, ["Japan"]))
    assert found is not None and found.prompt.endswith(prompt)
    (text,) = run_to_completion(generate_greedy(model, [found.prompt], DESCRIPTION_TOKENS))
    ids = model.encode(found.prompt + text.text)[0]
    assert found.ids == ids[:-1]
    assert model.decode(ids[: len(ids) - found.predicted]) == found.prompt


def test_a_description_that_does_not_fit_is_not_measured() -> None:
    """A subject that fills all positions has no divergence, and does not change that of another one."""
    replica = VersionedModel(chat_model(None, positions=64), EmptyLedger())
    weights = changed_weights(replica.base)
    descriptions = run_to_completion(describe_subjects(replica.base, ["x y " * 40, "Japan"]))
    assert descriptions[0] is None
    none, measured = run_to_completion(measure_descriptions(replica, weights, descriptions))
    assert none is None
    assert measured == pytest.approx(expected_divergence(replica, weights, PLAIN), rel=1e-6)


def test_of_an_empty_description_the_first_token_is_compared() -> None:
    """Where the base model ends at once, the distribution after the prompt is the only one."""
    replica = VersionedModel(chat_model(None), EmptyLedger())
    weights = changed_weights(replica.base)
    (found,) = run_to_completion(describe_subjects(replica.base, ["Japan"]))
    assert found is not None and (found.prompt, found.predicted) == (PLAIN, 1)
    assert found.ids == replica.base.encode(PLAIN)[0]
    (measured,) = run_to_completion(measure_descriptions(replica, weights, [found]))
    assert measured == pytest.approx(expected_divergence(replica, weights, PLAIN), rel=1e-6)


def test_many_descriptions_are_measured_in_short_steps() -> None:
    """Each step measures a few descriptions, and the base weights are in place after it."""
    replica = VersionedModel(chat_model(None), EmptyLedger())
    weights = changed_weights(replica.base)
    found: list[Description | None] = [
        Description("", list(range(1, 8 + n)), 1 + n % 5) for n in range(2 * ROWS_PER_STEP + 1)
    ]
    steps, count = measure_descriptions(replica, weights, found), 0
    while True:
        try:
            next(steps)
        except StopIteration as stopped:
            together = stopped.value
            break
        count += 1
        assert replica.applied_patches == 0
    assert count == 3
    alone = [run_to_completion(measure_descriptions(replica, weights, [d]))[0] for d in found]
    assert together == pytest.approx(alone, rel=1e-9)
