"""The engine loop: versions, interleaving, failures, cancellation, stopping."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from service.engine.decoding import Batch, next_tokens, row
from service.engine.engine import INTERRUPTIONS, Engine, Pace
from service.errors import Conflict, Disagrees, InvalidInput, LeaseLost, Unavailable
from service.jobs.broker import CALLS, Broker, Event, Message
from service.jobs.job_store import RunningJob
from service.jobs.memory_broker import MemoryBroker
from service.jobs.redis_broker import RedisBroker
from service.kit import crash_points
from service.kit.steps import Ended, News, Progress, Steps, Told, Working
from service.models.memory_estimates import cache_bytes
from service.schemas import CompareRequest, GenerateRequest, Sampling
from tests.support import wirings
from tests.support.fakes import MemoryDesk, ShuffledReplica, heard, pieces
from tests.support.tiny_models import tiny

torch.set_num_threads(1)

PROMPTS = ["The Eiffel Tower is located in the city of", "Big Ben", "In which country is Mount Fuji?"]
BRISK = Pace(wait=0.01, look=0.0, follow=0.0, grace=5.0, share=0.0)  # a step of a job in every turn


class House:
    """An engine with its surroundings, turned by hand."""

    make_broker: Callable[[], Broker] = staticmethod(MemoryBroker)

    def __init__(
        self,
        tasks: dict[str, Any] | None = None,
        pace: Pace = BRISK,
        model_type: str = "gpt2",
        calls: Sequence[str] = CALLS,
    ) -> None:
        self.replica = ShuffledReplica(tiny(model_type))
        self.desk = MemoryDesk()
        self.broker: Any = self.make_broker()
        self.engine = Engine(self.replica, self.desk, self.broker, tasks or {}, pace, calls)  # type: ignore[arg-type]

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

    def lose(self, job_id: str) -> None:
        """Another worker has what this one took."""
        if isinstance(self.broker, RedisBroker):
            held = self.broker._holding[job_id]
            self.broker._step("done", self.broker._name, held.stream, held.entry, job_id, held.hold)
            self.broker._lose(held)
        else:
            (taken,) = (d for d in self.broker._taken.values() if d.job_id == job_id)
            del self.broker._taken[taken.id]

    def stop(self) -> None:
        stop = threading.Event()
        stop.set()
        self.engine.run(stop)

    def fails(self, name: str, *errors: Exception | None) -> None:
        """A method of the desk that raises these in turn, where there is one, before it works again."""
        works, left = getattr(self.desk, name), iter(errors)

        def flaky(*args: Any) -> Any:
            if error := next(left, None):
                raise error
            return works(*args)

        setattr(self.desk, name, flaky)

    def alone(self, prompt: str, version: int, asked: Sampling) -> list[int]:
        batch = Batch(self.replica.base, [row(self.replica.base, prompt, asked)])
        (r,) = batch.rows
        with self.replica.stand(self.replica.weights(version)):
            while len(batch):
                batch.step()
        return r.said


@pytest.fixture(autouse=True, params=wirings.BOTH)
def brokers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every house here has a broker of each wiring."""
    made: list[RedisBroker] = []

    def make() -> RedisBroker:
        made.append(RedisBroker(*wirings.redis(request).values()))
        return made[-1]

    if request.param == "production":
        monkeypatch.setattr(House, "make_broker", staticmethod(make))
    yield
    for broker in made:
        broker.close()


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
    house.replica.book.version = 1
    first = house.generate(prompt=PROMPTS[0], max_new_tokens=10)
    house.turn(3)
    house.replica.book.version = 2
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


