"""The engine loop: versions, interleaving, failures, cancellation, stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fakes import MemoryDesk, ShuffledReplica, heard, pieces
from tiny import tiny

from service.errors import Conflict, LeaseLost, Unavailable
from service.jobs.broker import Event
from service.jobs.desk import RunningJob
from service.jobs.memory import MemoryBroker
from service.progress import Progress, Steps
from service.requests import CompareRequest, GenerateRequest, Sampling
from service.serving.engine import Engine, Pace
from service.serving.generation import Batch, next_tokens, row

torch.set_num_threads(1)

PROMPTS = ["The Eiffel Tower is located in the city of", "Big Ben", "In which country is Mount Fuji?"]
BRISK = Pace(wait=0.01, look=0.0, follow=0.0, grace=5.0)


class House:
    """An engine with its surroundings, turned by hand."""

    def __init__(
        self, tasks: dict[str, Any] | None = None, pace: Pace = BRISK, model_type: str = "gpt2"
    ) -> None:
        self.replica = ShuffledReplica(tiny(model_type))
        self.desk = MemoryDesk()
        self.broker = MemoryBroker()
        self.engine = Engine(self.replica, self.desk, self.broker, tasks or {}, pace)  # type: ignore[arg-type]

    def generate(self, **asked: Any) -> str:
        return self.broker.call("generate", GenerateRequest(**asked).model_dump(mode="json"))

    def compare(self, **asked: Any) -> str:
        return self.broker.call("compare", CompareRequest(**asked).model_dump(mode="json"))

    def job(self, job_id: str, kind: str = "edit") -> str:
        self.desk.add(job_id, kind)
        self.broker.announce(job_id, kind)
        return job_id

    def turn(self, count: int | None = None) -> None:
        """Some turns, or as many as there is something to do."""
        turns = 0
        while self.engine.turn() if count is None else turns < count and (self.engine.turn() or True):
            turns += 1
            assert turns < 2000

    def end(self, channel: str) -> Event:
        return heard(self.broker, channel)[-1]

    def alone(self, prompt: str, version: int, asked: Sampling) -> list[int]:
        batch = Batch(self.replica.base, [row(self.replica.base, prompt, asked)])
        (r,) = batch.rows
        with self.replica.stand(self.replica.weights(version)):
            while len(batch):
                batch.step()
        return r.said


def steps(
    count: int, log: list[str] | None = None, end: Callable[[], None] | None = None
) -> Callable[[RunningJob], Steps[None]]:
    """A job of some steps."""

    def task(_job: RunningJob) -> Steps[None]:
        for i in range(count):
            if log is not None:
                log.append("job")
            yield Progress("work", i + 1, count)
        if end is not None:
            end()

    return task


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama"])
def test_versions_never_mix(model_type: str) -> None:
    """Requests on three versions at once each give the text of their version alone, and say which it was."""
    house = House(model_type=model_type)
    asked = Sampling(max_new_tokens=12, temperature=0.8, seed=5)
    channels = {}
    for prompt in PROMPTS:
        for version in (0, 1, 2):
            channels[prompt, version] = house.generate(prompt=prompt, version=version, **asked.model_dump())
            house.turn(1)  # so that they join one by one
    house.turn()
    for (prompt, version), channel in channels.items():
        end = house.end(channel).data
        assert end["version"] == version
        assert end["choices"][0]["tokens"] == house.alone(prompt, version, asked)
    texts = {tuple(house.alone(PROMPTS[0], v, asked)) for v in (0, 1, 2)}
    assert len(texts) == 3


def test_a_generation_is_pinned_when_it_is_admitted() -> None:
    """An edit that lands meanwhile changes the next request and not the running one."""
    house = House()
    house.replica.ledger.version = 1  # type: ignore[attr-defined]
    first = house.generate(prompt=PROMPTS[0], max_new_tokens=10)
    house.turn(3)
    house.replica.ledger.version = 2  # type: ignore[attr-defined]
    second = house.generate(prompt=PROMPTS[0], max_new_tokens=10)
    house.turn()
    asked = Sampling(max_new_tokens=10)
    for channel, version in ((first, 1), (second, 2)):
        end = house.end(channel).data
        assert end["version"] == version
        assert end["choices"][0]["tokens"] == house.alone(PROMPTS[0], version, asked)


def test_between_steps_the_model_is_the_base() -> None:
    """Whatever is being answered, the model holds its base bytes whenever the loop is between two steps."""
    house = House()
    base = house.replica.base.weight(1).data.clone()
    house.generate(prompt=PROMPTS[0], max_new_tokens=6, version=2)
    for _ in range(8):
        house.engine.turn()
        assert torch.equal(house.replica.base.weight(1).data, base)


def test_many_prompts_and_a_stream() -> None:
    """Each prompt of a request has its index, its pieces make its text, and each speaks as if it had been asked alone."""
    house = House()
    asked = Sampling(max_new_tokens=9, temperature=1.0, seed=3)
    channel = house.generate(prompts=PROMPTS, stream=True, version="base", **asked.model_dump())
    house.turn()
    events = heard(house.broker, channel)
    end = events[-1]
    assert end.name == "end"
    for i, choice in enumerate(end.data["choices"]):
        assert choice["tokens"] == house.alone(PROMPTS[i], 0, asked)
        assert "".join(pieces(events, i)) == choice["text"]
        assert choice["finish_reason"] in ("stop", "length")
    assert {e.data["version"] for e in events} == {0}
    assert end.data["usage"]["completion_tokens"] == sum(len(c["tokens"]) for c in end.data["choices"])
    assert end.data["usage"]["prompt_tokens"] == sum(len(house.replica.base.encode(p)[0]) for p in PROMPTS)


def test_tokens_are_told_only_to_those_who_stream() -> None:
    """A request without stream has one event: its end."""
    house = House()
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=5)
    house.turn()
    assert [e.name for e in heard(house.broker, channel)] == ["end"]


def test_more_rows_than_there_is_room_for() -> None:
    """Requests beyond the room wait, and all are answered as if alone."""
    house = House(pace=Pace(rows=3, wait=0.01, look=0.0, follow=0.0))
    asked = Sampling(max_new_tokens=5)
    channels = [house.generate(prompts=PROMPTS * 3, **asked.model_dump()) for _ in range(3)]
    house.turn()
    wanted = [house.alone(p, 2, asked) for p in PROMPTS * 3]
    for channel in channels:
        assert [c["tokens"] for c in house.end(channel).data["choices"]] == wanted


def test_requests_that_come_together_are_read_together() -> None:
    """Prompts that wait at the same time, of whatever request, are read in one pass."""
    house = House()
    passes: list[int] = []
    hook = house.replica.base.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for prompt in PROMPTS * 3:
        house.generate(prompt=prompt, max_new_tokens=3)
    house.turn()
    hook.remove()
    assert passes == [9, 9, 9]


def test_a_decode_step_between_two_steps_of_a_job() -> None:
    """Between two steps of a job every live batch gets a decode step."""
    log: list[str] = []
    house = House({"edit": steps(10, log)})
    for version in (0, 1):
        house.generate(prompt=PROMPTS[0], max_new_tokens=30, version=version)
    house.turn(3)
    model = house.replica.base.model
    handle = model.register_forward_hook(lambda *_: log.append("decode"))
    house.job("edit_1")
    house.turn(10)
    handle.remove()
    assert log == ["decode", "decode", "job"] * 10


def test_jobs_run_one_after_another_and_tell_their_progress() -> None:
    """A job's steps are told in order; the next begins after its end."""
    house = House({"edit": steps(2), "trace": steps(1)})
    house.job("trace_1", "trace")
    house.job("edit_1")
    house.job("edit_2")
    house.turn()
    assert house.desk.told == [
        ("progress", "edit_1", 1),
        ("progress", "edit_1", 2),
        ("progress", "edit_2", 1),
        ("progress", "edit_2", 2),
        ("progress", "trace_1", 1),
    ]
    assert house.broker.take(("edit", "trace"), 5, 0) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("a secret path"), "the worker met an error"),
        (Conflict("head moved."), "head moved."),
        (LeaseLost("taken over."), None),
    ],
)
def test_a_failing_job_fails_alone(error: Exception, told: str | None) -> None:
    """A job that raises is reported in the house's words, and everything else goes on."""

    def fail() -> None:
        raise error

    house = House({"edit": steps(2, end=fail), "trace": steps(1)})
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=8)
    house.job("edit_1")
    house.job("trace_1", "trace")
    house.turn()
    failed = [t for t in house.desk.told if t[0] == "failed"]
    assert [t[1] for t in failed] == ([] if told is None else ["edit_1"])
    assert told is None or failed[0][2].startswith(told)
    assert ("progress", "trace_1", 1) in house.desk.told
    assert house.end(channel).name == "end"


