"""The edited token of a subject: service.editing.subject_token, and the search and the key at that token."""

from __future__ import annotations

import math
from contextlib import ExitStack
from functools import lru_cache

import numpy as np
import pytest
import torch

from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.covariance.second_moment import KeyStatistics
from service.editing.edit_spec import EditFactors
from service.editing.find_factors import find_factors
from service.editing.subject_token import FIRST, LAST, SubjectToken, choose_subject_token, trace_subject
from service.editing.suffix_batch import DeltaSite
from service.editing.tokenized_contexts import TokenizedContexts, tokenize_contexts
from service.editing.value_optimizer import ValueResult, ValueSearchSpec, optimize_values
from service.kit.steps import run_to_completion
from service.kit.text import Statement, fill_prompt, token_span
from service.methods.parameters import FineTuneParameters, RomeParameters
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.weights.composition import apply_delta, compose_layer
from service.weights.factors import Association, serialize_updates
from tests.support.associations import associations_of
from tests.support.tiny_models import MODEL_TYPES, TEXTS, tiny

STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")
AT_THE_BEGINNING = fill_prompt("{} is located in", "Eiffel Tower")
CONTEXTS = ("In Japan", "The city of Rome is")
SUBJECTS = ("Eiffel Tower", "Mount Fuji", "Marie Curie", "São Paulo", "Big Ben", "Zürich Opera")


@lru_cache
def statistics(model_type: str) -> dict[int, KeyStatistics]:
    corpus = Corpus("test", tuple(TEXTS))
    return run_to_completion(collect_statistics(tiny(model_type), [0, 1, 2], corpus, damping=0.1))


def parameters_with(**changes: object) -> RomeParameters:
    return RomeParameters.model_validate({"layers": [1], "steps": 4, "stop_loss": 0, **changes})


def find_edit(model: LoadedModel, statement: Statement = STATEMENT, **changes: object) -> EditFactors:
    parameters = parameters_with(learning_rate=0.1, **changes)
    known = statistics(model.architecture.model_type)
    return run_to_completion(find_factors(model, known, CONTEXTS, statement, "Rome", parameters, "edit_1"))


def subject_tokens(model: LoadedModel, statement: Statement) -> tuple[list[int], int, int]:
    ids, offsets = model.encode(statement.text)
    return (ids, *token_span(offsets, statement.span))


def key_at(model: LoadedModel, ids: list[int], position: int) -> torch.Tensor:
    with capture({0: model.down_proj(1)}, "input") as seen, torch.no_grad():
        forward(model, pad([ids], model))
    return seen[0].reshape(len(ids), -1)[position]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_key_of_the_first_token_gives_the_value(model_type: str) -> None:
    """The layer maps the mean key of the subject's first token exactly to v + delta, and not that of its last token."""
    model = tiny(model_type)
    factors = find_edit(model, subject_token="first")
    texts = [STATEMENT.with_context(c) for c in ("", *(f"{c}. " for c in CONTEXTS))]
    spans = [subject_tokens(model, text) for text in texts]
    assert all(end - begin > 1 for _, begin, end in spans)
    key = torch.stack([key_at(model, ids, begin) for ids, begin, _ in spans]).mean(0)
    (association,) = associations_of(factors.updates)
    torch.testing.assert_close(association.key, key, rtol=1e-4, atol=1e-5)
    ids, begin, end = spans[0]
    assert factors.subject_token == SubjectToken(begin, model.token_text(ids[begin]))

    parameters = parameters_with(learning_rate=0.1, subject_token="first")
    spec = ValueSearchSpec(
        tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS, tokens_after=FIRST), parameters
    )
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1), [spec]))
    with capture({0: model.down_proj(1)}) as seen, torch.no_grad():
        forward(model, pad([ids], model))
    v = seen[0].reshape(len(ids), -1)[begin]
    torch.testing.assert_close(value.initial, v, rtol=1e-4, atol=1e-5)
    weight, conv1d = model.weight(1).data, model.architecture.conv1d
    edited = apply_delta(weight, compose_layer([association]), conv1d)
    bias = v - linear(weight, key_at(model, ids, begin), conv1d)
    torch.testing.assert_close(linear(edited, key, conv1d) + bias, v + value.delta, rtol=1e-3, atol=1e-4)
    last = key_at(model, ids, end - 1)
    change = linear(edited, last, conv1d) - linear(weight, last, conv1d)
    assert not torch.allclose(change, value.delta, rtol=1e-2, atol=1e-3)


def linear(weight: torch.Tensor, key: torch.Tensor, conv1d: bool) -> torch.Tensor:
    return key @ weight if conv1d else weight @ key