def test_rows_wait_while_there_is_no_memory_for_their_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows decode side by side as far as the caches of all fit when all is said; the others wait, and all are answered."""
    model = tiny()
    longest = max(len(model.encode(p)[0]) for p in PROMPTS) + 10
    monkeypatch.setattr(
        "service.models.memory_estimates.room", lambda _device: 2 * cache_bytes(model, 2, longest)
    )
    house = House()
    beside: list[int] = []
    house.replica.base.model.register_forward_hook(
        lambda _module, _args, kwargs, _out: beside.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    channels = [house.generate(prompt=prompt, max_new_tokens=10) for prompt in PROMPTS * 2]
    house.turn()
    assert max(beside) == 2
    for channel, prompt in zip(channels, PROMPTS * 2, strict=True):
        tokens = house.end(channel).data["choices"][0]["tokens"]
        assert tokens == house.alone(prompt, 2, Sampling(max_new_tokens=10))


def test_an_answer_that_can_never_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device could not hold even if it held nothing else is the request's fault, and says what to change."""
    monkeypatch.setattr("service.models.memory_estimates.room", lambda _device: 1000)
    monkeypatch.setattr("service.models.memory_estimates.capacity", lambda _device: 2000)
    house = House()
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=40)
    house.turn()
    refused = house.end(channel)
    assert refused.name == "error" and refused.data["title"] == InvalidInput.title
    assert "ask for fewer tokens" in refused.data["detail"]


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


def test_a_more_urgent_job_goes_before_the_running_one() -> None:
    """An edit that comes while an evaluation runs is done between two of its steps; one that is no more urgent waits."""
    house = House({"edit": steps(2), "trace": steps(1), "evaluation": steps(3)})
    house.job("evaluation_1", "evaluation")
    house.turn(1)
    house.job("evaluation_2", "evaluation")
    house.job("trace_1", "trace")
    house.turn(1)
    house.job("edit_1")
    house.turn()
    assert house.desk.told == [
        ("progress", "evaluation_1", 1),
        ("progress", "trace_1", 1),
        ("progress", "edit_1", 1),
        ("progress", "edit_1", 2),
        ("progress", "evaluation_1", 2),
        ("progress", "evaluation_1", 3),
        *(("progress", "evaluation_2", i) for i in (1, 2, 3)),
    ]
    assert house.broker.take(("edit", "trace", "evaluation"), 5, 0) == []


def test_stopping_hands_back_what_waits_for_a_more_urgent_job() -> None:
    """On stop the running job and the one that it has interrupted both wait again, and neither takes a step more."""
    house = House({"edit": steps(9), "evaluation": steps(9)})
    house.job("evaluation_1", "evaluation")
    house.turn(1)
    house.job("edit_1")
    house.turn(1)
    house.stop()
    assert house.desk.told[-2:] == [("released", "edit_1"), ("released", "evaluation_1")]
    assert len(house.desk.told) == 4


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
    for _ in range(INTERRUPTIONS):
        house.job("edit_1")
        house.turn()
    told = [t[0] for t in house.desk.told if t[0] != "progress"]
    assert told == ["released"] * (INTERRUPTIONS - 1) + ["failed"]


def test_a_cancelled_job_ends_between_two_steps() -> None:
    """A job whose cancellation is asked for ends as cancelled at its next step."""
    house = House({"edit": steps(100)})
    house.job("edit_1")
    house.turn(3)
    house.desk.cancelled.add("edit_1")
    house.turn()
    assert house.desk.told[-1] == ("cancelled", "edit_1", None)
    assert len(house.desk.told) == 4


# jobs that are carried out together

TOGETHER = Pace(edits=4, wait=0.01, look=0.0, follow=0.0, share=0.0)


def ending(log: list[list[str]], news: Sequence[News]) -> Callable[..., Working]:
    """A task for several jobs: it notes who is carried out together and says what it is told to."""

    def task(*jobs: RunningJob) -> Working:
        log.append([job.id for job in jobs])
        yield from news

    return task