def test_a_job_that_finds_something_down_is_tried_again() -> None:
    """A job interrupted by an outage is put back, and fails when it meets the outage again and again."""

    def down() -> None:
        raise Unavailable("the database does not answer.")

    house = House({"edit": steps(1, end=down)})
    for _ in range(3):
        house.job("edit_1")
        house.turn()
    assert [t[0] for t in house.desk.told if t[0] != "progress"] == ["released", "released", "failed"]


def test_a_cancelled_job_ends_between_two_steps() -> None:
    """A job whose cancellation is asked for ends as cancelled at its next step."""
    house = House({"edit": steps(100)})
    house.job("edit_1")
    house.turn(3)
    house.desk.cancelled.add("edit_1")
    house.turn()
    assert house.desk.told[-1] == ("cancelled", "edit_1", None)
    assert len(house.desk.told) == 4


def test_a_cancelled_generation_ends_and_frees_its_place() -> None:
    """When the client goes its rows leave the batch, its neighbour's text is as if alone."""
    house = House()
    gone = house.generate(prompts=PROMPTS[:2], max_new_tokens=40)
    stays = house.generate(prompt=PROMPTS[2], max_new_tokens=10)
    house.turn(4)
    house.broker.cancel(gone)
    house.turn()
    choices = house.end(gone).data["choices"]
    assert [c["finish_reason"] for c in choices] == ["cancelled", "cancelled"]
    assert all(0 < len(c["tokens"]) < 6 for c in choices)
    tokens = house.end(stays).data["choices"][0]["tokens"]
    assert tokens == house.alone(PROMPTS[2], 2, Sampling(max_new_tokens=10))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": "Big Ben", "version": 9}, "version 9 does not exist"),
        ({"prompt": "Big Ben", "min_version": 9}, "min_version 9"),
        ({"prompt": "Big Ben " * 60}, "positions"),
        ({}, "prompt"),
    ],
)
def test_a_bad_request_fails_alone(asked: dict[str, Any], said: str) -> None:
    """A request that cannot be answered is told why, and its neighbour is answered."""
    house = House()
    bad = house.generate(**asked)
    good = house.generate(prompt=PROMPTS[0], max_new_tokens=4)
    house.turn()
    error = house.end(bad)
    assert error.name == "error"
    assert said in error.data["detail"]
    assert house.end(good).name == "end"


