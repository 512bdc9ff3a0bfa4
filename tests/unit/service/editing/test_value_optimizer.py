"""The optimised value and its loss: service.editing.value_optimizer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from service.editing.suffix_batch import DeltaSite, LastBlockReader, prefill_suffixes
from service.editing.tokenized_contexts import TokenizedContexts, tokenize_contexts
from service.editing.value_optimizer import ValueResult, ValueSearchSpec, least_lead, optimize_values
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.hooks import capture, replace_output
from service.models.loading import LoadedModel
from service.models.token_batch import forward, pad
from service.schemas import Objective
from tests.support.tiny_models import MODEL_TYPES, tiny

CONTEXTS = ["In Japan", "A {brace} and {}", "The city of Rome is"]
STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")


def optimize_value_with(
    model: LoadedModel, target: str = "Rome", contexts: list[str] = CONTEXTS, **changes: object
) -> ValueResult:
    parameters = RomeParameters.model_validate({"layers": [1], "steps": 6, "stop_loss": 0, **changes})
    tokenized = tokenize_contexts(model, STATEMENT, target, contexts)
    return optimize_value(model, ValueSearchSpec(tokenized, parameters))


def optimize_value(model: LoadedModel, spec: ValueSearchSpec) -> ValueResult:
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1), [spec]))
    return value


def reference_loss(
    model: LoadedModel,
    target: str,
    delta: torch.Tensor,
    p: RomeParameters,
    erase: bool = False,
    noise: torch.Tensor | None = None,
) -> float:
    """The published loss with one forward pass per row: the oracle of `optimize_values`."""
    module = model.down_proj(1)

    def logits(ids: list[int], at: int, change: torch.Tensor) -> torch.Tensor:
        def add(output: torch.Tensor) -> torch.Tensor:
            output.view(len(ids), -1)[at] += change
            return output

        def disturb(embedded: torch.Tensor) -> torch.Tensor:
            for n in range(len(noise) if noise is not None else 0):
                embedded[0, at - n] += noise[-1 - n]  # type: ignore[index]
            return embedded

        with replace_output(module, add), replace_output(model.embedding, disturb), torch.no_grad():
            return forward(model, pad([ids], model))[0].log_softmax(-1)

    tokenized = tokenize_contexts(model, STATEMENT, target, CONTEXTS)
    nll = []
    for prompt, wanted in zip(tokenized.prompts, tokenized.targets, strict=True):
        logp = logits(prompt.ids + wanted, prompt.last_subject_index, delta)
        total = sum(logp[len(prompt.ids) - 1 + j, t] for j, t in enumerate(wanted))
        nll.append(math.exp(total) if erase else -total / len(wanted))
    subject = tokenized.bare_subjects[0]
    before = logits(subject.ids, subject.last_subject_index, torch.zeros_like(delta))[
        subject.last_subject_index
    ]
    after = logits(subject.ids, subject.last_subject_index, delta)[subject.last_subject_index]
    kl = (after.exp() * (after - before)).sum()
    with capture({0: module}) as seen:
        logits(tokenized.prompts[0].ids, tokenized.prompts[0].last_subject_index, torch.zeros_like(delta))
    v = seen[0].reshape(len(tokenized.prompts[0].ids), -1)[tokenized.prompts[0].last_subject_index]
    return float(sum(nll) / len(nll) + p.kl_factor * kl + p.weight_decay * delta.norm() / v.norm() ** 2)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("target", ["Rome", "São Paulo, Brazil"])
def test_the_loss_is_the_published_one(model_type: str, target: str) -> None:
    """The batched loss equals the published formula row by row, at delta = 0 and later, on every architecture."""
    model = tiny(model_type)
    parameters = RomeParameters(layers=(1,), steps=3, stop_loss=0, clamp=100.0)
    result = optimize_value_with(model, target, steps=3, clamp=100.0)
    zero = torch.zeros(model.hidden_size)
    assert result.losses[0] == pytest.approx(reference_loss(model, target, zero, parameters), rel=1e-4)
    assert result.losses[-1] == pytest.approx(
        reference_loss(model, target, result.delta, parameters), rel=1e-4
    )


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("target", ["Rome", "São Paulo, Brazil"])
def test_to_erase_the_loss_is_a_probability(model_type: str, target: str) -> None:
    """The loss of an erasure has the mean joint probability in place of the negative log-probability."""
    model = tiny(model_type, dtype=torch.float64)
    parameters = RomeParameters(layers=(1,), steps=3, stop_loss=0, clamp=100.0)
    value = optimize_value(
        model,
        ValueSearchSpec(tokenize_contexts(model, STATEMENT, target, CONTEXTS), parameters, objective="erase"),
    )
    for loss, delta in ((value.losses[0], 0 * value.delta), (value.losses[-1], value.delta)):
        assert loss == pytest.approx(reference_loss(model, target, delta, parameters, erase=True), rel=1e-6)


def test_the_first_step_of_an_erasure_lowers_the_probability() -> None:
    """A small first step of an erasure makes the object less probable."""
    model = tiny(dtype=torch.float64)
    p = RomeParameters(layers=(1,), steps=2, stop_loss=0, kl_factor=0, weight_decay=0, learning_rate=1e-3)
    tokenized = tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS)
    erased = optimize_value(model, ValueSearchSpec(tokenized, p, objective="erase")).losses
    written = optimize_value(model, ValueSearchSpec(tokenized, p)).losses
    assert erased[1] < erased[0]
    assert written[1] < written[0]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_search_with_a_margin_ends_where_the_object_leads_in_every_text(model_type: str) -> None:
    """Where the object is the model's own answer, the search ends at its first step with a margin below the lead over
    the next token, and continues with one above it. An erasure does not read the margin."""
    model = tiny(model_type)
    tokenized = tokenize_contexts(model, STATEMENT, "Rome", ())
    with torch.no_grad():
        logits = forward(model, pad([tokenized.prompts[0].ids], model))[0, -1]
    (first, second), own = logits.topk(2).values.tolist(), int(logits.argmax())
    tokenized = replace(tokenized, targets=[[own]])
    lead = first - second
    assert lead > 0

    def steps(margin: float, objective: Objective = "write") -> int:
        parameters = RomeParameters(layers=(1,), steps=3, stop_loss=0, stop_margin=margin, learning_rate=1e-6)
        spec = ValueSearchSpec(tokenized, parameters, objective=objective)
        return len(optimize_value(model, spec).losses)

    assert [steps(0.99 * lead), steps(1.01 * lead), steps(0.0, "erase")] == [1, 3, 3]


def test_the_least_lead_by_hand() -> None:
    """The least lead of a row's token over the most probable other one; negative where another one leads."""
    rows = torch.tensor([[0.0, -1.0, -3.0], [-2.0, -0.5, -4.0]])
    assert float(least_lead(rows, torch.tensor([0, 1]))) == pytest.approx(1.0)
    assert float(least_lead(rows, torch.tensor([0, 2]))) == pytest.approx(-3.5)


