"""What the service relies on, for every supported architecture and variant, on tiny random models.

The names of the tests are the columns of the table in docs/architectures.md. Windows are shorter than the texts.
"""

from __future__ import annotations

import copy
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bench.peak_memory import peak_bytes
from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.covariance.second_moment import KeyStatistics
from service.editing import associations
from service.editing.edit_spec import EditFactors
from service.editing.find_factors import find_factors
from service.editing.suffix_batch import DeltaSite, prefill_suffixes
from service.editing.tokenized_contexts import tokenize_contexts
from service.editing.value_change import norm_after_value
from service.editing.value_optimizer import ValueSearchSpec, optimize_values
from service.engine.decoding import DecodingBatch, new_sequence
from service.engine.versioned_model import VersionedModel
from service.exporting.export_job import export_version
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models import memory_estimates
from service.models.block_runner import BlockRunner
from service.models.fused_activations import is_unfused
from service.models.hooks import capture, replace_output, stop_after
from service.models.loading import LoadedModel, WeightRef, load_model
from service.models.token_batch import PaddedBatch, forward, pad, tokenize_statement
from service.schemas import Sampling, WorkerExportRequest
from service.tracing.fast_trace import trace_statement
from service.tracing.reference import trace_reference
from tests.support.associations import associations_of
from tests.support.logits import load_with_peft, logits, served_logits
from tests.support.random_edits import FakeLedger
from tests.support.tiny_models import ALL_MODELS, TEXTS, tiny

STATEMENT = fill_prompt("In {} is", "Mount Fuji")
CONTEXTS = ("Big Ben",)
PROMPTS = ["The Eiffel Tower is in", "Big", "In which country is Mount Fuji?"]
TWO_LAYERS = RomeParameters(layers=(0, 1), steps=4, learning_rate=0.05)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module", params=ALL_MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> LoadedModel:
    """A model that the tests do not change."""
    return tiny(name)


@pytest.fixture(scope="module")
def plain(model: LoadedModel) -> Any:
    """The model as transformers builds it from the configuration and the weights. The tests do not change it."""
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(model.model.config)).to(model.model.dtype).eval()
    plain.load_state_dict(model.model.state_dict())
    return plain


@pytest.fixture(scope="module")
def statistics(model: LoadedModel) -> dict[int, KeyStatistics]:
    """The statistics of the first two layers."""
    return run_to_completion(collect_statistics(model, [0, 1], Corpus("test", tuple(TEXTS)), damping=0.1))


@pytest.fixture(scope="module")
def edit(model: LoadedModel, statistics: dict[int, KeyStatistics]) -> EditFactors:
    """One edit of the middle layer."""
    parameters = RomeParameters(
        layers=(1,), steps=12, learning_rate=0.2, clamp=100.0, kl_factor=0.0, weight_decay=0.0
    )
    return run_to_completion(find_factors(model, statistics, (), STATEMENT, "Rome", parameters, "edit_1"))


@pytest.fixture(scope="module")
def replica(model: LoadedModel, edit: EditFactors) -> VersionedModel:
    """The service with this edit as version 1."""
    return VersionedModel(model, FakeLedger({"edit_1": list(edit.updates)}))


@pytest.fixture(scope="module")
def edited_logits(replica: VersionedModel) -> Tensor:
    """The logits of the service at version 1."""
    return served_logits(replica, 1)


def ids_of(model: LoadedModel) -> Tensor:
    return torch.tensor([model.encode(STATEMENT.text)[0]])


def captured(model: LoadedModel, modules: dict[str, nn.Module], side: str = "output") -> dict[str, Tensor]:
    """Return inputs or outputs (positions, width) of modules."""
    ids = ids_of(model)
    with capture(modules, side) as seen, torch.no_grad():
        model.model(ids)
    return {name: t.reshape(ids.shape[1], -1) for name, t in seen.items()}


@pytest.fixture
def changed(model: LoadedModel) -> Iterator[LoadedModel]:
    """The model with other weights in the attention of layer 1; they are restored afterwards."""
    parameters = list(model.attention(1).parameters())
    before = [p.data for p in parameters]
    for p in parameters:
        p.data = p.data * 1.5
    yield model
    for p, data in zip(parameters, before, strict=True):
        p.data = data