def test_a_payload_that_is_no_request_is_refused() -> None:
    """What the worker cannot read is answered with an error, not with silence."""
    house = House()
    channel = house.broker.call("generate", {"nonsense": 1})
    house.turn()
    assert house.end(channel).name == "error"


def test_a_row_that_breaks_the_pass_fails_alone() -> None:
    """When a pass fails its rows are tried one by one: only the one that fails alone is lost."""
    house = House()
    bad, *good = (house.generate(prompt=p, max_new_tokens=8, version="base") for p in PROMPTS)
    house.turn(4)
    poison = house.replica.base.encode(PROMPTS[0])[0]

    def fail(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        if len(mask) > 1 or kwargs["input_ids"][0, : len(poison)].tolist() == poison:
            raise RuntimeError("out of memory")

    handle = house.replica.base.model.register_forward_pre_hook(fail, with_kwargs=True)
    house.turn(2)
    handle.remove()
    house.turn()
    assert house.end(bad).name == "error"
    for prompt, channel in zip(PROMPTS[1:], good, strict=True):
        tokens = house.end(channel).data["choices"][0]["tokens"]
        assert tokens == house.alone(prompt, 0, Sampling(max_new_tokens=8))


def test_a_model_that_says_no_numbers_is_an_error() -> None:
    """Logits that are not numbers end the request with an error, never with text."""
    house = House()
    house.replica._weights[2] = {1: torch.full_like(house.replica.base.weight(1).data, float("nan"))}
    broken = house.generate(prompts=PROMPTS, max_new_tokens=8, version=2)
    fine = house.generate(prompt=PROMPTS[0], max_new_tokens=8, version=1)
    house.turn()
    assert house.end(broken).name == "error"
    assert house.end(fine).name == "end"


def test_compare_gives_both_texts_and_the_tokens_that_differ() -> None:
    """Both sides say what their version says alone, and the differences are those of the two distributions."""
    house = House()
    asked = Sampling(max_new_tokens=7)
    channel = house.compare(prompt=PROMPTS[0], versions=("base", "head"), top=5, **asked.model_dump())
    house.turn()
    end = house.end(channel)
    assert end.name == "end"
    assert [s["version"] for s in end.data["sides"]] == [0, 2]
    for side in end.data["sides"]:
        assert side["tokens"] == house.alone(PROMPTS[0], side["version"], asked)
    ids = house.replica.base.encode(PROMPTS[0])[0]
    p = []
    for version in (0, 2):
        with house.replica.stand(house.replica.weights(version)):
            p.append(next_tokens(house.replica.base, ids))
    assert end.data["total_variation"] == pytest.approx(float((p[0] - p[1]).abs().sum() / 2))
    gaps = [abs(n["p"][0] - n["p"][1]) for n in end.data["next_tokens"]]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == pytest.approx(float((p[0] - p[1]).abs().max()))
    assert len(gaps) == 5
    for n in end.data["next_tokens"]:
        assert n["p"] == [float(p[0][n["id"]]), float(p[1][n["id"]])]


def test_compare_of_a_version_with_itself_finds_nothing() -> None:
    """A version does not differ from itself."""
    house = House()
    channel = house.compare(prompt=PROMPTS[1], versions=(1, 1), max_new_tokens=3)
    house.turn()
    data = house.end(channel).data
    assert data["total_variation"] == 0
    assert data["sides"][0] == data["sides"][1]


def test_comparisons_end_when_cancelled_or_impossible() -> None:
    """A comparison can be cancelled, and one of an unknown version is refused."""
    house = House()
    unknown = house.compare(prompt=PROMPTS[0], versions=(0, 9))
    gone = house.compare(prompt=PROMPTS[0], max_new_tokens=40)
    house.turn(3)
    house.broker.cancel(gone)
    house.turn()
    assert house.end(unknown).name == house.end(gone).name == "error"


def test_the_replica_follows_the_ledger() -> None:
    """When the head moves, the engine builds it and attests to its digest."""
    house = House()
    house.engine.turn()
    assert house.engine.position == (2, house.replica.digest(2))
    house.replica.ledger.version = 3  # type: ignore[attr-defined]
    house.engine.turn()
    assert house.engine.position == (3, house.replica.digest(3))
    assert [v for v, _ in house.desk.attested] == [2, 3]


def test_stopping_hands_the_job_back_and_lets_generations_end() -> None:
    """On stop a running job waits again with nothing half done, and what is being said is said to its end."""
    house = House({"edit": steps(1000)})
    house.job("edit_1")
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=20)
    house.turn(3)
    stop = threading.Event()
    stop.set()
    house.engine.run(stop)
    assert house.desk.told[-1] == ("released", "edit_1")
    assert house.end(channel).data["choices"][0]["finish_reason"] == "length"


