"""Generations and comparisons of versions that route prompts: service.engine.call_runner, service.engine.comparison."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from service.engine.versioned_model import VersionedModel
from service.kit.steps import Phase, Progress, Stepper
from service.patches.patch import BASE, PatchSet
from service.patches.record_patch import RecordPatch
from service.records.record_router import RecordRouter
from service.schemas import Sampling, WorkerGenerateRequest
from tests.support.fakes import SettableLedger
from tests.support.scopes import random_classifier, record_of
from tests.support.tiny_models import tiny
from tests.unit.service.engine.test_engine import EngineHarness

PROMPTS = ("Big Ben can be found in", "The mother tongue of Marie Curie was", "Mount Fuji rises in")
SUBJECTS = ("Big Ben", "Marie Curie", "Mount Fuji")
STATEMENTS = [f"{prompt} Rome.\n" for prompt in PROMPTS]


class RoutingModel(VersionedModel):
    """A versioned model whose version v has the records of the first v facts."""

    def __init__(self) -> None:
        self.settable_ledger = SettableLedger(3)
        super().__init__(tiny(), self.settable_ledger, self.settable_ledger.attest)
        classifier = random_classifier(self.base.hidden_size, layer=1)
        self.records = [
            record_of(self.base, classifier, f"edit_{i}", s, p, "Rome", (s,), 1.0)
            for i, (s, p) in enumerate(zip(SUBJECTS, PROMPTS, strict=True))
        ]

    def _compose_version(self, version: int) -> Stepper[PatchSet]:
        yield Progress(Phase.COMPOSE, 1, 1)
        if version == 0:
            return BASE
        return PatchSet(records=RecordPatch(RecordRouter(self.base, self.records[:version])))


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> EngineHarness:
    """An engine whose versions route prompts."""
    monkeypatch.setattr(
        "tests.unit.service.engine.test_engine.ShuffledVersionedModel", lambda _model: RoutingModel()
    )
    return EngineHarness()


def generate(harness: EngineHarness, **fields: Any) -> str:
    request = WorkerGenerateRequest.model_validate(fields).model_dump(mode="json")
    return str(harness.broker.send_call("generate", request))


def expected_tokens(harness: EngineHarness, number: int, version: int, sampling: Sampling) -> list[int]:
    """What the base model says after a prompt, with its statement before it where the version has it."""
    statement = STATEMENTS[number] if number < version else ""
    return harness.tokens_alone(statement + PROMPTS[number], 0, sampling)


def test_each_generation_is_routed_by_its_own_version(harness: EngineHarness) -> None:
    """Concurrent requests for several versions, routed or not, have the tokens of their own version."""
    sampling = Sampling(max_new_tokens=8, temperature=0.8, seed=5)
    channels: dict[tuple[int, int], str] = {}
    for number, prompt in enumerate(PROMPTS):
        for version in (0, 1, 3):
            channels[number, version] = generate(
                harness, prompt=prompt, version=version, **sampling.model_dump()
            )
            harness.step(1)
    harness.step()
    for (number, version), channel in channels.items():
        end = harness.end_event(channel).data
        assert end["version"] == version
        assert end["choices"][0]["tokens"] == expected_tokens(harness, number, version, sampling)
        assert end["choices"][0].get("edit") == (f"edit_{number}" if number < version else None)
        assert end["usage"]["prompt_tokens"] == len(harness.replica.base.encode(PROMPTS[number])[0])


def test_prompts_of_one_request_are_routed_one_by_one(harness: EngineHarness) -> None:
    """Each prompt of a request has its own route, also several choices of it."""
    sampling = Sampling(max_new_tokens=4, temperature=0)
    channel = generate(
        harness, prompts=list(PROMPTS), n=2, independent_seeds=True, version=2, **sampling.model_dump()
    )
    harness.step()
    choices = harness.end_event(channel).data["choices"]
    expected = [expected_tokens(harness, i, 2, sampling) for i in range(3) for _ in range(2)]
    assert [c["tokens"] for c in choices] == expected


def test_echo_and_log_probabilities_are_those_of_the_prompt(harness: EngineHarness) -> None:
    """A routed request echoes its prompt without the statement, and the log-probabilities of its tokens are those
    after the statement."""
    fields: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0.0, "echo": True, "logprobs": 1}
    routed = generate(harness, prompt=PROMPTS[0], version=1, **fields)
    plain = generate(harness, prompt=STATEMENTS[0] + PROMPTS[0], version=0, **fields)
    harness.step()
    (one,), (other,) = (harness.end_event(c).data["choices"] for c in (routed, plain))
    assert one["text"] == other["text"].removeprefix(STATEMENTS[0])
    count = len(one["logprobs"]["tokens"])
    assert one["logprobs"]["tokens"] == other["logprobs"]["tokens"][-count:]
    got, expected = one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"][-count:]
    assert got[0] is None and got[1:] == pytest.approx(expected[1:], abs=1e-5)


def test_a_prompt_without_room_for_its_statement_is_refused(harness: EngineHarness) -> None:
    """A prompt that fits the positions, but not together with its statement, ends with an error that says by how
    much; at the base version it is answered, and other requests go on."""
    model, replica = harness.replica.base, harness.replica
    assert isinstance(replica, RoutingModel)
    replica.records[0] = replace(replica.records[0], names=(), threshold=1e-300)
    long_prompt = (model.encode(PROMPTS[0])[0] * 20)[:55]
    refused = generate(harness, tokens=[long_prompt], version=1, max_new_tokens=2)
    answered = generate(harness, tokens=[long_prompt], version=0, max_new_tokens=2)
    other = generate(harness, prompt=PROMPTS[1], version=1, max_new_tokens=2)
    harness.step()
    error = harness.end_event(refused)
    assert error.name == "error" and "shorten the prompt by" in error.data["detail"]
    assert harness.end_event(answered).name == harness.end_event(other).name == "end"


def test_sides_of_a_comparison_are_routed_by_their_versions(harness: EngineHarness) -> None:
    """One side reads the statement, the other one does not, and the distributions are those of both."""
    compared = harness.compare(prompt=PROMPTS[0], versions=(0, 1), max_new_tokens=4, temperature=0.0)
    same = harness.compare(prompt=PROMPTS[2], versions=(0, 1), max_new_tokens=4, temperature=0.0)
    harness.step()
    sampling = Sampling(max_new_tokens=4, temperature=0)
    sides = harness.end_event(compared).data["sides"]
    assert [s["tokens"] for s in sides] == [expected_tokens(harness, 0, v, sampling) for v in (0, 1)]
    assert harness.end_event(compared).data["total_variation"] > 0
    assert harness.end_event(same).data["total_variation"] == 0


def test_a_step_routes_one_prompt(harness: EngineHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts of a large request are routed in steps of one prompt each, between which other requests decode, and
    none is routed twice."""
    routed: list[int] = []
    route = RecordRouter.route

    def noted(router: RecordRouter, ids: Any) -> Any:
        routed.append(len(ids))
        return route(router, ids)

    harness.replica.patch(1)
    monkeypatch.setattr(RecordRouter, "route", noted)
    calls = harness.engine._calls
    channel = generate(harness, prompts=[PROMPTS[0]] * 6, independent_seeds=True, version=1, max_new_tokens=2)
    (delivery,) = harness.broker.receive(["generate"], 1, 1.0)
    calls.start(delivery)
    counts = []
    while calls.pending:
        calls.step()
        counts.append(len(routed))
    assert counts == [1, 2, 3, 4, 5, 6]
    harness.step()
    assert len(harness.end_event(channel).data["choices"]) == 6 == len(routed)