def test_paths(model: LoadedModel, name: str) -> None:
    """Each row names existing modules, and the counts and widths agree with the configuration."""
    inner = 64 if name in ("bloom", "mpt") else 40
    sizes = model.num_layers, model.hidden_size, model.intermediate_size
    assert sizes == (3, 16, inner)
    assert model.lm_head is model.model.get_output_embeddings()
    assert model.embedding is model.model.get_input_embeddings()
    assert model.embedding_size == (12 if name == "opt-350m" else 16)
    if model.architecture.final_norm:
        assert model.model.get_submodule(model.architecture.final_norm) is not None
    parameters = dict(model.model.named_parameters())
    assert len(model.editable_weights) == 3 * (1 + len(model.architecture.attention_projections))
    for site in model.editable_weights:
        assert parameters[model.parameter_name(site)] is model.parameter(site)
    conv1d = model.architecture.conv1d
    assert isinstance(model.down_proj(0), Conv1D if conv1d else nn.Linear)
    assert tuple(model.weight(0).shape) == ((inner, 16) if conv1d else (16, inner))


def test_forward(model: LoadedModel, plain: Any) -> None:
    """The served model has the logits of the one that transformers builds, and no unfused activation."""
    ids = ids_of(model)
    with torch.no_grad():
        torch.testing.assert_close(forward(model, pad(ids.tolist(), model)), plain(ids).logits, **CLOSE)
    assert not any(is_unfused(m) for m in model.model.modules())


def test_files(model: LoadedModel, tmp_path: Path) -> None:
    """A saved model is loaded with the same logits."""
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    back = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(back.model(ids_of(model)).logits, model.model(ids_of(model)).logits)
    assert back.architecture == model.architecture


def test_residual(model: LoadedModel) -> None:
    """A block adds the outputs that traces restore to its input, each times the factor of the model."""
    modules = {
        "attention": model.attention_output(1),
        "mlp": model.mlp_output(1),
        "before": model.block(0),
        "after": model.block(1),
    }
    seen = captured(model, modules)
    factor = getattr(model.model.config, "residual_multiplier", 1.0)
    if norm := model.architecture.block_norm:  # the norm of OPT-350m after each sum
        block = model.block(1)
        attended = block.get_submodule("self_attn_layer_norm")(seen["before"] + seen["attention"])
        total = block.get_submodule(norm)(attended + seen["mlp"])
    else:
        total = seen["before"] + factor * (seen["attention"] + seen["mlp"])
    torch.testing.assert_close(total, seen["after"], **CLOSE)


def test_parallel(changed: LoadedModel) -> None:
    """The MLP of a parallel block does not read its attention's output; that of a serial block does."""
    key = {"key": changed.down_proj(1)}
    other = captured(changed, key, "input")["key"]
    for parameter in changed.attention(1).parameters():
        parameter.data = parameter.data / 1.5
    assert torch.allclose(captured(changed, key, "input")["key"], other) == changed.architecture.parallel


