"""The engine loop: versions, interleaving, failures, cancellation, stopping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch

from service.engine.calls import RunningGeneration
from service.engine.decoding import DecodingBatch, new_sequence, next_token_distribution
from service.engine.engine import BUILD_SLICE, Engine, EngineConfig
from service.engine.job_runner import MAX_INTERRUPTIONS, JobHandler
from service.engine.step_guard import StepGuardError
from service.errors import Conflict, DigestMismatch, InvalidInput, LeaseLost, Unavailable
from service.jobs.broker import Broker, Event, OutgoingEvent
from service.jobs.job_kinds import CALL_KINDS
from service.jobs.job_store import ClaimedJob, JobStore
from service.jobs.memory_broker import MemoryBroker
from service.jobs.redis_broker import RedisBroker
from service.jobs.worker_session import WorkerSession
from service.kit import crash_points
from service.kit.steps import JobReporter, Phase, Progress, Stepper, report_to
from service.kit.work_queue import Task, WorkQueue
from service.models.hooks import installed_hooks, replace_output
from service.models.memory_estimates import kv_cache_bytes
from service.patches.patch import PatchSet, weights_patch
from service.schemas import CompareRequest, GenerateRequest, Sampling, WorkerCompareRequest
from tests.support.fakes import InMemoryJobs, ShuffledVersionedModel, collect_events, token_texts
from tests.support.tiny_models import tiny

torch.set_num_threads(1)

PROMPTS = ["The Eiffel Tower is located in the city of", "Big Ben", "In which country is Mount Fuji?"]
TEST_CONFIG = EngineConfig(
    idle_timeout=0.01,
    cancel_poll_interval=0.0,
    ledger_poll_interval=0.0,
    drain_timeout=5.0,
    generation_time_share=0.0,
    job_slice=0.0,
)  # a step of a job in every iteration


class EngineHarness:
    """An engine with a fake job store and a fake ledger, stepped by the test."""

    make_broker: Callable[[], Broker] = staticmethod(MemoryBroker)

    def __init__(
        self,
        handlers: dict[str, Any] | None = None,
        config: EngineConfig = TEST_CONFIG,
        model_type: str = "gpt2",
        call_kinds: Any = CALL_KINDS,
        single_process: bool = True,
        preparation: Sequence[Any] = (),
    ) -> None:
        self.replica = ShuffledVersionedModel(tiny(model_type))
        self.jobs = InMemoryJobs()
        self.jobs.single_process = single_process
        self.broker: Any = self.make_broker()
        self.engine = Engine(
            self.replica,
            cast(WorkerSession, self.jobs),
            cast(JobStore, self.jobs),
            self.broker,
            handlers or {},
            config,
            call_kinds,
            preparation,
        )

    def generate(self, **fields: Any) -> str:
        return str(self.broker.send_call("generate", GenerateRequest(**fields).model_dump(mode="json")))

    def compare(self, **fields: Any) -> str:
        return str(self.broker.send_call("compare", CompareRequest(**fields).model_dump(mode="json")))

    def job(self, job_id: str, kind: str = "edit") -> str:
        self.jobs.add(job_id, kind)
        self.broker.notify(job_id, kind)
        return job_id

    def step(self, count: int | None = None) -> None:
        """Run `count` iterations of the loop; without a count, iterate until there is nothing to do."""
        steps = 0
        while self.engine.step() if count is None else steps < count and (self.engine.step() or True):
            steps += 1
            assert steps < 2000

    def end_event(self, channel: str) -> Event:
        return collect_events(self.broker, channel)[-1]

    def lose_lease(self, job_id: str) -> None:
        """Simulate that another worker has taken over the lease."""
        if isinstance(self.broker, RedisBroker):
            lease = self.broker._leases_by_channel[job_id]
            self.broker._run_script(
                "ack", self.broker._consumer, lease.stream, lease.entry_id, job_id, lease.token
            )
            self.broker._mark_lost(lease)
        else:
            (delivery,) = (d for d in self.broker._leased_calls.values() if d.job_id == job_id)
            del self.broker._leased_calls[delivery.id]

    def stop(self) -> None:
        stop = threading.Event()
        stop.set()
        self.engine.run(stop)

    def make_fail(self, name: str, *errors: Exception | None) -> None:
        """Make a method of the job store raise each error in turn (None: no error) before it works again."""
        method, remaining = getattr(self.jobs, name), iter(errors)

        def flaky(*args: Any) -> Any:
            if error := next(remaining, None):
                raise error
            return method(*args)

        setattr(self.jobs, name, flaky)

    def tokens_alone(self, prompt: str, version: int, sampling_params: Sampling) -> list[int]:
        batch = DecodingBatch(self.replica.base, [new_sequence(self.replica.base, prompt, sampling_params)])
        (r,) = batch.sequences
        with self.replica.use_patch(self.replica.patch(version)):
            while len(batch):
                batch.step()
        return r.output_ids


def job_handler(
    count: int, log: list[str] | None = None, end: Callable[[], None] | None = None
) -> JobHandler:
    """Return a handler of one job with `count` steps."""

    def task(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        for i in range(count):
            if log is not None:
                log.append("job")
            reporter.progress(jobs[0].id, Progress(Phase.RUN, i + 1, count))
            yield Progress(Phase.RUN, i + 1, count)
        if end is not None:
            end()

    return task


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama"])
def test_versions_never_mix(model_type: str) -> None:
    """Concurrent requests for three versions each have the tokens and the number of their own version."""
    harness = EngineHarness(model_type=model_type)
    sampling_params = Sampling(max_new_tokens=12, temperature=0.8, seed=5)
    channels = {}
    for prompt in PROMPTS:
        for version in (0, 1, 2):
            channels[prompt, version] = harness.generate(
                prompt=prompt, version=version, **sampling_params.model_dump()
            )
            harness.step(1)  # so that they join one by one
    harness.step()
    for (prompt, version), channel in channels.items():
        end = harness.end_event(channel).data
        assert end["version"] == version
        assert end["choices"][0]["tokens"] == harness.tokens_alone(prompt, version, sampling_params)
    texts = {tuple(harness.tokens_alone(PROMPTS[0], v, sampling_params)) for v in (0, 1, 2)}
    assert len(texts) == 3


def test_generation_is_pinned_at_admission() -> None:
    """A commit during a generation changes the version of the next request, not that of the running one."""
    harness = EngineHarness()
    harness.replica.settable_ledger.version = 1
    first = harness.generate(prompt=PROMPTS[0], max_new_tokens=10)
    harness.step(3)
    harness.replica.settable_ledger.version = 2
    second = harness.generate(prompt=PROMPTS[0], max_new_tokens=10)
    harness.step()
    sampling_params = Sampling(max_new_tokens=10)
    for channel, version in ((first, 1), (second, 2)):
        end = harness.end_event(channel).data
        assert end["version"] == version
        assert end["choices"][0]["tokens"] == harness.tokens_alone(PROMPTS[0], version, sampling_params)


def test_model_holds_base_bytes_between_steps() -> None:
    """The model has its base weights between two steps of the loop, also while a request is running."""
    harness = EngineHarness()
    base = harness.replica.base.weight(1).data.clone()
    harness.generate(prompt=PROMPTS[0], max_new_tokens=6, version=2)
    for _ in range(8):
        harness.engine.step()
        assert torch.equal(harness.replica.base.weight(1).data, base)


def test_many_prompts_and_a_stream() -> None:
    """Each prompt of a request has its own choice. Its token events concatenate to its text, and its tokens
    are those of the prompt alone."""
    harness = EngineHarness()
    sampling_params = Sampling(max_new_tokens=9, temperature=1.0, seed=3)
    channel = harness.generate(prompts=PROMPTS, stream=True, version="base", **sampling_params.model_dump())
    harness.step()
    events = collect_events(harness.broker, channel)
    end = events[-1]
    assert end.name == "end"
    for i, choice in enumerate(end.data["choices"]):
        assert choice["tokens"] == harness.tokens_alone(PROMPTS[i], 0, sampling_params)
        assert "".join(token_texts(events, i)) == choice["text"]
        assert choice["finish_reason"] in ("stop", "length")
    assert {e.data["version"] for e in events} == {0}
    assert end.data["usage"]["completion_tokens"] == sum(len(c["tokens"]) for c in end.data["choices"])
    assert end.data["usage"]["prompt_tokens"] == sum(len(harness.replica.base.encode(p)[0]) for p in PROMPTS)


def test_token_events_only_for_streaming_requests() -> None:
    """A request without `stream` has one event, its end event."""
    harness = EngineHarness()
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=5)
    harness.step()
    assert [e.name for e in collect_events(harness.broker, channel)] == ["end"]


def test_requests_beyond_max_batch_size_wait() -> None:
    """Sequences beyond max_batch_size wait, and all have the tokens that they have alone."""
    harness = EngineHarness(
        config=EngineConfig(
            max_batch_size=3, idle_timeout=0.01, cancel_poll_interval=0.0, ledger_poll_interval=0.0
        )
    )
    sampling_params = Sampling(max_new_tokens=5)
    channels = [harness.generate(prompts=PROMPTS * 3, **sampling_params.model_dump()) for _ in range(3)]
    harness.step()
    expected = [harness.tokens_alone(p, 2, sampling_params) for p in PROMPTS * 3]
    for channel in channels:
        assert [c["tokens"] for c in harness.end_event(channel).data["choices"]] == expected


def test_sequences_wait_for_kv_cache_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences are admitted while the KV caches of all fit at full length; the others wait, and all are
    completed."""
    model = tiny()
    longest = max(len(model.encode(p)[0]) for p in PROMPTS) + 10
    monkeypatch.setattr(
        "service.models.memory_estimates.free_bytes", lambda _device: 2 * kv_cache_bytes(model, 2, longest)
    )
    harness = EngineHarness()
    batch_sizes: list[int] = []
    harness.replica.base.model.register_forward_hook(
        lambda _module, _args, kwargs, _out: batch_sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    channels = [harness.generate(prompt=prompt, max_new_tokens=10) for prompt in PROMPTS * 2]
    harness.step()
    assert max(batch_sizes) == 2
    for channel, prompt in zip(channels, PROMPTS * 2, strict=True):
        tokens = harness.end_event(channel).data["choices"][0]["tokens"]
        assert tokens == harness.tokens_alone(prompt, 2, Sampling(max_new_tokens=10))


def test_generation_larger_than_device_memory_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation that exceeds the total device memory is rejected, and the error says what to change."""
    monkeypatch.setattr("service.models.memory_estimates.free_bytes", lambda _device: 1000)
    monkeypatch.setattr("service.models.memory_estimates.total_bytes", lambda _device: 2000)
    harness = EngineHarness()
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=40)
    harness.step()
    error = harness.end_event(channel)
    assert error.name == "error" and error.data["code"] == InvalidInput.code
    assert "ask for fewer tokens" in error.data["detail"]


def test_waiting_prompts_are_prefilled_together() -> None:
    """The prompts of all waiting requests are prefilled in one forward pass."""
    harness = EngineHarness()
    passes: list[int] = []
    hook = harness.replica.base.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for prompt in PROMPTS * 3:
        harness.generate(prompt=prompt, max_new_tokens=3)
    harness.step()
    hook.remove()
    assert passes == [9, 9, 9]


def test_a_decode_step_between_two_steps_of_a_job() -> None:
    """Each live batch gets a decode step between two steps of a job."""
    log: list[str] = []
    harness = EngineHarness({"edit": job_handler(10, log)})
    for version in (0, 1):
        harness.generate(prompt=PROMPTS[0], max_new_tokens=30, version=version)
    harness.step(3)
    model = harness.replica.base.model
    handle = model.register_forward_hook(lambda *_: log.append("decode"))
    harness.job("edit_1")
    harness.step(10)
    handle.remove()
    assert log == ["decode", "decode", "job"] * 10


def preparing(log: list[str], count: int) -> Stepper[str]:
    """Return the steps of something that jobs wait for."""
    for i in range(count):
        log.append("prepare")
        yield Progress(Phase.CORPUS, i, count)
    return "prepared"


def waiting_handler(queue: WorkQueue, task: Task[str], log: list[str]) -> JobHandler:
    """Return a handler of a job that waits for a task."""

    def handle(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        log.append((yield from report_to(reporter, [jobs[0].id], queue.wait_for(task))))

    return handle


def test_a_job_that_waits_holds_nothing_up() -> None:
    """While an edit waits for what the engine prepares, a generation and a less urgent job run to their ends; then the
    edit goes on with the result."""
    log: list[str] = []
    queue = WorkQueue()
    queue.in_background = True
    task = queue.submit(preparing(log, 200))
    handlers = {
        "edit": waiting_handler(queue, task, log),
        "trace": job_handler(3, end=lambda: log.append("traced")),
    }
    harness = EngineHarness(handlers, preparation=[queue])
    harness.job("waits")
    harness.step(2)
    harness.job("runs", "trace")
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=5)
    while len(log) < 200:
        harness.step(1)
    assert harness.end_event(channel).data["choices"]
    assert "traced" in log and "prepared" not in log
    assert "waits" in {report[1] for report in harness.jobs.reports}, "it reports what it waits for"
    while "prepared" not in log:
        harness.step(1)
    harness.step()
    assert harness.broker.receive(("edit", "trace"), 5, 0) == []


def test_one_step_of_the_preparation_between_two_decode_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a generation every step of the preparation is preceded and followed by a decode step."""
    log: list[str] = []
    queue = WorkQueue()
    queue.in_background = True
    queue.submit(preparing(log, 8))
    harness = EngineHarness(preparation=[queue])
    decode = DecodingBatch.step

    def logged_step(batch: DecodingBatch) -> Any:
        log.append("decode")
        return decode(batch)

    monkeypatch.setattr(DecodingBatch, "step", logged_step)
    harness.generate(prompt=PROMPTS[0], max_new_tokens=30)
    harness.step()
    assert log.count("prepare") == 8
    assert "prepare prepare" not in " ".join(log)


def test_jobs_run_sequentially_and_report_progress() -> None:
    """Jobs run one after the other, the most urgent first, and report the progress of each step."""
    harness = EngineHarness({"edit": job_handler(2), "trace": job_handler(1)})
    harness.job("trace_1", "trace")
    harness.job("edit_1")
    harness.job("edit_2")
    harness.step()
    assert harness.jobs.reports == [
        ("progress", "edit_1", 1),
        ("progress", "edit_1", 2),
        ("progress", "edit_2", 1),
        ("progress", "edit_2", 2),
        ("progress", "trace_1", 1),
    ]
    assert harness.broker.receive(("edit", "trace"), 5, 0) == []


def test_urgent_job_preempts_running_job() -> None:
    """A more urgent job runs between two steps of the running job; a job of the same urgency waits."""
    harness = EngineHarness({"edit": job_handler(2), "trace": job_handler(1), "evaluation": job_handler(3)})
    harness.job("evaluation_1", "evaluation")
    harness.step(1)
    harness.job("evaluation_2", "evaluation")
    harness.job("trace_1", "trace")
    harness.step(1)
    harness.job("edit_1")
    harness.step()
    assert harness.jobs.reports == [
        ("progress", "evaluation_1", 1),
        ("progress", "trace_1", 1),
        ("progress", "edit_1", 1),
        ("progress", "edit_1", 2),
        ("progress", "evaluation_1", 2),
        ("progress", "evaluation_1", 3),
        *(("progress", "evaluation_2", i) for i in (1, 2, 3)),
    ]
    assert harness.broker.receive(("edit", "trace", "evaluation"), 5, 0) == []


def test_stop_requeues_running_and_preempted_job() -> None:
    """On stop the running job and the job that it preempted are both requeued without another step."""
    harness = EngineHarness({"edit": job_handler(9), "evaluation": job_handler(9)})
    harness.job("evaluation_1", "evaluation")
    harness.step(1)
    harness.job("edit_1")
    harness.step(1)
    harness.stop()
    assert harness.jobs.reports[-2:] == [("released", "edit_1"), ("released", "evaluation_1")]
    assert len(harness.jobs.reports) == 4


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("a secret path"), "internal_error"),
        (Conflict("head moved."), "conflict"),
        (LeaseLost("taken over."), None),
    ],
)
def test_a_failing_job_fails_alone(error: Exception, told: str | None) -> None:
    """A job that raises fails with the code of the error, unless its lease was lost; other jobs and calls
    continue."""

    def fail() -> None:
        raise error

    harness = EngineHarness({"edit": job_handler(2, end=fail), "trace": job_handler(1)})
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=8)
    harness.job("edit_1")
    harness.job("trace_1", "trace")
    harness.step()
    failed = [t for t in harness.jobs.reports if t[0] == "failed"]
    assert [t[1] for t in failed] == ([] if told is None else ["edit_1"])
    assert told is None or failed[0][2] == told
    assert ("progress", "trace_1", 1) in harness.jobs.reports
    assert harness.end_event(channel).name == "end"


