"""Gates of edits and the keys at which they stay closed: service.gating.gate_reference."""

from __future__ import annotations

import torch

from service.covariance.second_moment import KeyStatistics
from service.gating.gate_reference import GateReference, collect_gate_reference, most_different
from service.kit.steps import run_to_completion
from service.models.hooks import capture
from service.models.loading import LoadedModel
from service.weights.gate_space import build_gate_space
from tests.support.tiny_models import tiny

LAYER = 1
TEXTS = ["The tower stands in Rome.", "Many people know that the river is long."]
SUBJECTS = ["Oslo", "New York", "York"]


def statistics_of(model: LoadedModel) -> KeyStatistics:
    spread = torch.randn(model.intermediate_size, 200, generator=torch.Generator().manual_seed(1))
    moment = (spread @ spread.T / 200).double()
    return KeyStatistics(LAYER, moment, 200, 1e-2, "digest")


def keys_of(model: LoadedModel, text: str) -> torch.Tensor:
    """The keys of all tokens of a text, by one pass."""
    with torch.no_grad(), capture({0: model.down_proj(LAYER)}, "input") as captured:
        model.model(input_ids=torch.tensor([model.encode(text)[0]]))
    return captured[0][0]


def reference_of(model: LoadedModel) -> GateReference:
    return run_to_completion(collect_gate_reference(model, statistics_of(model), TEXTS, SUBJECTS))


def test_the_reference_has_all_tokens_of_texts_and_the_last_of_subjects() -> None:
    """The keys are those of separate passes, and each has its source."""
    model = tiny()
    reference = reference_of(model)
    lengths = [len(model.encode(text)[0]) for text in TEXTS]
    assert reference.text_keys == sum(lengths)
    assert reference.sources[: reference.text_keys] == [TEXTS[0]] * lengths[0] + [TEXTS[1]] * lengths[1]
    expected = reference.space.project(torch.cat([keys_of(model, text) for text in TEXTS]))
    torch.testing.assert_close(reference.keys[: reference.text_keys], expected, rtol=1e-4, atol=1e-4)
    names = dict(
        zip(reference.sources[reference.text_keys :], reference.keys[reference.text_keys :], strict=True)
    )
    assert set(names) == set(SUBJECTS)
    for name, key in names.items():
        own = reference.space.project(keys_of(model, name)[-1])
        torch.testing.assert_close(key, own, rtol=1e-4, atol=1e-4)


def make_reference(
    sources: list[str], text_keys: int, cosines: list[float]
) -> tuple[GateReference, torch.Tensor]:
    """A reference whose keys have these cosines with one key, which is returned, too."""
    model = tiny()
    space = build_gate_space(statistics_of(model))
    own = torch.randn(model.intermediate_size, generator=torch.Generator().manual_seed(5))
    q = space.project(own)
    other = torch.nn.functional.normalize(
        torch.randn(len(q), generator=torch.Generator().manual_seed(6)), dim=0
    )
    other = torch.nn.functional.normalize(other - (other @ q) * q, dim=0)
    keys = torch.stack([c * q + (1 - c * c) ** 0.5 * other for c in cosines])
    return GateReference(space, keys, sources, text_keys), own[None]


def test_near_keys_of_others_are_blocked() -> None:
    """Keys that come near are blocked, the nearest first; those of the subject, and of texts that name it, are not."""
    sources = ["A text about New York.", "About nothing.", "York", "New York", "Oslo", "Rome"]
    reference, own = make_reference(sources, 2, [0.99, 0.7, 0.8, 0.97, 0.45, 0.3])
    gate = reference.build_gate(own, "New York", threshold=0.5)
    blocked = [sources[int((reference.keys @ b).argmax())] for b in gate.blocked]
    assert blocked == ["York", "About nothing.", "Oslo"]
    report = reference.describe(gate, "New York")
    assert (report.nearest_source, report.is_apart) == ("York", True)


def test_a_subject_that_cannot_be_told_apart_is_reported() -> None:
    """Where another subject is as near as the edit's own keys are to each other, the report says so."""
    reference, own = make_reference(["York"], 0, [0.95])
    scattered = torch.cat([own, own + own.norm() * torch.randn(3, own.shape[1]) / own.shape[1] ** 0.5])
    gate = reference.build_gate(scattered, "New York", threshold=0.5)
    assert not reference.describe(gate, "New York").is_apart


def test_the_keys_of_a_gate_are_those_that_differ_most() -> None:
    """Of many nearly equal keys one is kept, and the first is always kept."""
    directions = torch.eye(6)[:3]
    keys = torch.nn.functional.normalize(
        torch.cat([directions.repeat_interleave(5, 0) + 0.01 * torch.randn(15, 6)]), dim=-1
    )
    chosen = most_different(keys, 3)
    assert torch.equal(chosen[0], keys[0])
    assert sorted((chosen @ directions.T).argmax(1).tolist()) == [0, 1, 2]
    assert torch.equal(most_different(keys[:2], 8), keys[:2])
