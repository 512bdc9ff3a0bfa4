"""Edits, traces and generations in half precision, and on an accelerator where there is one.

`python -m pytest -m gpu tests/integration/test_devices.py` runs what needs an accelerator.
"""

from __future__ import annotations

import pytest
import torch

from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.editing.edit_spec import EditFactors, batch_edit_specs, build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.engine.decoding import DecodingBatch, new_sequence
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.schemas import Sampling
from service.tracing.fast_trace import trace_statement
from tests.support.associations import associations_of
from tests.support.tiny_models import TEXTS, tiny

KINDS = ["gpt2", "gptj", "llama"]
HALF = [torch.bfloat16, torch.float16]
STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")
CONTEXTS = ["In Japan", "Big Ben"]
PARAMETERS = RomeParameters(layers=(1,), steps=6, learning_rate=0.1, stop_loss=0)

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")]
CUDA = pytest.param("cuda", marks=gpu)


def model_on(model_type: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    model = tiny(model_type, dtype=dtype)
    model.model.to(device)
    return model


def compute_edit(model: LoadedModel) -> EditFactors:
    statistics = run_to_completion(collect_statistics(model, [1], Corpus("test", tuple(TEXTS)), damping=0.1))
    spec = build_edit_spec(model, CONTEXTS, STATEMENT, "Rome", PARAMETERS, "edit_1")
    (factors,) = run_to_completion(find_batch_factors(model, statistics, [spec]))
    return factors


def trace_scores(model: LoadedModel) -> torch.Tensor:
    result = run_to_completion(trace_statement(model, STATEMENT, "Rome", samples=3, noise=0.5, severed=True))
    return torch.tensor([result.to_json()["kinds"][kind]["scores"] for kind in ("hidden", "mlp", "attn")])


def generated_ids(model: LoadedModel) -> list[list[int]]:
    sampling_params = [Sampling(max_new_tokens=8, temperature=t, seed=3) for t in (0.0, 0.7)]
    rows = [new_sequence(model, text, a) for text in TEXTS for a in sampling_params]
    batch = DecodingBatch(model, rows)
    while len(batch):
        batch.step()
    return [r.output_ids for r in rows]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("model_type", KINDS)
def test_an_edit_in_half_precision(model_type: str, dtype: torch.dtype, device: str) -> None:
    """With half-precision weights the loss equals that of fp32 up to rounding, and the factors are in
    fp32."""
    half = compute_edit(model_on(model_type, dtype, device))
    full = compute_edit(model_on(model_type))
    assert half.losses[0] == pytest.approx(full.losses[0], rel=0.05)
    (association,) = associations_of(half.updates)
    for tensor in (association.key, association.direction, association.value):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("model_type", KINDS)
def test_traces_and_texts_in_half_precision(model_type: str, dtype: torch.dtype, device: str) -> None:
    """A trace in half precision agrees with one in fp32, and every prompt yields tokens."""
    half = model_on(model_type, dtype, device)
    torch.testing.assert_close(trace_scores(half), trace_scores(model_on(model_type)), rtol=0.2, atol=1e-4)
    assert all(generated_ids(half))


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("device", [CUDA])
def test_an_accelerator_computes_what_the_cpu_computes(model_type: str, device: str) -> None:
    """In fp32 the factors of an edit, the scores of a trace and the generated texts equal those of the CPU up
    to rounding."""
    here, there = model_on(model_type), model_on(model_type, device=device)
    (one,), (other,) = compute_edit(here).updates, compute_edit(there).updates
    for name in ("key", "direction", "value"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trace_scores(there), trace_scores(here), rtol=1e-4, atol=1e-5)
    assert generated_ids(there) == generated_ids(here)


@pytest.mark.parametrize("device", [CUDA])
def test_edits_share_steps_on_an_accelerator(device: str) -> None:
    """On an accelerator edits that fit one step are optimized as a batch; on a CPU one at a time."""
    for device_name, batch_size in (("cpu", 1), (device, 3)):
        model = model_on("gpt2", device=device_name)
        edits = [build_edit_spec(model, CONTEXTS, STATEMENT, "Rome", PARAMETERS, str(i)) for i in range(3)]
        assert len(batch_edit_specs(model, edits)[0]) == batch_size


@pytest.mark.parametrize("device", [CUDA])
def test_a_decode_step_waits_for_the_device_once(device: str) -> None:
    """Between two decode steps only the sampled tokens are copied from the device."""
    model = model_on("gpt2", device=device)
    batch = DecodingBatch(
        model, [new_sequence(model, text, Sampling(max_new_tokens=20, temperature=0)) for text in TEXTS]
    )
    for _ in range(3):
        batch.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        batch.step()
    copies = [e for e in profile.events() if "Memcpy DtoH" in e.name]
    assert len(copies) <= 1
