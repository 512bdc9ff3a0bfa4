"""bench/meng_reference.py: the reference implementation of Meng et al., loaded from its own checkout.

The last tests run it on tiny models. They need a checkout: REFERENCE=PATH pytest
tests/integration/bench/test_meng_reference.py.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers.activations import NewGELUActivation

from bench.edits import cosine
from bench.meng_reference import (
    Reference,
    ReferenceEditor,
    ReferenceMissing,
    ReferenceTracer,
    as_reference_model,
    hyperparameters,
    retarget_device,
    without_bos,
)
from service.covariance.second_moment import KeyStatistics
from service.editing.find_factors import find_factors
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt, locate_subject
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.tracing.fast_trace import trace_statement
from service.tracing.reference import TRACE_KINDS
from tests.support.associations import associations_of
from tests.support.tiny_models import tiny

FAKE_CHECKOUT = {
    "rome/__init__.py": "from .rome_main import WHERE",
    "rome/rome_main.py": 'from datasets import load_dataset\nfrom rome import helper\nWHERE = helper.on("cuda")',
    "rome/helper.py": "from util.globals import *\ndef on(device): return device, STATS_DIR",
    "rome/compute_u.py": "inv_mom2_cache = {}",
    "experiments/__init__.py": "",
    "experiments/causal_trace.py": 'from dsets import KnownsDataset\nPATTERN = "[\\d]"\nWHERE = "cuda"',
}


@pytest.fixture
def fake_checkout(tmp_path: Path) -> Path:
    """Create a checkout with the module names of the reference."""
    for name, text in FAKE_CHECKOUT.items():
        path = tmp_path / "theirs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "theirs"


def test_without_a_checkout_it_says_what_to_do(tmp_path: Path) -> None:
    """Without a path or with a wrong one, the error says what to clone and which option to pass."""
    for path in (None, tmp_path):
        with pytest.raises(ReferenceMissing, match=r"git clone \S+/rome.* --reference PATH"):
            Reference.load(path)


def test_their_source_runs_on_the_device_at_hand() -> None:
    """`retarget_device` replaces the device in strings and in calls of `cuda()`."""
    assert retarget_device('x.to("cuda"); y.cuda()', "cpu") == 'x.to("cpu"); y.to("cpu")'
    assert retarget_device('x.to("cuda")', "cuda") == 'x.to("cuda")'


def test_their_modules_load_without_what_they_do_not_use(fake_checkout: Path) -> None:
    """Modules load without data sets and without a file in the working directory, for the given device."""
    reference = Reference.load(fake_checkout, "cpu")
    assert reference.rome_main.WHERE == ("cpu", "")
    assert reference.causal_trace.WHERE == "cpu"


def test_nothing_of_theirs_stays_behind(fake_checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After loading, neither the reference modules nor the stubs can be imported, replaced modules are
    restored, and no file is written."""
    ours = type(sys)("datasets")
    monkeypatch.setitem(sys.modules, "datasets", ours)
    finders, before = list(sys.meta_path), sorted(fake_checkout.rglob("*"))
    Reference.load(fake_checkout)
    assert sys.modules["datasets"] is ours and "rome" not in sys.modules and "dsets" not in sys.modules
    assert (sys.meta_path, sorted(fake_checkout.rglob("*"))) == (finders, before)


def test_two_devices_are_two_sets_of_modules(fake_checkout: Path) -> None:
    """One checkout loaded for two devices gives separate modules."""
    assert Reference.load(fake_checkout, "cpu").causal_trace.WHERE == "cpu"
    assert Reference.load(fake_checkout, "cuda:1").causal_trace.WHERE == "cuda:1"


def test_texts_can_be_read_without_a_start_token() -> None:
    """`without_bos` returns a model whose tokenizer adds no BOS token, and leaves the original model
    unchanged."""
    model = tiny("gpt2", bos=True)
    plain = without_bos(model)
    ids = model.encode("Big Ben")[0]
    assert plain.encode("Big Ben")[0] == ids[1:] and model.encode("Big Ben")[0] == ids
    assert plain.tokenizer(["Big Ben", "Big"], padding=True)["attention_mask"][1][-1] == 0


def test_theirs_is_the_model_as_transformers_makes_it() -> None:
    """The reference model has our weights and the original activations. Our model is unchanged."""
    model = tiny("gpt2")
    plain, ids = as_reference_model(model), torch.tensor([[5, 6, 7]])
    assert isinstance(plain.transformer.h[0].mlp.act, NewGELUActivation)
    assert not isinstance(model.model.transformer.h[0].mlp.act, NewGELUActivation)
    assert plain.transformer.h[0].mlp.c_proj.weight is model.weight(0)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model.model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gptj"])
def test_hyperparameters_name_our_modules(kind: str) -> None:
    """Module templates name the edited weight and its MLP."""
    model = tiny(kind)
    hparams = hyperparameters(model, RomeParameters(layers=(1,)))
    assert model.model.get_submodule(hparams["rewrite_module_tmp"].format(1)) is model.down_proj(1)
    mlp = model.model.get_submodule(hparams["mlp_module_tmp"].format(1))
    assert model.down_proj(1) in mlp.children()


# with a checkout


@pytest.fixture
def reference() -> Reference:
    """Return the reference; skip without a checkout."""
    if not (path := os.environ.get("REFERENCE")):
        pytest.skip("no checkout of the reference implementation: REFERENCE=PATH names one")
    return Reference.load(Path(path))


@pytest.fixture(params=["gpt2", "gptj"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return without_bos(tiny(request.param))


@pytest.mark.parametrize("kind", TRACE_KINDS)
def test_our_map_is_theirs(reference: Reference, model: LoadedModel, kind: str) -> None:
    """Traces have the same scores as the reference for the same noise, for every kind."""
    text, subject = "In The Eiffel Tower is in", "Eiffel Tower"
    theirs = ReferenceTracer(reference, model).trace_map(text, subject, kind, 0.5, samples=3)
    ours = run_to_completion(
        trace_statement(
            model, locate_subject(text, subject), kinds=(kind,), samples=3, noise=0.5, compat="meng2022"
        )
    )
    torch.testing.assert_close(torch.tensor(ours.scores[kind]), theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("prompt", ["{} is in the city of", "In the city of {} is"])
def test_our_edit_is_theirs(reference: Reference, model: LoadedModel, prompt: str) -> None:
    """Edits have the same updates and losses as the reference in the published form."""
    layer, subject = 1, "Eiffel Tower"
    parameters = RomeParameters(layers=(layer,), steps=6, compat="meng2022", stop_loss=0.05)
    keys = torch.randn(
        200, model.intermediate_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    statistics = KeyStatistics(layer, keys.T @ keys / 200, 200, 1e-3, "")
    contexts = ["The Colosseum", "Big Ben can"]
    theirs = ReferenceEditor(reference, model, contexts, statistics, parameters).edit(subject, prompt, "Rome")
    steps = find_factors(
        model, {layer: statistics}, contexts, fill_prompt(prompt, subject), "Rome", parameters
    )
    ours = run_to_completion(steps)
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), atol=2e-3, rtol=1e-4)
    (association,) = associations_of(ours.updates)
    change = association.rank_one()
    assert cosine(change, theirs.change) > 1 - 1e-5
    torch.testing.assert_close(change.dense(), theirs.change.dense(), atol=1e-3, rtol=1e-2)
    assert replace(model) == model
