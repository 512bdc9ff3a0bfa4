"""Devices and precisions are data: the same work in half precision, and on an accelerator where there is one.

`python -m pytest -m gpu tests/unit/test_devices.py` runs what needs an accelerator.
"""

from __future__ import annotations

import pytest
import torch

from service.covariance.collect import collect_steps
from service.covariance.corpus import Corpus
from service.editing.edit_spec import batches, want
from service.editing.methods.registry import find_together_steps
from service.editing.methods.rome import Found
from service.engine.decoding import Batch, row
from service.kit.steps import finish
from service.kit.text import fill
from service.models.loading import LoadedModel
from service.recipes.recipe import RomeParameters
from service.schemas import Sampling
from service.tracing.fast_trace import trace_steps
from tests.support.tiny_models import TEXTS, tiny

KINDS = ["gpt2", "gptj", "llama"]
HALF = [torch.bfloat16, torch.float16]
STATEMENT = fill("The {} is located in the city of", "Eiffel Tower")
CONTEXTS = ["In Japan", "Big Ben"]
PARAMETERS = RomeParameters(layers=(1,), steps=6, learning_rate=0.1, stop_loss=0)

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here")]
CUDA = pytest.param("cuda", marks=gpu)


def resident(model_type: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    model = tiny(model_type, dtype=dtype)
    model.model.to(device)
    return model


def edited(model: LoadedModel) -> Found:
    statistics = finish(collect_steps(model, [1], Corpus("test", tuple(TEXTS)), damping=0.1))
    wanted = want(model, CONTEXTS, STATEMENT, "Rome", PARAMETERS, "edit_1")
    (found,) = finish(find_together_steps(model, statistics, [wanted]))
    return found


def traced(model: LoadedModel) -> torch.Tensor:
    result = finish(trace_steps(model, STATEMENT, "Rome", samples=3, noise=0.5, severed=True))
    return torch.tensor([result.to_json()["kinds"][kind]["scores"] for kind in ("hidden", "mlp", "attn")])


def said(model: LoadedModel) -> list[list[int]]:
    asked = [Sampling(max_new_tokens=8, temperature=t, seed=3) for t in (0.0, 0.7)]
    rows = [row(model, text, a) for text in TEXTS for a in asked]
    batch = Batch(model, rows)
    while len(batch):
        batch.step()
    return [r.said for r in rows]


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("model_type", KINDS)
def test_an_edit_in_half_precision(model_type: str, dtype: torch.dtype, device: str) -> None:
    """With weights in half precision the loss is that of single precision up to their rounding, and what is solved is not rounded."""
    half = edited(resident(model_type, dtype, device))
    full = edited(resident(model_type))
    assert half.losses[0] == pytest.approx(full.losses[0], rel=0.05)
    (association,) = half.pieces
    for tensor in (association.key, association.direction, association.value):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        assert bool(tensor.isfinite().all())


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("model_type", KINDS)
def test_traces_and_texts_in_half_precision(model_type: str, dtype: torch.dtype, device: str) -> None:
    """A trace in half precision shows what one in single precision shows, and every prompt is answered."""
    half = resident(model_type, dtype, device)
    torch.testing.assert_close(traced(half), traced(resident(model_type)), rtol=0.2, atol=1e-4)
    assert all(said(half))


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("device", [CUDA])
def test_an_accelerator_computes_what_the_cpu_computes(model_type: str, device: str) -> None:
    """In single precision the factors of an edit, the map of a trace and the texts are those of the CPU, up to rounding."""
    here, there = resident(model_type), resident(model_type, device=device)
    (one,), (other,) = edited(here).pieces, edited(there).pieces
    for name in ("key", "direction", "value"):
        torch.testing.assert_close(getattr(other, name), getattr(one, name), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(traced(there), traced(here), rtol=1e-4, atol=1e-5)
    assert said(there) == said(here)


@pytest.mark.parametrize("device", [CUDA])
def test_edits_share_steps_on_an_accelerator(device: str) -> None:
    """Where a step has room for more than one edit, they are found side by side; on a CPU each is alone."""
    for place, together in (("cpu", 1), (device, 3)):
        model = resident("gpt2", device=place)
        edits = [want(model, CONTEXTS, STATEMENT, "Rome", PARAMETERS, str(i)) for i in range(3)]
        assert len(batches(model, edits)[0]) == together


@pytest.mark.parametrize("device", [CUDA])
def test_a_decode_step_waits_for_the_device_once(device: str) -> None:
    """Between two steps nothing but the chosen tokens is fetched from the device."""
    model = resident("gpt2", device=device)
    batch = Batch(model, [row(model, text, Sampling(max_new_tokens=20, temperature=0)) for text in TEXTS])
    for _ in range(3):
        batch.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        batch.step()
    copies = [e for e in profile.events() if "Memcpy DtoH" in e.name]
    assert len(copies) <= 1