def test_job_is_retried_after_outage() -> None:
    """A job interrupted by an outage is requeued, and fails after MAX_INTERRUPTIONS interruptions."""

    def down() -> None:
        raise Unavailable("the database does not answer.")

    harness = EngineHarness({"edit": job_handler(1, end=down)})
    for _ in range(MAX_INTERRUPTIONS):
        harness.job("edit_1")
        harness.step()
    outcomes = [t[0] for t in harness.jobs.reports if t[0] != "progress"]
    assert outcomes == ["released"] * (MAX_INTERRUPTIONS - 1) + ["failed"]


def test_a_cancelled_job_ends_between_two_steps() -> None:
    """A job whose cancellation was requested is cancelled before its next step."""
    harness = EngineHarness({"edit": job_handler(100)})
    harness.job("edit_1")
    harness.step(3)
    harness.jobs.cancelled.add("edit_1")
    harness.step()
    assert harness.jobs.reports[-1] == ("cancelled", "edit_1", None)
    assert len(harness.jobs.reports) == 4


# groups of jobs

GROUP_CONFIG = EngineConfig(
    max_edits_per_group=4,
    idle_timeout=0.01,
    cancel_poll_interval=0.0,
    ledger_poll_interval=0.0,
    generation_time_share=0.0,
)