def test_an_erasure_ends_at_a_share_of_what_was_there() -> None:
    """An erasure stops at a fraction of its first loss."""
    model = tiny()
    p = RomeParameters(layers=(1,), steps=9, stop_loss=0.999, kl_factor=0, weight_decay=0, clamp=100.0)
    losses = optimize_value(
        model, ValueSearchSpec(tokenize_contexts(model, STATEMENT, "Rome", []), p, objective="erase")
    ).losses
    assert losses[0] < 1e-3
    assert 1 < len(losses) < 9
    assert losses[-1] < 0.999 * losses[0] <= losses[-2]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 2])
def test_under_noise_the_loss_is_that_of_noised_subjects(model_type: str, tokens: int) -> None:
    """Noise is added to the subject's tokens of every row, in prefix and suffix."""
    model = tiny(model_type, dtype=torch.float64)
    parameters = RomeParameters(layers=(1,), steps=3, stop_loss=0, clamp=100.0)
    noise = torch.randn(tokens, model.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    value = optimize_value(
        model, ValueSearchSpec(tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS), parameters, noise=noise)
    )
    for loss, delta in ((value.losses[0], 0 * value.delta), (value.losses[-1], value.delta)):
        assert loss == pytest.approx(reference_loss(model, "Rome", delta, parameters, noise=noise), rel=1e-6)