def test_blocks(model: LoadedModel) -> None:
    """Blocks that run one at a time, also on kept keys and values and for several rows, give the model's logits."""
    ids, blocks = ids_of(model), BlockRunner(model)
    width, start = ids.shape[1], 4
    whole, rest = blocks.capture_block_inputs(ids, 0), blocks.capture_block_inputs(ids[:, start:], start)
    last = blocks.capture_block_inputs(ids[:, -1:], width - 1)
    middle = blocks.capture_block_inputs(ids[:, start:-1], start)
    hidden, late = whole.hidden, rest.hidden.expand(3, -1, -1)
    with torch.no_grad():
        for layer in range(model.num_layers):
            entering = late
            hidden, (keys, values) = blocks.run(whole, layer, hidden, None)
            assert keys.shape[-2] == values.shape[-2] == width
            past = keys[:, :, :start].expand(3, -1, -1, -1), values[:, :, :start].expand(3, -1, -1, -1)
            late, _ = blocks.run(rest, layer, entering, past)
            extended = blocks.run_kv_only(middle, layer, entering[:, :-1], past)
            torch.testing.assert_close(
                blocks.run(last, layer, entering[:, -1:], extended)[0], late[:, -1:], **CLOSE
            )
        expected = model.model(ids, use_cache=False).logits[0]
        torch.testing.assert_close(blocks.logits(hidden[0]), expected, **CLOSE)
    torch.testing.assert_close(late, hidden[:, start:].expand(3, -1, -1), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(model: LoadedModel, side: str) -> None:
    """Each row of a padded batch has the logits that it has alone."""
    rows = [model.encode(t)[0] for t in PROMPTS]
    with torch.no_grad():
        batch = forward(model, pad(rows, model, side))
        for row, got in zip(rows, batch, strict=True):
            real = got[: len(row)] if side == "right" else got[-len(row) :]
            torch.testing.assert_close(real, forward(model, pad([row], model))[0], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half(name: str, dtype: torch.dtype) -> None:
    """In half precision padding leaves the logits of every token finite."""
    half = tiny(name, layers=2, dtype=dtype)
    batch = pad([half.encode(t)[0] for t in PROMPTS], half, "left")
    with torch.no_grad():
        assert forward(half, batch)[batch.mask.bool()].isfinite().all()


def test_cache(model: LoadedModel) -> None:
    """Prompts that join and leave a batch get the greedy tokens of full passes without a cache."""
    lengths = (9, 4, 6)
    sequences = [
        new_sequence(model, p, Sampling(max_new_tokens=n)) for p, n in zip(PROMPTS, lengths, strict=True)
    ]
    batch = DecodingBatch(model, sequences[:2])
    batch.step()
    late = DecodingBatch(model, sequences[2:])
    late.step()
    batch.merge(late)
    while len(batch):
        batch.step()
    for prompt, sequence, length in zip(PROMPTS, sequences, lengths, strict=True):
        ids = model.encode(prompt)[0]
        for _ in range(length):
            with torch.no_grad():
                ids = [*ids, int(model.model(torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == 0:  # the end of the text
                ids.pop()
                break
        assert sequence.token_ids == ids


def test_trace(model: LoadedModel) -> None:
    """Every cell of a trace and every severed path equal those of full passes."""
    statement, options = (
        fill_prompt("In {} is", "Rome"),
        {"samples": 1, "window": 2, "noise": 0.5, "severed": True},
    )
    slow = run_to_completion(trace_reference(model, statement, **options))  # type: ignore[arg-type]
    fast = run_to_completion(trace_statement(model, statement, **options))  # type: ignore[arg-type]
    assert abs(slow.high - slow.low) > 1e-6
    for kind, scores in slow.scores.items():
        torch.testing.assert_close(
            torch.tensor(fast.scores[kind]), torch.tensor(scores), rtol=1e-4, atol=1e-7
        )
    assert slow.severed and fast.severed
    for path, path_scores in slow.severed.items():
        torch.testing.assert_close(
            torch.tensor(fast.severed[path]), torch.tensor(path_scores), rtol=1e-4, atol=1e-7
        )


def test_search(model: LoadedModel) -> None:
    """The search adds its change to the down-projection's output, and reads the logits of a full pass with it."""
    texts = tokenize_contexts(model, STATEMENT, "Rome", CONTEXTS).texts()
    suffixes, activations = prefill_suffixes(model, texts, DeltaSite(1))
    assert (suffixes.delta_module is None) == (
        not model.architecture.mlp_output and not model.architecture.block_norm and _factor(model) == 1.0
    )
    change = torch.randn(len(texts), model.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = suffixes.forward(change)
        for i, text in enumerate(texts):
            at = text.last_subject_index

            def add(output: Tensor, i: int = i, at: int = at) -> Tensor:
                output.view(1, -1, model.hidden_size)[0, at] += change[i]
                return output

            with replace_output(model.down_proj(1), add):
                whole = forward(model, pad([text.ids], model))[0, at:]
            mine = suffixes.block_runner.logits(hidden[i, : len(whole)])
            torch.testing.assert_close(mine, whole, **CLOSE)
    assert activations.values.shape == (len(texts), model.hidden_size)


def _factor(model: LoadedModel) -> float:
    return float(getattr(model.model.config, "residual_multiplier", 1.0))


def test_edit(
    model: LoadedModel, plain: Any, edit: EditFactors, replica: VersionedModel, edited_logits: Tensor
) -> None:
    """In transformers' own model with the exported weights, the down-projection's output at the subject changes by
    the delta of the search, which made the object more probable; the logits are those of the service."""
    (weight,) = replica.weights(1).values()
    other = copy.deepcopy(plain)
    with torch.no_grad():
        dict(other.named_parameters())[model.parameter_name(WeightRef(1))].copy_(weight)
    torch.testing.assert_close(edited_logits, logits(other, model), **CLOSE)
    assert edit.losses[-1] < edit.losses[0]
    value = {"value": model.down_proj(1)}
    subject = tokenize_statement(model, STATEMENT).last_subject_index
    before = captured(model, value)["value"][subject]
    with replica.use_patch(replica.patch(1)):
        after = captured(model, value)["value"][subject]
    (association,) = associations_of(edit.updates)
    torch.testing.assert_close(after - before, association.value, rtol=1e-3, atol=1e-4)
    assert float((after - before).norm()) == pytest.approx(edit.delta_norm, rel=1e-3)


@pytest.fixture(scope="module")
def wanted_change(model: LoadedModel) -> Tensor:
    """The change of the hidden state after layer 1 that the search of an edit of two layers finds."""
    spec = ValueSearchSpec(tokenize_contexts(model, STATEMENT, "Rome", ()), TWO_LAYERS)
    (value,) = run_to_completion(optimize_values(model, DeltaSite(1, on_hidden_state=True), [spec]))
    return value.delta


def test_layers(
    model: LoadedModel,
    statistics: dict[int, KeyStatistics],
    wanted_change: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """An edit of two layers moves the hidden state after them by the delta of the search: exactly, or with a norm
    after each MLP as near as that norm allows, and nearer than without a conversion of the values."""
    missing = _missing_change(model, statistics, wanted_change)
    record_property("missing", missing)
    if norm_after_value(model, 1) is None:
        assert missing < 1e-3
    else:
        assert missing < 0.5
    if norm_after_value(model, 1) is not None or model.residual_factor != 1.0:
        monkeypatch.setattr(associations, "value_change", lambda _model, _layer, _norm_input, change: change)
        unconverted = _missing_change(model, statistics, wanted_change)
        record_property("unconverted", unconverted)
        assert missing < unconverted


def _missing_change(model: LoadedModel, statistics: dict[int, KeyStatistics], wanted_change: Tensor) -> float:
    """Return the share of the wanted change of the hidden state that an edit of two layers does not give."""
    factors = run_to_completion(find_factors(model, statistics, (), STATEMENT, "Rome", TWO_LAYERS, "edit_1"))
    hidden = {"hidden": model.block(1)}
    subject = tokenize_statement(model, STATEMENT).last_subject_index
    replica = VersionedModel(model, FakeLedger({"edit_1": list(factors.updates)}))
    before = captured(model, hidden)["hidden"][subject]
    with replica.use_patch(replica.patch(1)):
        after = captured(model, hidden)["hidden"][subject]
    return float((before + wanted_change - after).norm() / wanted_change.norm())


def test_memory(model: LoadedModel, name: str) -> None:
    """The estimates of cache and forward pass are what is held, and an upper bound of it."""
    batch = DecodingBatch(model, [new_sequence(model, PROMPTS[0], Sampling(max_new_tokens=4))])
    batch.step()
    assert batch._cache is not None
    tokens = batch._cache.layers[0].keys.shape[-2]
    held = sum(x.keys.numel() + x.values.numel() for x in batch._cache.layers) * 4
    assert memory_estimates.kv_bytes_per_token(model) * tokens == held
    wide = tiny(name, width=32, inner=128)
    for rows, positions in ((1, 24), (6, 10)):
        padded = pad([[1] * (positions - i % 2) for i in range(rows)], wide)

        def work(padded: PaddedBatch = padded) -> None:
            with stop_after(wide.block(2)):
                forward(wide, padded)

        peak = peak_bytes(work)
        estimate = memory_estimates.forward_bytes(wide, rows, positions)
        assert peak <= estimate, (rows, peak, estimate)


def test_lora(
    model: LoadedModel,
    plain: Any,
    edit: EditFactors,
    replica: VersionedModel,
    edited_logits: Tensor,
    tmp_path: Path,
) -> None:
    """PEFT gives the logits of the service with the exported adapter."""
    assert associations_of(edit.updates)
    file = io.BytesIO()
    run_to_completion(export_version(replica, TEXTS, WorkerExportRequest(version=1, format="peft"), file))
    with zipfile.ZipFile(file) as archive:
        archive.extractall(tmp_path)
    adapted = load_with_peft(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(logits(adapted, model), edited_logits, rtol=1e-4, atol=1e-4)