def test_stopping_without_grace_gives_back_what_was_not_begun() -> None:
    """Without time to end, a begun generation is refused with a reason and one not begun waits for another worker."""
    house = House(pace=Pace(rows=1, wait=0.01, grace=0.0))
    begun = house.generate(prompts=[PROMPTS[0]], max_new_tokens=20)
    house.turn(3)
    house.generate(prompt=PROMPTS[1])
    house.compare(prompt=PROMPTS[1], max_new_tokens=30)
    house.turn(1)
    stop = threading.Event()
    stop.set()
    house.engine.run(stop)
    assert "stopping" in house.end(begun).data["detail"]
    assert house.broker.waiting("generate") == 1
    assert house.broker.waiting("compare") == 1


def test_what_could_not_be_told_is_told_later() -> None:
    """When the broker is down for a while nothing is lost: the loop raises, and goes on where it was."""
    house = House()
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=6, stream=True)
    house.turn(2)
    publish, fails = house.broker.publish, iter([True, True, False])

    def flaky(*args: Any, **kwargs: Any) -> None:
        if next(fails, False):
            raise ConnectionError("the broker is down")
        publish(*args, **kwargs)

    house.broker.publish = flaky  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(ConnectionError):
            house.engine.turn()
    house.turn()
    events = heard(house.broker, channel)
    assert "".join(pieces(events)) == events[-1].data["choices"][0]["text"]
    assert events[-1].data["choices"][0]["tokens"] == house.alone(PROMPTS[0], 2, Sampling(max_new_tokens=6))


def test_an_idle_loop_wakes_for_a_call() -> None:
    """A loop that sleeps answers a call that comes in, and ends when it is stopped."""
    house = House(pace=Pace(wait=30.0))
    stop = threading.Event()
    thread = threading.Thread(target=house.engine.run, args=(stop,))
    thread.start()
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=3)
    assert house.end(channel).name == "end"
    stop.set()
    house.broker.wake()
    thread.join(10)
    assert not thread.is_alive()