def test_without_change_there_is_no_kl_and_no_decay() -> None:
    """At delta = 0 the loss is the negative log-probability."""
    model = tiny()
    with_terms = optimize_value_with(model, steps=1).losses[0]
    assert with_terms == pytest.approx(
        optimize_value_with(model, steps=1, kl_factor=0, weight_decay=0).losses[0], rel=1e-6
    )


def test_the_first_step_of_adam_moves_every_coordinate_by_the_rate() -> None:
    """After one update |delta_i| is the learning rate in every coordinate, before the clamp."""
    result = optimize_value_with(tiny(), steps=2, learning_rate=0.03, clamp=1e6)
    torch.testing.assert_close(result.delta.abs(), torch.full_like(result.delta, 0.03), rtol=1e-3, atol=1e-5)


def test_the_learning_rate_falls_linearly() -> None:
    """With final_rate 0 the second of three steps has two thirds of the rate, and the first one all of it."""
    options: dict[str, Any] = {"learning_rate": 0.03, "clamp": 1e6}
    first = optimize_value_with(tiny(), steps=2, **options).delta
    constant = optimize_value_with(tiny(), steps=3, **options).delta
    falling = optimize_value_with(tiny(), steps=3, final_rate=0.0, **options).delta
    torch.testing.assert_close(falling - first, (constant - first) * 2 / 3, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("clamp", [0.1, 1.0])
def test_delta_stays_inside_the_clamp(clamp: float) -> None:
    """|delta| is never above clamp |v|."""
    result = optimize_value_with(tiny(), learning_rate=5.0, clamp=clamp)
    assert result.delta.norm() <= clamp * result.initial.norm() * (1 + 1e-5)


def test_steps_counts_forward_passes() -> None:
    """S steps make S losses and S - 1 updates; a loss below stop_loss ends the optimization."""
    assert len(optimize_value_with(tiny(), steps=4).losses) == 4
    stopped = optimize_value_with(tiny(), steps=4, stop_loss=1e9)
    assert len(stopped.losses) == 1
    assert stopped.delta.norm() == 0


def test_the_kl_term_does_not_see_what_follows_the_subject() -> None:
    """The KL term is read at the subject's last token and does not depend on what follows."""
    model = tiny()
    subject = "Eiffel Tower"
    ids, _ = model.encode(subject)
    with torch.no_grad():
        alone = forward(model, pad([ids], model))[0, len(ids) - 1]
        longer = forward(model, pad([model.encode(subject + " is a")[0]], model))[0, len(ids) - 1]
    torch.testing.assert_close(alone, longer, rtol=1e-4, atol=1e-5)


def test_the_optimisation_lowers_the_loss() -> None:
    """The last loss is below the first."""
    losses = optimize_value_with(
        tiny(), steps=15, learning_rate=0.5, weight_decay=0, kl_factor=0, clamp=100.0
    ).losses
    assert losses[-1] < losses[0] - 0.05  # in a random model the subject has little effect


def test_padding_does_not_matter() -> None:
    """A long context in the batch does not change the loss of the other rows."""
    model = tiny()
    long = "The Colosseum is located in the city of Rome and so on and so forth"
    alone = [optimize_value_with(model, contexts=[c], steps=1, kl_factor=0).losses[0] for c in ("", long)]
    both = optimize_value_with(model, contexts=["", long, long], steps=1, kl_factor=0).losses[0]
    bare = optimize_value_with(model, contexts=[], steps=1, kl_factor=0).losses[0]
    assert alone[0] == pytest.approx(bare, rel=1e-5)
    context = 2 * alone[1] - bare
    assert both == pytest.approx((2 * bare + 2 * context) / 4, rel=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    """The optimization changes no weight and leaves no gradient and no hook, also when it is abandoned."""
    model = tiny()
    before = {n: t.clone() for n, t in model.model.state_dict().items()}
    spec = ValueSearchSpec(tokenize_contexts(model, STATEMENT, "Rome", []), RomeParameters(layers=(1,)))
    steps = optimize_values(model, DeltaSite(1), [spec])
    next(steps)
    next(steps)
    steps.close()
    assert all(torch.equal(t, before[n]) for n, t in model.model.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in model.model.parameters())
    assert not any(m._forward_hooks for m in model.model.modules())


def test_every_row_knows_its_own_subject() -> None:
    """The subject's last token is found in each context, also after braces and a repeated subject."""
    model = tiny()
    contexts = [*CONTEXTS, "Eiffel Tower"]
    tokenized = tokenize_contexts(model, STATEMENT, "Rome", contexts)
    for lead, prompt in zip(["", *(c + ". " for c in contexts)], tokenized.prompts, strict=True):
        text = lead + STATEMENT.text
        _, offsets = model.encode(text)
        start, end = offsets[prompt.last_subject_index]
        assert end == len(lead) + STATEMENT.span[1]
        assert text[start:end].strip() and "Eiffel Tower".endswith(text[start:end].strip())


def test_a_start_token_does_not_shift_the_subject() -> None:
    """A tokenizer that adds a start token does not shift the subject."""
    plain, bos = tiny("llama"), tiny("llama", bos=True)
    without, with_bos = (
        tokenize_contexts(plain, STATEMENT, "Rome", CONTEXTS),
        tokenize_contexts(bos, STATEMENT, "Rome", CONTEXTS),
    )
    for a, b in zip(without.prompts, with_bos.prompts, strict=True):
        assert b.last_subject_index == a.last_subject_index + 1
        assert [0, *a.ids] == b.ids
    assert without.targets == with_bos.targets


def test_half_a_character_in_a_target_is_no_problem() -> None:
    """An object whose tokens split a character is used as token ids."""
    model = tiny()
    tokenized = tokenize_contexts(model, STATEMENT, "東京", [])
    assert len(tokenized.targets[0]) >= 6
    assert math.isfinite(optimize_value_with(model, "東京", contexts=[]).losses[-1])


#: GPT-J computes its attention in single precision, whatever the model's own
ROUNDING = {"gptj": 1e-5}

BATCHED_EDITS: list[tuple[str, str, str, dict[str, float]]] = [
    ("Eiffel Tower", "The {} is located in the city of", "Rome", {"steps": 6, "stop_loss": 0}),
    ("Marie Curie", "The mother tongue of {} was", "São Paulo, Brazil", {"steps": 4, "learning_rate": 0.1}),
    ("Big Ben", "{} can be found in", "Japan", {"steps": 9, "stop_loss": 0, "clamp": 0.3}),
    ("Japan", "{}", "Rome", {"steps": 2, "stop_loss": 1e9}),  # ends at once
]


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama"])
def test_batched_optimization_equals_single(model_type: str) -> None:
    """Edits optimized in one batch have the losses and the delta that each has alone."""
    model = tiny(model_type, dtype=torch.float64)
    specs = []
    for subject, prompt, target, changes in BATCHED_EDITS:
        parameters = RomeParameters.model_validate({"layers": [1], **changes})
        tokenized = tokenize_contexts(
            model, fill_prompt(prompt, subject), target, CONTEXTS, with_bare_subjects=subject == "Big Ben"
        )
        specs.append(ValueSearchSpec(tokenized, parameters))
    together = run_to_completion(optimize_values(model, DeltaSite(1), specs))
    for spec, value in zip(specs, together, strict=True):
        alone = optimize_value(model, spec)
        rounding = ROUNDING.get(model_type, 1e-10)
        assert value.losses == pytest.approx(alone.losses, rel=rounding)
        for name in ("delta", "initial", "keys", "values"):
            torch.testing.assert_close(
                getattr(value, name), getattr(alone, name), rtol=10 * rounding, atol=rounding
            )


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layer", [0, 2])
def test_suffix_batch_equals_full_forward(model_type: str, layer: int) -> None:
    """The suffix pass gives the logits of a full pass with the change hooked in."""
    model = tiny(model_type, dtype=torch.float64)
    tokenized = tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS)
    texts = tokenized.texts()
    suffixes, _ = prefill_suffixes(model, texts, DeltaSite(layer))
    change = torch.randn(len(texts), model.hidden_size, dtype=torch.float64)
    hidden = suffixes.forward(change)
    for i, text in enumerate(texts):

        def add(output: torch.Tensor, i: int = i, at: int = text.last_subject_index) -> torch.Tensor:
            output.view(1, -1, model.hidden_size)[0, at] += change[i]
            return output

        with replace_output(model.down_proj(layer), add), torch.no_grad():
            whole = forward(model, pad([text.ids], model))[0, text.last_subject_index :]
        mine = suffixes.block_runner.logits(hidden[i, : len(whole)])
        rounding = ROUNDING.get(model_type, 1e-10)
        torch.testing.assert_close(mine, whole, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("target", ["city", "Rome"])
def test_last_block_reader_equals_full_block(model_type: str, layer: int, target: str) -> None:
    """The last block reader gives the outputs and gradients of the full block."""
    model = tiny(model_type, dtype=torch.float64)
    tokenized = tokenize_contexts(model, STATEMENT, target, CONTEXTS)
    suffixes, _ = prefill_suffixes(model, tokenized.texts(), DeltaSite(layer))
    places = [
        (i, len(p.ids) - 1 - p.last_subject_index + j)
        for i, p in enumerate(tokenized.prompts)
        for j in range(len(tokenized.targets[i]))
    ]
    row, column = torch.tensor([*places, (tokenized.kl_reference_row, 0)]).T
    reader = LastBlockReader(suffixes, row, column)
    assert reader.runs_whole_block == (layer == 2)
    g = torch.Generator().manual_seed(0)
    change = torch.randn(
        len(tokenized.texts()), model.hidden_size, dtype=torch.float64, generator=g
    ).requires_grad_()
    weight = torch.randn(len(row), model.hidden_size, dtype=torch.float64, generator=g)
    mine, whole = reader(change), suffixes.forward(change)[row, column]
    gradients = [torch.autograd.grad((weight * x).sum(), change)[0] for x in (mine, whole)]
    rounding = ROUNDING.get(model_type, 1e-10)
    torch.testing.assert_close(mine, whole, rtol=rounding, atol=rounding)
    torch.testing.assert_close(*gradients, rtol=rounding, atol=10 * rounding)


def test_kl_reference_row_reuses_a_prompt_that_begins_with_the_subject() -> None:
    """The KL term reads the bare prompt when it begins with the subject, with the same loss."""
    model = tiny(dtype=torch.float64)
    statement = fill_prompt("{} is located in the city of", "Eiffel Tower")
    tokenized = tokenize_contexts(model, statement, "Rome", CONTEXTS)
    assert tokenized.kl_reference_row == 0 and len(tokenized.texts()) == tokenized.size
    separate = with_separate_subject_row(tokenized)
    assert separate.kl_reference_row == separate.size and len(separate.texts()) == separate.size + 1
    parameters = RomeParameters(layers=(1,), steps=5, stop_loss=0, kl_factor=2.0)
    one_row, two_rows = (optimize_value(model, ValueSearchSpec(x, parameters)) for x in (tokenized, separate))
    assert one_row.losses == pytest.approx(two_rows.losses, rel=1e-9)
    torch.testing.assert_close(one_row.delta, two_rows.delta, rtol=1e-8, atol=1e-8)


def with_separate_subject_row(tokenized: TokenizedContexts) -> TokenizedContexts:
    """Return the same texts with a row of its own for the bare subject."""

    class Apart(TokenizedContexts):
        kl_reference_row = tokenized.size

    return Apart(tokenized.prompts, tokenized.targets, tokenized.bare_subjects)


def test_post_mlp_norm_is_detected() -> None:
    """When a block normalizes the MLP's output (OPT-350m), delta is added inside the block."""
    model = tiny("opt", dtype=torch.float64)
    for block in model.blocks:
        vars(block)["do_layer_norm_before"] = False
    tokenized = tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS)
    suffixes, _ = prefill_suffixes(model, tokenized.texts(), DeltaSite(1))
    assert suffixes.delta_module is not None
    parameters = RomeParameters(layers=(1,), steps=3, stop_loss=0, clamp=100.0)
    value = optimize_value(model, ValueSearchSpec(tokenized, parameters))
    assert value.losses[-1] == pytest.approx(reference_loss(model, "Rome", value.delta, parameters), rel=1e-9)