def oracle_loss(
    model: LoadedModel,
    tokenized: TokenizedContexts,
    p: RomeParameters,
    tokens_after: int,
    value: ValueResult,
    noise: torch.Tensor | None,
) -> float:
    """The loss from one pass per row, with delta at the edited token of each mention; the KL term is read at the last
    token of the bare subject."""

    def edited(begin: int, end: int) -> int:
        return begin if tokens_after >= end - begin else end - 1 - tokens_after

    def log_probs(
        ids: list[int], subject: tuple[int, int], others: list[int], change: torch.Tensor
    ) -> torch.Tensor:
        def add(output: torch.Tensor) -> torch.Tensor:
            output.view(len(ids), -1)[[edited(*subject), *others]] += change
            return output

        def disturb(embedded: torch.Tensor) -> torch.Tensor:
            for n in range(len(noise) if noise is not None else 0):
                embedded[0, subject[1] - 1 - n] += noise[-1 - n]  # type: ignore[index]
            return embedded

        with (
            replace_output(model.down_proj(1), add),
            replace_output(model.embedding, disturb),
            torch.no_grad(),
        ):
            return forward(model, pad([ids], model))[0].log_softmax(-1)

    def score(log_p: torch.Tensor, start: int, tokens: list[int]) -> float:
        return float(sum(log_p[start - 1 + j, t] for j, t in enumerate(tokens)))

    objects, restated = [], tokenized.restatement
    count = len(tokenized.prompts) - (restated is not None)
    for prompt, target in list(zip(tokenized.prompts, tokenized.targets, strict=True))[:count]:
        log_p = log_probs(prompt.ids + target, prompt.subject, [], value.delta)
        objects.append(-score(log_p, len(prompt.ids), target) / len(target))
    loss = sum(objects) / len(objects)
    if restated is not None:
        prompt, target = restated.prompt, restated.target
        begin = len(prompt.ids)
        mention = edited(begin, begin + restated.subject_end)
        log_p = log_probs(prompt.ids + target, prompt.subject, [mention], value.delta)
        name = score(log_p, begin, target[: restated.subject_end]) / restated.subject_end
        rest = target[restated.object_start :]
        w = p.restatement_weight
        loss = (1 - w) * loss - w * score(log_p, begin + restated.object_start, rest) / len(rest)
        loss -= p.subject_weight * name
    bare = tokenized.bare_subjects[0]
    before, after = (
        log_probs(bare.ids, bare.subject, [], x)[bare.subject[1] - 1] for x in (0 * value.delta, value.delta)
    )
    kl = float((after.exp() * (after - before)).sum())
    return loss + p.kl_factor * kl + p.weight_decay * float(value.delta.norm() / value.initial.norm() ** 2)


@pytest.mark.parametrize("tokens_after", [1, FIRST])
@pytest.mark.parametrize("statement", [STATEMENT, AT_THE_BEGINNING])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_the_loss_has_delta_at_the_edited_token(
    model_type: str, statement: Statement, tokens_after: int
) -> None:
    """The loss equals the sum that is computed row by row, with delta at the edited token of both mentions."""
    model = tiny(model_type, positions=512, dtype=torch.float64)
    p = parameters_with(learning_rate=0.01, restatement_weight=0.3, kl_factor=0.5)
    tokenized = tokenize_contexts(
        model, statement, "São Paulo", CONTEXTS, restated=True, tokens_after=tokens_after
    )
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1), [ValueSearchSpec(tokenized, p)]))
    expected = oracle_loss(model, tokenized, p, tokens_after, value, None)
    assert value.losses[-1] == pytest.approx(expected, rel=1e-5)
    assert value.losses[-1] != pytest.approx(oracle_loss(model, tokenized, p, LAST, value, None), rel=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("tokens_after", [1, FIRST])
def test_noise_is_on_the_whole_subject(tokens_after: int, tokens: int) -> None:
    """Noise is added to the subject's last tokens, before and after the edited one."""
    model = tiny(dtype=torch.float64)
    noise = torch.randn(tokens, model.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    tokenized = tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS, tokens_after=tokens_after)
    begin, end = tokenized.prompts[0].subject
    p = parameters_with()
    spec = ValueSearchSpec(tokenized, p, noise=noise)
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1), [spec]))
    expected = oracle_loss(model, tokenized, p, tokens_after, value, noise[-(end - begin) :])
    assert value.losses[-1] == pytest.approx(expected, rel=1e-6)