@dataclass
class Finish:
    """A step in which a group handler reports one job as finished."""

    job_id: str
    error: Exception | None = None


def group_handler(
    log: list[list[str]], updates: Sequence[Progress | Finish | tuple[str, Progress]]
) -> JobHandler:
    """Return a handler of a group of jobs. It records the group and makes one step per update: the progress
    of all jobs or of one, or the end of one."""

    def task(reporter: JobReporter, *jobs: ClaimedJob) -> Stepper[None]:
        log.append([job.id for job in jobs])
        for update in updates:
            if isinstance(update, Finish):
                reporter.finished(update.job_id, update.error)
                yield Progress(Phase.COMMIT, 1, 1)
                continue
            job_ids = [job.id for job in jobs] if isinstance(update, Progress) else [update[0]]
            progress = update if isinstance(update, Progress) else update[1]
            for job_id in job_ids:
                reporter.progress(job_id, progress)
            yield progress

    return task


def test_waiting_edits_run_as_one_group() -> None:
    """Waiting edits start as one group of at most max_edits_per_group jobs; other kinds of jobs run alone."""
    log: list[list[str]] = []
    harness = EngineHarness(
        {kind: group_handler(log, [Progress(Phase.RUN, 1, 1)]) for kind in ("edit", "trace")}, GROUP_CONFIG
    )
    for i in range(6):
        harness.job(f"edit_{i}")
    for i in range(2):
        harness.job(f"trace_{i}", "trace")
    harness.step()
    assert log == [["edit_0", "edit_1", "edit_2", "edit_3"], ["edit_4", "edit_5"], ["trace_0"], ["trace_1"]]
    assert {t[1] for t in harness.jobs.reports} == {
        *(f"edit_{i}" for i in range(6)),
        "trace_0",
        "trace_1",
    }
    assert harness.broker.receive(("edit", "trace"), 9, 0) == []


