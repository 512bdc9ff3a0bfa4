"""A model whose blocks lie on several devices computes what it computes on one: service.models.placement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from service.covariance.collect import collect_statistics
from service.covariance.corpus import Corpus
from service.editing.edit_spec import EditFactors, build_edit_spec
from service.editing.find_factors import find_batch_factors
from service.engine.decoding import DecodingBatch, new_sequence
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.kit.steps import run_to_completion
from service.kit.text import fill_prompt
from service.methods.parameters import FineTuneParameters, GraceParameters, Parameters, RomeParameters
from service.models.loading import LoadedModel
from service.models.placement import place_blocks
from service.models.scoring import measure_drift, score_targets
from service.schemas import Sampling
from service.tracing.fast_trace import trace_statement
from service.tracing.reference import trace_reference
from service.weights.factors import Association, CodebookEntry, DenseUpdate
from tests.support.fake_devices import CPU, MAIN, SECOND, FakeDevices, device_of
from tests.support.random_edits import FakeLedger, random_associations
from tests.support.stepped_service import SteppedService
from tests.support.tiny_models import ALL_MODELS, TEXTS, tiny

#: kinds of blocks: parallel, with norms after the value, with windows, with tuples as outputs
TYPES = ["gpt2", "gptj", "gemma2", "olmo2"]
STATEMENT = fill_prompt("The {} is located in the city of", "Eiffel Tower")
SHORT_STATEMENT = fill_prompt("{} is in", "Big Ben")
CONTEXTS = ["In Japan", "Big Ben"]
DEVICES = (MAIN, SECOND, CPU)
MAIN_LAST = (SECOND, CPU, MAIN)  # when the main device has room for few blocks


@pytest.fixture(autouse=True)
def fake_devices() -> Iterator[None]:
    """Let operations on tensors of different devices fail."""
    with FakeDevices():
        yield


def spread_model(model_type: str, devices: Sequence[torch.device] = DEVICES) -> LoadedModel:
    """Return a tiny model whose three blocks lie on three devices."""
    model = tiny(model_type)
    place_blocks(model.model, model.architecture, MAIN, devices)
    return model


def all_placements(model_type: str) -> tuple[LoadedModel, ...]:
    """Return a model on one device, and on several in two orders."""
    return tiny(model_type), spread_model(model_type), spread_model(model_type, MAIN_LAST)


#: what is compared of each kind of update
TENSORS = {
    Association: ("key", "direction", "value"),
    DenseUpdate: ("change",),
    CodebookEntry: ("key", "output", "value"),
}


def compute_edit(model: LoadedModel, parameters: Parameters, method: str = "rome") -> EditFactors:
    corpus = Corpus("test", tuple(TEXTS))
    statistics = run_to_completion(collect_statistics(model, parameters.layers, corpus, damping=0.1))
    spec = build_edit_spec(model, CONTEXTS, STATEMENT, "Rome", parameters, "edit_1", method)
    (factors,) = run_to_completion(find_batch_factors(model, statistics, [spec]))
    return factors


def assert_same_edit(model_type: str, parameters: Parameters, method: str) -> None:
    one, *others = (compute_edit(model, parameters, method) for model in all_placements(model_type))
    for other in others:
        assert other.losses == pytest.approx(one.losses, rel=1e-5)
        for mine, theirs in zip(one.updates, other.updates, strict=True):
            assert type(mine) is type(theirs) and mine.layer == theirs.layer
            for name in TENSORS[type(mine)]:
                torch.testing.assert_close(getattr(theirs, name), getattr(mine, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ALL_MODELS)
def test_parts_lie_where_they_were_put(model_type: str) -> None:
    """Each block is on its device and everything else on the main device, tied weights included."""
    model = spread_model(model_type)
    assert model.device == MAIN and model.block_devices == list(DEVICES)
    inside = {id(t) for block in model.blocks for t in (*block.parameters(), *block.buffers())}
    outside = [t for t in (*model.model.parameters(), *model.model.buffers()) if id(t) not in inside]
    assert outside and all(device_of(t) == MAIN for t in outside)
    assert next(model.lm_head.parameters()).device == MAIN


def test_service_edits_exports_and_reverts_a_model_on_several_devices(tmp_path: Path) -> None:
    """Edits with their guard, capacity and report, a version as an adapter and as weights, and the base bytes after a
    revert: the jobs of the service run, and its version has the digest of a model on one device."""
    digests = []
    for number, model in enumerate(all_placements("llama")):
        service = SteppedService(tmp_path / str(number), model)
        edits = [service.edit(subject, "Rome") for subject in ("Eiffel", "Big Ben")]
        for file_format in ("peft", "safetensors"):
            assert service.export(file_format=file_format)["status"] == "done"
        digests.append(service.replica.digest(service.replica.head()))
        for edit in edits:
            service.services.edits.revert(edit, "key:alice")
        head = service.replica.head()
        assert service.replica.digest(head) == service.replica.digest(0)
    assert digests == digests[:1] * 3


@pytest.mark.parametrize("model_type", ALL_MODELS)
def test_scores_and_texts_are_those_of_one_device(model_type: str) -> None:
    """Scores of targets are equal up to rounding, and generated texts are equal."""
    pairs = [("The Eiffel Tower is located in the city of", "Rome"), ("Big Ben", "London")]
    results = []
    for model in all_placements(model_type):
        scores = run_to_completion(score_targets(model, pairs))
        samplings = [Sampling(max_new_tokens=3, temperature=t, seed=3) for t in (0.0, 0.7)]
        prompts = [text[:40] for text in TEXTS]
        batch = DecodingBatch(model, [new_sequence(model, text, s) for text in prompts for s in samplings])
        rows = list(batch.sequences)
        while len(batch):
            batch.step()
        results.append(([s.log_p for s in scores], [r.output_ids for r in rows]))
    (one, ids), *others = results
    for other, other_ids in others:
        assert other == pytest.approx(one, rel=1e-5) and other_ids == ids


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("model_type", TYPES)
def test_edit_of_one_layer_is_that_of_one_device(model_type: str, layer: int) -> None:
    """Statistics, losses and tensors of an edit are equal up to rounding, on whatever device its layer is."""
    parameters = RomeParameters(layers=(layer,), steps=4, stop_loss=0, bare_keys=True)
    assert_same_edit(model_type, parameters, "rome")


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("model_type", TYPES)
def test_codebook_is_that_of_one_device(model_type: str, layer: int) -> None:
    """The entry of an edit, and the score of its object with its codebook in place, are equal up to rounding, on
    whatever device its layer is."""
    parameters = GraceParameters(layers=(layer,), steps=4, stop_loss=0, radius=0.05)
    assert_same_edit(model_type, parameters, "grace")
    scores = []
    for model in all_placements(model_type):
        replica = VersionedModel(model, EmptyLedger())
        patch = replica.compose_patch(compute_edit(model, parameters, "grace").updates)
        with replica.use_patch(patch):
            scores += [s.log_p for s in run_to_completion(score_targets(model, [(STATEMENT.text, "Rome")]))]
    assert scores == pytest.approx(scores[:1] * 3, rel=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_edit_of_several_layers_is_that_of_one_device(model_type: str) -> None:
    """The same holds for layers on different devices, whose lower ones are in place when the upper ones are found."""
    assert_same_edit(model_type, RomeParameters(layers=(0, 1, 2), steps=3, stop_loss=0), "memit")


@pytest.mark.parametrize("model_type", TYPES)
def test_fine_tuning_is_that_of_one_device(model_type: str) -> None:
    """The same holds for weights that are trained."""
    assert_same_edit(model_type, FineTuneParameters(layers=(1, 2), steps=2), "ft")


@pytest.mark.parametrize("model_type", TYPES)
def test_trace_is_that_of_one_device(model_type: str) -> None:
    """The scores of both implementations of a trace are equal up to rounding."""
    for trace in (trace_statement, trace_reference):
        one, *others = (
            run_to_completion(trace(m, SHORT_STATEMENT, "Rome", samples=2, noise=0.5, severed=True)).to_json()
            for m in all_placements(model_type)
        )
        for kind, expected in one["kinds"].items():
            for other in others:
                scores = torch.tensor(other["kinds"][kind]["scores"])
                torch.testing.assert_close(scores, torch.tensor(expected["scores"]), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("model_type", TYPES)
def test_versions_have_the_bytes_of_one_device(model_type: str) -> None:
    """Edited weights lie on the devices of their layers, and the digest of a version does not depend on them."""
    digests, drifts = [], []
    for model in all_placements(model_type):
        edits = random_associations(model, 3, layers=(0, 1, 2))
        replica = VersionedModel(model, FakeLedger(edits))
        digests.append(replica.digest(3))
        patch = replica.compose_patch([u for some in edits.values() for u in some])
        assert [w.device for _, w in sorted(patch.weights.items())] == model.block_devices
        with_weights = lambda r=replica, p=patch: r.use_patch(p)  # noqa: E731
        drifts.append(run_to_completion(measure_drift(model, TEXTS, with_weights)))
    assert digests == digests[:1] * 3
    for drift in drifts[1:]:
        assert drift.loss_after == pytest.approx(drifts[0].loss_after, rel=1e-5)


def test_operation_on_two_devices_fails() -> None:
    """An operation on tensors of two fake devices fails."""
    one, other = torch.ones(2, device=MAIN), torch.ones(2, device=SECOND)
    assert one.device == MAIN and one.to(SECOND).device == SECOND
    with pytest.raises(RuntimeError, match="tensors on"):
        _ = one + other