def test_waiting_edits_are_carried_out_together() -> None:
    """As many waiting edits as are allowed are begun as one; other kinds of jobs come alone."""
    log: list[list[str]] = []
    house = House({kind: ending(log, [Progress("at it", 1, 1)]) for kind in ("edit", "trace")}, TOGETHER)
    for i in range(6):
        house.job(f"edit_{i}")
    for i in range(2):
        house.job(f"trace_{i}", "trace")
    house.turn()
    assert log == [["edit_0", "edit_1", "edit_2", "edit_3"], ["edit_4", "edit_5"], ["trace_0"], ["trace_1"]]
    assert {t[1] for t in house.desk.told} == {*(f"edit_{i}" for i in range(6)), "trace_0", "trace_1"}
    assert house.broker.take(("edit", "trace"), 9, 0) == []


def test_each_worker_takes_its_share() -> None:
    """With three workers that edit, five waiting edits are not one worker's: it takes two of them."""
    log: list[list[str]] = []
    house = House({"edit": ending(log, [])}, TOGETHER)
    house.desk.workers = 3
    for i in range(5):
        house.job(f"edit_{i}")
    house.turn(1)
    assert log == [["edit_0", "edit_1"]]
    assert house.broker.waiting("edit") == 3


def test_jobs_that_run_together_end_one_by_one() -> None:
    """One ends well, one badly, with news for one and for all; each has its own end, and the last end with the steps."""
    told = [
        Progress("all", 1, 9),
        Ended("edit_1", Conflict("not this one.")),
        Told("edit_0", Progress("one", 2, 9)),
        Ended("edit_0"),
        Progress("all", 3, 9),
    ]
    log: list[list[str]] = []
    house = House({"edit": ending(log, told)}, TOGETHER)
    for i in range(3):
        house.job(f"edit_{i}")
    house.turn()
    assert house.desk.told == [
        *(("progress", f"edit_{i}", 1) for i in range(3)),
        ("failed", "edit_1", "not this one."),
        ("progress", "edit_0", 2),
        ("progress", "edit_2", 3),
    ]
    assert house.broker.take(("edit",), 9, 0) == []


def test_an_error_of_all_is_the_error_of_each_that_is_left() -> None:
    """What the steps themselves raise ends the jobs that had not ended before."""

    def task(*_jobs: RunningJob) -> Working:
        yield Ended("edit_0")
        raise Conflict("all of you.")

    house = House({"edit": task}, TOGETHER)
    for i in range(3):
        house.job(f"edit_{i}")
    house.turn()
    assert house.desk.told == [("failed", "edit_1", "all of you."), ("failed", "edit_2", "all of you.")]


def test_jobs_that_run_together_stop_when_nobody_wants_them() -> None:
    """Steps go on as long as one of the jobs is wanted, and end when all were cancelled."""
    log: list[list[str]] = []
    house = House({"edit": ending(log, [Progress("at it", i, 99) for i in range(99)])}, TOGETHER)
    for i in range(2):
        house.job(f"edit_{i}")
    house.desk.cancelled.add("edit_0")
    house.turn(5)
    assert ("progress", "edit_1", 4) in house.desk.told
    house.desk.cancelled.add("edit_1")
    house.turn()
    assert house.desk.told[-2:] == [("cancelled", "edit_0", None), ("cancelled", "edit_1", None)]


def test_stopping_hands_all_of_them_back() -> None:
    """On stop every job that runs with others and has not ended waits again."""
    log: list[list[str]] = []
    house = House(
        {"edit": ending(log, [Ended("edit_1"), *(Progress("at it", i, 99) for i in range(99))])}, TOGETHER
    )
    for i in range(3):
        house.job(f"edit_{i}")
    house.turn(4)
    house.stop()
    assert house.desk.told[-2:] == [("released", "edit_0"), ("released", "edit_2")]