def test_each_worker_claims_its_share_of_edits() -> None:
    """With three workers for edits and five waiting edits, one worker claims two."""
    log: list[list[str]] = []
    harness = EngineHarness({"edit": group_handler(log, [])}, GROUP_CONFIG)
    harness.jobs.edit_workers = 3
    for i in range(5):
        harness.job(f"edit_{i}")
    harness.step(1)
    assert log == [["edit_0", "edit_1"]]
    assert harness.broker.queue_depth("edit") == 3


def test_grouped_jobs_finish_individually() -> None:
    """The jobs of a group report progress and finish individually; the rest finish with the last step."""
    updates: list[Progress | Finish | tuple[str, Progress]] = [
        Progress(Phase.RUN, 1, 9),
        Finish("edit_1", Conflict("not this one.")),
        ("edit_0", Progress(Phase.RUN, 2, 9)),
        Finish("edit_0"),
        Progress(Phase.RUN, 3, 9),
    ]
    log: list[list[str]] = []
    harness = EngineHarness({"edit": group_handler(log, updates)}, GROUP_CONFIG)
    for i in range(3):
        harness.job(f"edit_{i}")
    harness.step()
    assert harness.jobs.reports == [
        *(("progress", f"edit_{i}", 1) for i in range(3)),
        ("failed", "edit_1", "conflict"),
        ("progress", "edit_0", 2),
        ("progress", "edit_2", 3),
    ]
    assert harness.broker.receive(("edit",), 9, 0) == []