def restored_probabilities(
    model: LoadedModel, statement: Statement, layers: tuple[int, ...], seed: int
) -> list[float]:
    """The trace from its definition: a pass of the noised rows for each token, with its clean MLP outputs in place."""
    ids, begin, end = subject_tokens(model, statement)
    batch = pad([ids], model)
    modules = {x: model.mlp_output(x) for x in range(min(layers), max(layers) + 1)}
    with capture(modules) as seen, torch.no_grad():
        answer = int(forward(model, batch)[0, -1].argmax())
    clean = {x: output.reshape(len(ids), -1).clone() for x, output in seen.items()}
    embeddings: torch.Tensor = model.embedding.weight  # type: ignore[assignment]
    shape = (10, end - begin, embeddings.shape[1])
    noise = 3 * float(embeddings.double().std()) * np.random.default_rng(seed).standard_normal(shape)

    def disturb(embedded: torch.Tensor) -> torch.Tensor:
        embedded[:, begin:end] += torch.from_numpy(noise).to(embedded)
        return embedded

    effects = []
    for token in range(begin, end):
        with ExitStack() as stack:
            stack.enter_context(replace_output(model.embedding, disturb))
            for x, module in modules.items():

                def restore(output: torch.Tensor, x: int = x, token: int = token) -> torch.Tensor:
                    output.view(10, len(ids), -1)[:, token] = clean[x][token]
                    return output

                stack.enter_context(replace_output(module, restore))
            with torch.no_grad():
                logits = forward(model, pad([ids] * 10, model))[:, -1]
        effects.append(float(logits.softmax(-1)[:, answer].mean()))
    return effects


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_effects_are_those_of_the_definition(model_type: str, layers: tuple[int, ...]) -> None:
    """The probability with one token's MLP outputs restored is that of full passes, one for each token."""
    model = tiny(model_type)
    effects = run_to_completion(trace_subject(model, STATEMENT, layers, 5))
    expected = restored_probabilities(model, STATEMENT, layers, 5)
    assert effects == pytest.approx(expected, rel=1e-4)
    assert len(set(expected)) > 1


def test_the_traced_token_has_the_greatest_effect() -> None:
    """The edited token is the one whose restored MLP output gives the greatest probability; it is not always the
    last."""
    model = tiny()
    chosen = set()
    for subject in SUBJECTS:
        statement = fill_prompt("The {} is located in the city of", subject)
        p = parameters_with(subject_token="traced", seed=3)
        tokens_after = run_to_completion(choose_subject_token(model, statement, p))
        effects = restored_probabilities(model, statement, (1,), 3)
        assert tokens_after == len(effects) - 1 - int(np.argmax(effects))
        chosen.add(tokens_after)
    assert len(chosen) > 1 and max(chosen) > 0


def test_an_edit_of_the_traced_token_is_the_same_each_time() -> None:
    """The same edit gives the same bytes, at the token that the trace chooses, and the factors name that token."""
    model = tiny()
    first, second = (find_edit(model, subject_token="traced") for _ in range(2))
    assert serialize_updates(first.updates) == serialize_updates(second.updates)
    ids, begin, _ = subject_tokens(model, STATEMENT)
    at = begin + int(np.argmax(restored_probabilities(model, STATEMENT, (1,), 0)))
    assert first.subject_token == SubjectToken(at, model.token_text(ids[at]))


def test_only_a_trace_runs_the_model() -> None:
    """The last and the first token, and the only one of a subject, are known without a step."""
    model = tiny()
    only = fill_prompt("We know {} and", "B")
    _, begin, end = subject_tokens(model, only)
    assert end - begin == 1
    for statement, changes, expected in (
        (STATEMENT, {}, LAST),
        (STATEMENT, {"subject_token": "first"}, FIRST),
        (only, {"subject_token": "traced"}, LAST),
    ):
        with pytest.raises(StopIteration) as stopped:
            next(choose_subject_token(model, statement, parameters_with(**changes)))
        assert stopped.value.value == expected
    with pytest.raises(StopIteration) as stopped:
        next(choose_subject_token(model, STATEMENT, FineTuneParameters(layers=(1,))))
    assert stopped.value.value == LAST


@pytest.mark.parametrize("subject_token", ["first", "traced"])
def test_several_layers_are_edited_at_the_token(subject_token: str) -> None:
    """MEMIT's keys at its lowest layer are those of the edited token."""
    model = tiny()
    p = parameters_with(layers=[1, 2], subject_token=subject_token)
    factors = run_to_completion(
        find_factors(model, statistics("gpt2"), (), STATEMENT, "Rome", p, "edit_1", method="memit")
    )
    assert factors.subject_token is not None
    ids, begin, end = subject_tokens(model, STATEMENT)
    at = factors.subject_token.position
    assert at == begin if subject_token == "first" else begin <= at < end
    lowest = min(factors.updates, key=lambda update: update.layer)
    assert isinstance(lowest, Association)
    torch.testing.assert_close(lowest.key, key_at(model, ids, at), rtol=1e-4, atol=1e-5)
    assert math.isfinite(factors.delta_norm)