def test_what_cannot_join_now_waits_again() -> None:
    """When the store goes away after the first job was begun, that one runs, and the others are begun later."""
    log: list[list[str]] = []
    house = House({"edit": ending(log, [Progress("at it", 1, 1)])}, TOGETHER)
    house.fails("start", None, DOWN)
    for i in range(3):
        house.job(f"edit_{i}")
    house.turn()
    assert log == [["edit_0"], ["edit_1", "edit_2"]]
    assert house.broker.take(("edit",), 9, 0) == []


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_calls_have_their_share_of_the_time_beside_a_job(
    monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """While a job runs whose steps are slow, decoding has its share of the time; when nobody calls, the job has it all."""
    house = House({"edit": steps(10**6)}, Pace(share=share, wait=0.01, look=0.0, follow=0.0))
    clock, spent = [0.0], {"job": 0.0, "decode": 0.0}
    monkeypatch.setattr("service.engine.engine.time.monotonic", lambda: clock[0])

    def costs(name: str, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            spent[name] += seconds
            clock[0] += seconds
            action()

        return run

    monkeypatch.setattr(house.engine, "_decode", costs("decode", 0.01, house.engine._decode))
    monkeypatch.setattr(house.engine, "_step_job", costs("job", 0.1, house.engine._step_job))
    channel = house.generate(prompts=PROMPTS, max_new_tokens=50)
    house.job("edit_1")
    while channel in {call.channel for call in house.engine._running()} or not spent["job"]:
        house.turn(1)
    assert spent["decode"] / (spent["decode"] + spent["job"]) == pytest.approx(share, abs=0.15)
    done = spent["job"]
    house.turn(5)
    assert spent["job"] == pytest.approx(done + 5 * 0.1)


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
    house.replica._weights[2] = {
        house.replica.site: torch.full_like(house.replica.base.weight(1).data, float("nan"))
    }
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
    house.replica.book.version = 3
    house.engine.turn()
    assert house.engine.position == (3, house.replica.digest(3))
    assert house.replica.book.attested == [2, 3]


def test_stopping_hands_the_job_back_and_lets_generations_end() -> None:
    """On stop a running job waits again with nothing half done, and what is being said is said to its end."""
    house = House({"edit": steps(1000)})
    house.job("edit_1")
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=20)
    house.turn(3)
    house.stop()
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
    house.stop()
    assert "stopping" in house.end(begun).data["detail"]
    assert house.broker.waiting("generate") == 1
    assert house.broker.waiting("compare") == 1


def test_what_could_not_be_told_is_told_later() -> None:
    """When the broker is down for a while nothing is lost: the loop raises, and goes on where it was."""
    house = House()
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=6, stream=True)
    house.turn(2)
    publish, fails = house.broker.publish_all, iter([True, True, False])

    def flaky(messages: Sequence[Message]) -> None:
        if next(fails, False):
            raise Unavailable("the queue does not answer.")
        publish(messages)

    house.broker.publish_all = flaky  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(Unavailable):
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


DOWN = Unavailable("the store does not answer.")


def test_what_one_step_says_is_told_in_one_go() -> None:
    """The tokens of all rows of a step, and the ends it brings, are one publication."""
    house = House()
    told: list[int] = []
    publish = house.broker.publish_all
    house.broker.publish_all = lambda messages: told.append(len(messages)) or publish(messages)  # type: ignore[method-assign, func-returns-value]
    for prompt in PROMPTS:
        house.generate(prompt=prompt, max_new_tokens=2, stream=True, version="base")
    house.turn()
    assert len(told) == 2
    assert told[-1] >= len(PROMPTS)


def test_a_worker_takes_only_what_it_is_for() -> None:
    """Without the calls in its roles a worker leaves them to others, and without a task a job."""
    house = House({"edit": steps(1)}, calls=())
    house.generate(prompt=PROMPTS[0])
    house.job("trace_1", "trace")
    house.job("edit_1")
    house.turn()
    assert [house.broker.waiting(kind) for kind in ("generate", "trace", "edit")] == [1, 1, 0]


def test_a_call_that_was_taken_over_is_dropped() -> None:
    """Of a generation or comparison that is another worker's by now nothing more is said; its neighbour is answered."""
    house = House()
    lost = [house.generate(prompt=PROMPTS[0], max_new_tokens=30), house.compare(prompt=PROMPTS[0])]
    stays = house.generate(prompt=PROMPTS[1], max_new_tokens=6)
    house.turn(3)
    for channel in lost:
        house.lose(channel)
    house.turn()
    assert house.end(stays).data["choices"][0]["tokens"] == house.alone(
        PROMPTS[1], 2, Sampling(max_new_tokens=6)
    )
    for channel in lost:
        house.broker.publish(channel, "end", {"from": "another worker"}, last=True)
        assert [event.data for event in heard(house.broker, channel)] == [{"from": "another worker"}]