def test_group_error_fails_each_unfinished_job() -> None:
    """An error raised by the steps of a group fails the jobs that have not finished."""

    def task(reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        reporter.finished("edit_0")
        yield Progress(Phase.COMMIT, 1, 1)
        raise Conflict("all of them.")

    harness = EngineHarness({"edit": task}, GROUP_CONFIG)
    for i in range(3):
        harness.job(f"edit_{i}")
    harness.step()
    assert harness.jobs.reports == [
        ("failed", "edit_1", "conflict"),
        ("failed", "edit_2", "conflict"),
    ]


def test_group_stops_when_all_jobs_are_cancelled() -> None:
    """A group continues until all its jobs are cancelled."""
    log: list[list[str]] = []
    harness = EngineHarness(
        {"edit": group_handler(log, [Progress(Phase.RUN, i, 99) for i in range(99)])}, GROUP_CONFIG
    )
    for i in range(2):
        harness.job(f"edit_{i}")
    harness.jobs.cancelled.add("edit_0")
    harness.step(5)
    assert ("progress", "edit_1", 4) in harness.jobs.reports
    harness.jobs.cancelled.add("edit_1")
    harness.step()
    assert harness.jobs.reports[-2:] == [("cancelled", "edit_0", None), ("cancelled", "edit_1", None)]


def test_stop_requeues_all_unfinished_grouped_jobs() -> None:
    """On stop all unfinished jobs of a group are requeued."""
    log: list[list[str]] = []
    harness = EngineHarness(
        {"edit": group_handler(log, [Finish("edit_1"), *(Progress(Phase.RUN, i, 99) for i in range(99))])},
        GROUP_CONFIG,
    )
    for i in range(3):
        harness.job(f"edit_{i}")
    harness.step(4)
    harness.stop()
    assert harness.jobs.reports[-2:] == [("released", "edit_0"), ("released", "edit_2")]


def test_job_that_cannot_join_the_group_is_requeued() -> None:
    """If the job store becomes unavailable after the first claim, the claimed job runs, and the others start
    later."""
    log: list[list[str]] = []
    harness = EngineHarness({"edit": group_handler(log, [Progress(Phase.RUN, 1, 1)])}, GROUP_CONFIG)
    harness.make_fail("claim", None, STORE_DOWN)
    for i in range(3):
        harness.job(f"edit_{i}")
    harness.step()
    assert log == [["edit_0"], ["edit_1", "edit_2"]]
    assert harness.broker.receive(("edit",), 9, 0) == []


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_generation_gets_its_time_share_beside_a_job(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Beside a job with slow steps decoding gets its share of the time; without calls the job gets all of
    it."""
    harness = EngineHarness(
        {"edit": job_handler(10**6)},
        EngineConfig(
            generation_time_share=share, idle_timeout=0.01, cancel_poll_interval=0.0, ledger_poll_interval=0.0
        ),
    )
    clock, spent_seconds = [0.0], {"job": 0.0, "decode": 0.0}
    monkeypatch.setattr("service.engine.engine.time.monotonic", lambda: clock[0])

    def with_cost(name: str, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            spent_seconds[name] += seconds
            clock[0] += seconds
            action()

        return run

    calls, jobs = harness.engine._calls, harness.engine._jobs
    monkeypatch.setattr(calls, "decode", with_cost("decode", 0.01, calls.decode))
    monkeypatch.setattr(jobs, "step", with_cost("job", 0.1, jobs.step))
    channel = harness.generate(prompts=PROMPTS, max_new_tokens=50)
    harness.job("edit_1")
    while channel in {call.channel for call in calls.calls} or not spent_seconds["job"]:
        harness.step(1)
    assert spent_seconds["decode"] / (spent_seconds["decode"] + spent_seconds["job"]) == pytest.approx(
        share, abs=0.15
    )
    job_seconds = spent_seconds["job"]
    harness.step(5)
    assert spent_seconds["job"] == pytest.approx(job_seconds + 5 * 0.1)


def test_a_cancelled_generation_ends_and_frees_its_place() -> None:
    """The sequences of a cancelled generation leave the batch, and another generation is not affected."""
    harness = EngineHarness()
    cancelled = harness.generate(prompts=PROMPTS[:2], max_new_tokens=40)
    unaffected = harness.generate(prompt=PROMPTS[2], max_new_tokens=10)
    harness.step(4)
    harness.broker.cancel(cancelled)
    harness.step()
    choices = harness.end_event(cancelled).data["choices"]
    assert [c["finish_reason"] for c in choices] == ["cancelled", "cancelled"]
    assert all(0 < len(c["tokens"]) < 6 for c in choices)
    tokens = harness.end_event(unaffected).data["choices"][0]["tokens"]
    assert tokens == harness.tokens_alone(PROMPTS[2], 2, Sampling(max_new_tokens=10))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompt": "Big Ben", "version": 9}, "version 9 does not exist"),
        ({"prompt": "Big Ben", "min_version": 9}, "version 9 does not exist yet"),
        ({"prompt": "Big Ben " * 60}, "positions"),
        ({}, "prompt"),
    ],
)
def test_a_bad_request_fails_alone(asked: dict[str, Any], said: str) -> None:
    """An invalid request gets an error event that says why, and another request is completed."""
    harness = EngineHarness()
    bad = harness.generate(**asked)
    good = harness.generate(prompt=PROMPTS[0], max_new_tokens=4)
    harness.step()
    error = harness.end_event(bad)
    assert error.name == "error"
    assert said in error.data["detail"]
    assert harness.end_event(good).name == "end"


def test_a_payload_that_is_no_request_is_refused() -> None:
    """A payload that is not a valid request is answered with an error event."""
    harness = EngineHarness()
    channel = harness.broker.send_call("generate", {"nonsense": 1})
    harness.step()
    assert harness.end_event(channel).name == "error"


def test_a_row_that_breaks_the_pass_fails_alone() -> None:
    """When a forward pass fails, its sequences are run one by one, and only those that fail alone end with an
    error."""
    harness = EngineHarness()
    bad, *good = (harness.generate(prompt=p, max_new_tokens=8, version="base") for p in PROMPTS)
    harness.step(4)
    poison = harness.replica.base.encode(PROMPTS[0])[0]

    def fail(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs["attention_mask"]
        if len(mask) > 1 or kwargs["input_ids"][0, : len(poison)].tolist() == poison:
            raise RuntimeError("out of memory")

    handle = harness.replica.base.model.register_forward_pre_hook(fail, with_kwargs=True)
    harness.step(2)
    handle.remove()
    harness.step()
    assert harness.end_event(bad).name == "error"
    for prompt, channel in zip(PROMPTS[1:], good, strict=True):
        tokens = harness.end_event(channel).data["choices"][0]["tokens"]
        assert tokens == harness.tokens_alone(prompt, 0, Sampling(max_new_tokens=8))


def test_non_finite_logits_are_an_error() -> None:
    """Non-finite logits end a request with an error event; a request of another version is completed."""
    harness = EngineHarness()
    not_finite = torch.full_like(harness.replica.base.weight(1).data, float("nan"))
    harness.replica._patches[2] = weights_patch({harness.replica.weight_ref: not_finite})
    broken = harness.generate(prompts=PROMPTS, max_new_tokens=8, version=2)
    fine = harness.generate(prompt=PROMPTS[0], max_new_tokens=8, version=1)
    harness.step()
    assert harness.end_event(broken).name == "error"
    assert harness.end_event(fine).name == "end"


def test_compare_gives_both_texts_and_the_tokens_that_differ() -> None:
    """Each side of a comparison has the tokens of its version, and the differences are those of the two
    next-token distributions."""
    harness = EngineHarness()
    sampling_params = Sampling(max_new_tokens=7)
    channel = harness.compare(
        prompt=PROMPTS[0], versions=("base", "head"), top=5, **sampling_params.model_dump()
    )
    harness.step()
    end = harness.end_event(channel)
    assert end.name == "end"
    assert [s["version"] for s in end.data["sides"]] == [0, 2]
    for side in end.data["sides"]:
        assert side["tokens"] == harness.tokens_alone(PROMPTS[0], side["version"], sampling_params)
    ids = harness.replica.base.encode(PROMPTS[0])[0]
    p = []
    for version in (0, 2):
        with harness.replica.use_patch(harness.replica.patch(version)):
            p.append(next_token_distribution(harness.replica.base, ids))
    assert end.data["total_variation"] == pytest.approx(float((p[0] - p[1]).abs().sum() / 2))
    gaps = [abs(n["p"][0] - n["p"][1]) for n in end.data["next_tokens"]]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] == pytest.approx(float((p[0] - p[1]).abs().max()))
    assert len(gaps) == 5
    for n in end.data["next_tokens"]:
        assert n["p"] == [float(p[0][n["id"]]), float(p[1][n["id"]])]


def test_a_conversation_is_compared_by_its_tokens() -> None:
    """Both sides of a comparison of tokens have the texts of these tokens, which end at the end of the turn, and the
    result has the text of the tokens."""
    harness = EngineHarness()
    ids = harness.replica.base.encode(PROMPTS[0])[0]
    texts = {v: harness.tokens_alone(PROMPTS[0], v, Sampling(max_new_tokens=7)) for v in (0, 2)}
    end_token = texts[2][2]
    request = WorkerCompareRequest(tokens=ids, text="in chat", end_token_ids=[end_token], max_new_tokens=7)
    channel = str(harness.broker.send_call("compare", request.model_dump(mode="json")))
    harness.step()
    data = harness.end_event(channel).data
    assert data["prompt"] == "in chat"
    for side in data["sides"]:
        tokens = texts[side["version"]]
        assert side["tokens"] == (tokens[: tokens.index(end_token)] if end_token in tokens else tokens)
    assert data["sides"][1]["finish_reason"] == "stop"


def test_compare_of_a_version_with_itself_finds_nothing() -> None:
    """A version compared with itself has no differences."""
    harness = EngineHarness()
    channel = harness.compare(prompt=PROMPTS[1], versions=(1, 1), max_new_tokens=3)
    harness.step()
    data = harness.end_event(channel).data
    assert data["total_variation"] == 0
    assert data["sides"][0] == data["sides"][1]


def test_comparisons_end_when_cancelled_or_impossible() -> None:
    """A comparison can be cancelled, and a comparison with an unknown version is rejected."""
    harness = EngineHarness()
    unknown = harness.compare(prompt=PROMPTS[0], versions=(0, 9))
    cancelled = harness.compare(prompt=PROMPTS[0], max_new_tokens=40)
    harness.step(3)
    harness.broker.cancel(cancelled)
    harness.step()
    assert harness.end_event(unknown).name == harness.end_event(cancelled).name == "error"


def test_engine_syncs_to_ledger_head() -> None:
    """When the head changes, the engine builds the new version and attests its digest."""
    harness = EngineHarness()
    harness.engine.step()
    assert harness.engine.served_version == (2, harness.replica.digest(2))
    harness.replica.settable_ledger.version = 3
    harness.engine.step()
    assert harness.engine.served_version == (3, harness.replica.digest(3))
    assert harness.replica.settable_ledger.attested == [2, 3]


def test_stop_requeues_job_and_drains_generations() -> None:
    """On stop a running job is requeued, and a running generation is completed."""
    harness = EngineHarness({"edit": job_handler(1000)})
    harness.job("edit_1")
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=20)
    harness.step(3)
    harness.stop()
    assert harness.jobs.reports[-1] == ("released", "edit_1")
    assert harness.end_event(channel).data["choices"][0]["finish_reason"] == "length"


def test_stop_without_drain_timeout_requeues_unstarted_calls() -> None:
    """With a drain timeout of 0 a started generation ends with an error, and calls that have not started are
    requeued."""
    harness = EngineHarness(config=EngineConfig(max_batch_size=1, idle_timeout=0.01, drain_timeout=0.0))
    started = harness.generate(prompts=[PROMPTS[0]], max_new_tokens=20)
    harness.step(3)
    harness.generate(prompt=PROMPTS[1])
    harness.compare(prompt=PROMPTS[1], max_new_tokens=30)
    harness.step(1)
    harness.stop()
    assert "stopping" in harness.end_event(started).data["detail"]
    assert harness.broker.queue_depth("generate") == 1
    assert harness.broker.queue_depth("compare") == 1


def test_unpublished_events_are_published_after_outage() -> None:
    """During an outage of the broker each step raises Unavailable; afterwards all events are published."""
    harness = EngineHarness()
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=6, stream=True)
    harness.step(2)
    publish, fails = harness.broker.publish_all, iter([True, True, False])

    def flaky(messages: Sequence[OutgoingEvent]) -> None:
        if next(fails, False):
            raise Unavailable("the queue does not answer.")
        publish(messages)

    harness.broker.publish_all = flaky
    for _ in range(2):
        with pytest.raises(Unavailable):
            harness.engine.step()
    harness.step()
    events = collect_events(harness.broker, channel)
    assert "".join(token_texts(events)) == events[-1].data["choices"][0]["text"]
    assert events[-1].data["choices"][0]["tokens"] == harness.tokens_alone(
        PROMPTS[0], 2, Sampling(max_new_tokens=6)
    )


def test_an_idle_loop_wakes_for_a_call() -> None:
    """An idle loop answers a new call and ends when it is stopped."""
    harness = EngineHarness(config=EngineConfig(idle_timeout=30.0))
    stop = threading.Event()
    thread = threading.Thread(target=harness.engine.run, args=(stop,))
    thread.start()
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=3)
    assert harness.end_event(channel).name == "end"
    stop.set()
    harness.broker.wake()
    thread.join(10)
    assert not thread.is_alive()


STORE_DOWN = Unavailable("the store does not answer.")


def test_events_of_one_step_are_one_publication() -> None:
    """The events of all sequences in one step, including end events, are one publication."""
    harness = EngineHarness()
    publication_sizes: list[int] = []
    publish = harness.broker.publish_all

    def counted(messages: Sequence[OutgoingEvent]) -> None:
        publication_sizes.append(len(messages))
        publish(messages)

    harness.broker.publish_all = counted
    for prompt in PROMPTS:
        harness.generate(prompt=prompt, max_new_tokens=2, stream=True, version="base")
    harness.step()
    assert len(publication_sizes) == 2
    assert publication_sizes[-1] >= len(PROMPTS)


def test_worker_receives_only_kinds_of_its_roles() -> None:
    """A worker receives only calls of its roles and jobs for which it has a handler."""
    harness = EngineHarness({"edit": job_handler(1)}, call_kinds=())
    harness.generate(prompt=PROMPTS[0])
    harness.job("trace_1", "trace")
    harness.job("edit_1")
    harness.step()
    assert [harness.broker.queue_depth(kind) for kind in ("generate", "trace", "edit")] == [1, 1, 0]


def test_a_call_that_was_taken_over_is_dropped() -> None:
    """A call that another worker has taken over gets no more events from this one; other calls are
    completed."""
    harness = EngineHarness()
    lost = [harness.generate(prompt=PROMPTS[0], max_new_tokens=30), harness.compare(prompt=PROMPTS[0])]
    unaffected = harness.generate(prompt=PROMPTS[1], max_new_tokens=6)
    harness.step(3)
    for channel in lost:
        harness.lose_lease(channel)
    harness.step()
    assert harness.end_event(unaffected).data["choices"][0]["tokens"] == harness.tokens_alone(
        PROMPTS[1], 2, Sampling(max_new_tokens=6)
    )
    for channel in lost:
        harness.broker.publish(channel, "end", {"from": "another worker"}, last=True)
        assert [event.data for event in collect_events(harness.broker, channel)] == [
            {"from": "another worker"}
        ]


def test_a_lost_call_that_comes_back_is_answered_anew() -> None:
    """A call whose lease was lost and that is redelivered to the same worker is answered once, completely."""
    harness = EngineHarness(
        config=EngineConfig(idle_timeout=0.01, cancel_poll_interval=60.0, ledger_poll_interval=0.0)
    )
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=12)
    harness.step(3)
    harness.lose_lease(channel)
    harness.broker.send_call(
        "generate", GenerateRequest(prompt=PROMPTS[0], max_new_tokens=12).model_dump(), "", channel
    )
    harness.step()
    (end,) = collect_events(harness.broker, channel)
    assert end.data["choices"][0]["tokens"] == harness.tokens_alone(
        PROMPTS[0], 2, Sampling(max_new_tokens=12)
    )


def test_a_job_that_was_taken_over_is_dropped() -> None:
    """A worker drops a job that another worker has taken over and runs the next job."""
    harness = EngineHarness({"edit": job_handler(5), "trace": job_handler(1)})
    harness.make_fail("report_progress", None, LeaseLost("taken over."))
    harness.job("edit_1")
    harness.job("trace_1", "trace")
    harness.step()
    assert harness.jobs.reports == [("progress", "edit_1", 1), ("progress", "trace_1", 1)]


def test_version_is_attested_before_first_token() -> None:
    """Each version that is served, by number or as head, is attested exactly once."""
    harness = EngineHarness()
    for version in (1, 1, "base", "head"):
        harness.generate(prompt=PROMPTS[0], version=version, max_new_tokens=2)
    harness.compare(prompt=PROMPTS[0], versions=(0, 1), max_new_tokens=2)
    harness.step()
    assert sorted(harness.replica.settable_ledger.attested) == [0, 1, 2]


def test_digest_mismatch_stops_serving_that_version() -> None:
    """A digest mismatch ends the loop. The request for that version and the running job are requeued, and a
    generation of another version is completed."""
    harness = EngineHarness({"edit": job_handler(1000)})
    harness.job("edit_1")
    undisputed = harness.generate(prompt=PROMPTS[0], max_new_tokens=10)
    harness.step(3)
    harness.replica.settable_ledger.disputed = {1}
    harness.generate(prompt=PROMPTS[0], version=1)
    with pytest.raises(DigestMismatch):
        harness.engine.run(threading.Event())
    assert harness.broker.queue_depth("generate") == 1
    assert harness.jobs.reports[-1] == ("released", "edit_1")
    assert harness.end_event(undisputed).data["choices"][0]["finish_reason"] == "length"


def test_digest_mismatch_at_new_head_ends_the_loop() -> None:
    """A digest mismatch at a new head ends the loop."""
    harness = EngineHarness()
    harness.step(1)
    harness.replica.settable_ledger.version, harness.replica.settable_ledger.disputed = 3, {3}
    with pytest.raises(DigestMismatch):
        harness.engine.run(threading.Event())


def test_requests_wait_while_the_store_is_down() -> None:
    """When the head cannot be read, all received requests are requeued; they are completed after the
    outage."""
    harness = EngineHarness()
    harness.step(1)
    channels = [harness.generate(prompt=p, max_new_tokens=3) for p in PROMPTS]
    head = harness.replica.head
    harness.replica.head = raise_outage  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises(Unavailable):
            harness.engine.step()
    assert harness.broker.queue_depth("generate") == 3
    harness.replica.head = head  # type: ignore[method-assign]
    harness.step()
    assert [harness.end_event(c).name for c in channels] == ["end"] * 3


def raise_outage() -> int:
    raise STORE_DOWN


def test_a_job_waits_while_the_store_is_down() -> None:
    """A job that cannot be claimed during an outage is started after it."""
    harness = EngineHarness({"edit": job_handler(1)})
    harness.make_fail("claim", STORE_DOWN)
    harness.job("edit_1")
    with pytest.raises(Unavailable):
        harness.engine.step()
    harness.step()
    assert harness.jobs.reports == [("progress", "edit_1", 1)]


def test_running_job_survives_outage() -> None:
    """A job whose progress cannot be reported during an outage pauses and then continues with the next
    step."""
    harness = EngineHarness({"edit": job_handler(4)})
    harness.make_fail("report_progress", None, STORE_DOWN, STORE_DOWN)
    harness.job("edit_1")
    for _ in range(2):
        with pytest.raises(Unavailable):
            harness.step()
    harness.step()
    assert harness.jobs.reports == [("progress", "edit_1", i) for i in range(1, 5)]


@pytest.mark.parametrize("name", ["claim", "report_progress", "fail"])
def test_unexpected_error_does_not_stop_the_loop(name: str) -> None:
    """An unexpected error of the job store affects one job; the next job runs."""

    def fail() -> None:
        raise Conflict("head moved.")

    harness = EngineHarness({"edit": job_handler(1, end=fail), "trace": job_handler(1)})
    harness.make_fail(name, ValueError("an odd row"))
    harness.job("edit_1")
    harness.job("trace_1", "trace")
    harness.step()
    assert harness.jobs.reports[-1] == ("progress", "trace_1", 1)
    assert harness.jobs.forgotten == (["edit_1"] if name == "fail" else [])


def test_wakeup_without_work_polls_the_ledger() -> None:
    """An idle loop that is woken without work reads the head at once, whatever the poll interval is."""
    harness = EngineHarness(config=EngineConfig(idle_timeout=30.0, ledger_poll_interval=3600.0))
    stop = threading.Event()
    thread = threading.Thread(target=harness.engine.run, args=(stop,))
    thread.start()
    assert harness.end_event(harness.generate(prompt=PROMPTS[0], max_new_tokens=1)).data["version"] == 2
    harness.replica.settable_ledger.version = 3
    pause = threading.Event()
    while harness.engine.served_version is None or harness.engine.served_version[0] != 3:
        harness.broker.wake()
        pause.wait(0.01)
    stop.set()
    harness.broker.wake()
    thread.join(10)
    assert not thread.is_alive()


def test_stop_requeues_streams_when_other_workers_exist() -> None:
    """If other workers exist, stop requeues streams that cannot end within the drain timeout, although tokens
    were published."""
    config = EngineConfig(max_batch_size=2, idle_timeout=0.01, drain_timeout=0.0)
    harness = EngineHarness(config=config, single_process=False)
    channels = [harness.generate(prompt=p, max_new_tokens=20, stream=True) for p in PROMPTS[:2]]
    harness.step(3)
    harness.stop()
    assert {d.job_id for d in harness.broker.receive(("generate",), 5, 0)} == set(channels)


def test_crash_points_are_passed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation and a job pass their crash points in a fixed order."""
    passed: list[str] = []
    monkeypatch.setattr(crash_points, "crash_point", passed.append)
    harness = EngineHarness({"edit": job_handler(1)})
    harness.generate(prompt=PROMPTS[0], max_new_tokens=2, version="base")
    harness.step()
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
    harness.job("edit_1")
    harness.step()
    assert passed == ["take.after", "end.after_publish", "done.after"]


def test_the_log_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    """The log record of a call has the id of the HTTP request that sent it."""
    caplog.set_level("INFO")
    harness = EngineHarness()
    sampling_params = GenerateRequest(prompt=PROMPTS[0], max_new_tokens=2).model_dump(mode="json")
    harness.broker.send_call("generate", sampling_params, "req-7")
    harness.step()
    assert [r.request for r in caplog.records if r.message == "generation ended"] == ["req-7"]  # type: ignore[attr-defined]


# builds of versions, and the step guard


def slow_build(harness: EngineHarness, slow_version: int, steps: int) -> None:
    """Make the build of `slow_version` take `steps` more steps of BUILD_SLICE seconds each."""
    compose = harness.replica._compose_version

    def composed(version: int) -> Stepper[PatchSet]:
        for i in range(steps if version == slow_version else 0):
            time.sleep(BUILD_SLICE)
            yield Progress(Phase.COMPOSE, i, steps)
        return (yield from compose(version))

    harness.replica._compose_version = composed  # type: ignore[method-assign]


def token_counts(harness: EngineHarness, steps: int) -> list[int]:
    """Return the number of tokens of the running generation after each of `steps` iterations of the loop."""
    (generation,) = (c for c in harness.engine._calls.calls if isinstance(c, RunningGeneration))
    counts = []
    for _ in range(steps):
        harness.step(1)
        counts.append(len(generation.sequences[0].output_ids))
    return counts


def test_a_stream_decodes_between_the_steps_of_a_new_version() -> None:
    """While a new head is built, a stream gets a token between every two steps of the build."""
    harness = EngineHarness()
    harness.step(2)
    slow_build(harness, 3, 8)
    harness.generate(prompt=PROMPTS[0], max_new_tokens=40)
    harness.step(1)
    harness.replica.settable_ledger.version = 3
    counts = token_counts(harness, 6)
    assert counts == list(range(counts[0], counts[0] + 6))
    assert harness.engine.served_version == (2, harness.replica.digest(2))
    harness.step()
    assert harness.engine.served_version == (3, harness.replica.digest(3))


def test_a_stream_decodes_while_another_request_waits_for_its_version() -> None:
    """A request waits until its version is built; meanwhile a running stream gets a token in every step."""
    harness = EngineHarness()
    harness.step(2)
    slow_build(harness, 1, 8)
    first = harness.generate(prompt=PROMPTS[0], max_new_tokens=40)
    harness.step(1)
    (generation,) = harness.engine._calls.calls
    second = harness.generate(prompt=PROMPTS[0], max_new_tokens=4, version=1)
    before = len(generation.sequences[0].output_ids)  # type: ignore[union-attr]
    harness.step(5)
    assert len(generation.sequences[0].output_ids) == before + 5  # type: ignore[union-attr]
    assert len(harness.engine._calls.calls) == 2
    harness.step()
    for channel, version, count in ((first, 2, 40), (second, 1, 4)):
        end = harness.end_event(channel).data
        expected = harness.tokens_alone(PROMPTS[0], version, Sampling(max_new_tokens=count))
        assert (end["version"], end["choices"][0]["tokens"]) == (version, expected)


def test_a_waiting_request_can_be_cancelled() -> None:
    """A request that waits for its version can be cancelled like a running one."""
    harness = EngineHarness()
    harness.step(2)
    slow_build(harness, 1, 8)
    channel = harness.generate(prompt=PROMPTS[0], max_new_tokens=4, version=1)
    harness.step(1)
    harness.broker.cancel(channel)
    harness.step()
    assert harness.end_event(channel).data["choices"][0]["finish_reason"] == "cancelled"
    assert not harness.engine._calls.calls


def test_a_step_that_leaves_a_hook_fails_its_job() -> None:
    """A job whose step leaves a hook in place fails with an error that names the step, and the hook is removed."""

    def leaking(_reporter: JobReporter, *_jobs: ClaimedJob) -> Stepper[None]:
        with replace_output(harness.replica.base.model, lambda output: output):
            yield Progress(Phase.MEASURE, 1, 1)

    harness = EngineHarness({"edit": leaking, "trace": job_handler(1)})
    harness.job("edit_1")
    harness.job("trace_1", "trace")
    harness.step()
    assert harness.jobs.reports == [("failed", "edit_1", "internal_error"), ("progress", "trace_1", 1)]
    assert installed_hooks() == 0


def test_applied_patches_between_steps_stop_the_engine() -> None:
    """Edited weights that remain after a step raise StepGuardError, which names the step."""
    harness = EngineHarness()
    harness.step(2)
    harness.replica.applied_patches = 1
    harness.generate(prompt=PROMPTS[0], max_new_tokens=4)
    with pytest.raises(StepGuardError, match="'decode' left 0 hooks and 1 patches"):
        harness.step()