def test_a_lost_call_that_comes_back_is_answered_anew() -> None:
    """A call that was lost while the process was frozen, and is given to it again, is answered once and whole."""
    house = House(pace=Pace(wait=0.01, look=60.0, follow=0.0))
    channel = house.generate(prompt=PROMPTS[0], max_new_tokens=12)
    house.turn(3)
    house.lose(channel)
    house.broker.call(
        "generate", GenerateRequest(prompt=PROMPTS[0], max_new_tokens=12).model_dump(), "", channel
    )
    house.turn()
    (end,) = heard(house.broker, channel)
    assert end.data["choices"][0]["tokens"] == house.alone(PROMPTS[0], 2, Sampling(max_new_tokens=12))


def test_a_job_goes_on_without_its_lease() -> None:
    """The attempt in its row is a job's fence: that the broker gave its bell to another changes nothing."""
    house = House({"edit": steps(5)})
    house.job("edit_1")
    house.turn(2)
    house.lose("edit_1")
    house.turn()
    assert house.desk.told == [("progress", "edit_1", i) for i in range(1, 6)]


def test_a_job_that_was_taken_over_is_dropped() -> None:
    """A worker that hears that its job is another's throws it away, and does the next."""
    house = House({"edit": steps(5), "trace": steps(1)})
    house.fails("progress", None, LeaseLost("taken over."))
    house.job("edit_1")
    house.job("trace_1", "trace")
    house.turn()
    assert house.desk.told == [("progress", "edit_1", 1), ("progress", "trace_1", 1)]


def test_every_version_is_attested_to_before_it_speaks() -> None:
    """A version, pinned or head, is vouched for once, and before the first token from it."""
    house = House()
    for version in (1, 1, "base", "head"):
        house.generate(prompt=PROMPTS[0], version=version, max_new_tokens=2)
    house.compare(prompt=PROMPTS[0], versions=(0, 1), max_new_tokens=2)
    house.turn()
    assert sorted(house.replica.book.attested) == [0, 1, 2]


def test_a_worker_that_disagrees_serves_nothing_of_it() -> None:
    """A dispute ends the loop: the request goes back unanswered, the job too, and what was agreed upon is said to its end."""
    house = House({"edit": steps(1000)})
    house.job("edit_1")
    agreed = house.generate(prompt=PROMPTS[0], max_new_tokens=10)
    house.turn(3)
    house.replica.book.disputed = {1}
    house.generate(prompt=PROMPTS[0], version=1)
    with pytest.raises(Disagrees):
        house.engine.run(threading.Event())
    assert house.broker.waiting("generate") == 1
    assert house.desk.told[-1] == ("released", "edit_1")
    assert house.end(agreed).data["choices"][0]["finish_reason"] == "length"


def test_an_edit_that_makes_replicas_disagree_ends_the_loop() -> None:
    """A dispute at the new head is no reason to go on at the old one."""
    house = House()
    house.turn(1)
    house.replica.book.version, house.replica.book.disputed = 3, {3}
    with pytest.raises(Disagrees):
        house.engine.run(threading.Event())


def test_requests_wait_while_the_store_is_down() -> None:
    """A request that cannot be pinned now is not refused: all that were taken with it wait again, in their order."""
    house = House()
    house.turn(1)
    channels = [house.generate(prompt=p, max_new_tokens=3) for p in PROMPTS]
    head = house.replica.head
    house.replica.head = fallen  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(Unavailable):
            house.engine.turn()
    assert house.broker.waiting("generate") == 3
    house.replica.head = head  # type: ignore[method-assign]
    house.turn()
    assert [house.end(c).name for c in channels] == ["end"] * 3


def fallen() -> int:
    raise DOWN


def test_a_job_waits_while_the_store_is_down() -> None:
    """A job that cannot be begun now is begun later."""
    house = House({"edit": steps(1)})
    house.fails("start", DOWN)
    house.job("edit_1")
    with pytest.raises(Unavailable):
        house.engine.turn()
    house.turn()
    assert house.desk.told == [("progress", "edit_1", 1)]


def test_a_running_job_outlives_an_outage() -> None:
    """When its progress cannot be told for a while the job stands still, and then goes on where it was."""
    house = House({"edit": steps(4)})
    house.fails("progress", None, DOWN, DOWN)
    house.job("edit_1")
    for _ in range(2):
        with pytest.raises(Unavailable):
            house.turn()
    house.turn()
    assert house.desk.told == [("progress", "edit_1", i) for i in range(1, 5)]


@pytest.mark.parametrize("name", ["start", "progress", "fail"])
def test_an_error_that_nobody_foresaw_does_not_stop_the_loop(name: str) -> None:
    """A row that the desk cannot read or write is one job's trouble: the others are done."""

    def fail() -> None:
        raise Conflict("head moved.")

    house = House({"edit": steps(1, end=fail), "trace": steps(1)})
    house.fails(name, ValueError("an odd row"))
    house.job("edit_1")
    house.job("trace_1", "trace")
    house.turn()
    assert house.desk.told[-1] == ("progress", "trace_1", 1)
    assert house.desk.abandoned == (["edit_1"] if name == "fail" else [])


def test_whoever_wakes_the_loop_has_news_of_the_ledger() -> None:
    """A sleeping loop that is woken without work looks at the head at once, however rarely it does otherwise."""
    house = House(pace=Pace(wait=30.0, follow=3600.0))
    stop = threading.Event()
    thread = threading.Thread(target=house.engine.run, args=(stop,))
    thread.start()
    assert house.end(house.generate(prompt=PROMPTS[0], max_new_tokens=1)).data["version"] == 2
    house.replica.book.version = 3
    pause = threading.Event()
    while house.engine.position is None or house.engine.position[0] != 3:
        house.broker.wake()
        pause.wait(0.01)
    stop.set()
    house.broker.wake()
    thread.join(10)
    assert not thread.is_alive()


def test_what_is_left_goes_to_another_worker() -> None:
    """Where there are other workers a generation that cannot end in time is handed back too, though a part was heard."""
    house = House(pace=Pace(rows=2, wait=0.01, grace=0.0))
    house.desk.sole = False
    channels = [house.generate(prompt=p, max_new_tokens=20, stream=True) for p in PROMPTS[:2]]
    house.turn(3)
    house.stop()
    assert {d.job_id for d in house.broker.take(("generate",), 5, 0)} == set(channels)


def test_the_crash_points_stand_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation and a job pass their points in the order of what happens between them."""
    passed: list[str] = []
    monkeypatch.setattr(crash_points, "reach", passed.append)
    house = House({"edit": steps(1)})
    house.generate(prompt=PROMPTS[0], max_new_tokens=2, version="base")
    house.turn()
    assert passed == [
        "take.after",
        "generate.after_admit",
        "generate.after_token",
        "generate.before_end",
        "generate.after_end",
        "done.after",
        "generate.after_token",
    ]
    passed.clear()
    house.job("edit_1")
    house.turn()
    assert passed == ["take.after", "end.after_publish", "done.after"]


def test_the_log_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    """What is logged of a call bears the id of the HTTP request that asked for it."""
    caplog.set_level("INFO")
    house = House()
    asked = GenerateRequest(prompt=PROMPTS[0], max_new_tokens=2).model_dump(mode="json")
    house.broker.call("generate", asked, "req-7")
    house.turn()
    assert [r.request for r in caplog.records if r.message == "generation ended"] == ["req-7"]  # type: ignore[attr-defined]
