"""The one loop of a worker: it interleaves decoding with one step at a time of the running job.

A turn admits new requests (their version pinned then), gives every live batch a decode step and every comparison one of
its steps, then runs ONE step of the running job, unless calls have not yet had their share of the time since the last one. So an edit never
holds up the tokens of others for longer than one of its steps, nor slows them to less than that share of their pace; and no
answer ever sees another version's weights: between steps the model holds its base bytes. A job of a kind that is more urgent
goes before the running one, which then goes on: an edit does not wait for an evaluation of hours.

What the loop has to tell the broker or the desk is owed in order and paid at once; when that fails because they are down
it stays owed, `run` raises, and the next `run` goes on where it was.

Other workers may take over what this one holds. A call that is no longer owned is dropped without a word; a job goes on,
because the attempt in its row is its fence, until the desk says that it is another's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pydantic import ValidationError

from service.engine.calls import Comparison, Generation, pinned, problem
from service.engine.comparison import compare_steps
from service.engine.decoding import Row, Said, rows
from service.engine.outbox import Owed
from service.engine.scheduler import READ, Lanes
from service.engine.versioned_model import Replica
from service.errors import Cancelled, Disagrees, InvalidInput, LeaseLost, PalimpsestError, Unavailable
from service.jobs.broker import CALLS, KINDS, Broker, Delivery
from service.jobs.job_store import Desk, RunningJob
from service.kit import crash_points, metrics
from service.kit.steps import Ended, News, Progress, Told, Working
from service.models import memory_estimates
from service.schemas import CompareRequest, SpeechRequest

log = logging.getLogger(__name__)

Task = Callable[..., Working]  # given the jobs that are to be carried out together
HUNG = 300.0  # seconds after which a loop that did not come round counts as dead
INTERRUPTIONS = 10  # times a job may find something down that it needs before it fails
STOPPING = Unavailable("the worker is stopping: ask again.")


Members = dict[str, tuple[Delivery, RunningJob]]  # by the job's id


@dataclass(eq=False)
class Work:
    """The jobs that are carried out together, as long as they have not ended, and what remains of them."""

    kind: str
    members: Members
    steps: Working

    @property
    def jobs(self) -> list[RunningJob]:
        return [job for _, job in self.members.values()]


@dataclass(frozen=True)
class Pace:
    """How the loop shares its time."""

    rows: int = 32  #: rows that decode side by side
    edits: int = 1  #: waiting edits that are carried out together
    caches: float = 0.5  #: of the memory that is free at the start, for keys and values
    share: float = 0.6  #: of the time, for calls while a job runs beside them
    comparisons: int = 4  #: comparisons side by side
    wait: float = 1.0  #: longest sleep when there is nothing to do, in seconds
    look: float = 0.05  #: seconds between two looks for cancelled calls
    follow: float = 0.5  #: seconds between two looks at the ledger's head
    grace: float = 5.0  #: seconds for running generations to end when the loop is stopped


class Engine:
    """Serves one replica: the calls it is given and the jobs it has tasks for.

    All but `position` and `hung` belongs to the thread that calls `run`.
    """

    def __init__(
        self,
        replica: Replica,
        desk: Desk,
        broker: Broker,
        tasks: Mapping[str, Task],
        pace: Pace | None = None,
        calls: Sequence[str] = CALLS,
    ) -> None:
        self.replica = replica
        self.position: tuple[int, str] | None = (
            None  #: the newest version that the replica can serve, and its digest
        )
        self.turned = time.monotonic()  #: when the loop last came round
        self._desk = desk
        self._broker = broker
        self._tasks = tasks
        self._calls = tuple(kind for kind in KINDS if kind in calls)
        self._jobs = tuple(kind for kind in KINDS if kind in tasks)
        self._pace = pace or Pace()
        free = memory_estimates.room(replica.base.device)
        self._memory = None if free is None else int(free * self._pace.caches)
        self._lanes = Lanes(replica, self._pace.rows, self._memory)
        self._generations: dict[Row, tuple[Generation, int]] = {}
        self._comparisons: list[Comparison] = []
        self._works: list[Work] = []  # the last one is worked on; those before it are less urgent and wait
        self._interrupted: Counter[str] = Counter()
        self._owed = Owed(broker)
        self._lead = 0.0  # seconds that calls are owed for the last step of a job
        self._looked = self._followed = float("-inf")

    @property
    def hung(self) -> bool:
        """Whether the loop has not come round for so long that it counts as dead."""
        return time.monotonic() - self.turned > HUNG

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set, or until other replicas disagree; then let generations end, and hand back the rest."""
        try:
            while not stop.is_set():
                if not self.turn() and not stop.is_set():
                    self._rest()
        except Disagrees:
            with suppress(Unavailable, OSError):  # what cannot be handed back is taken over
                self._close()  # what is being said is of versions that were agreed upon
            raise
        self._close()

    def turn(self) -> bool:
        """Once round; whether there was anything to do."""
        self.turned = time.monotonic()
        metrics.TURNS.inc()
        self._owed.pay()
        self._follow()
        self._admit()
        self._look()
        calling = bool(self._lanes or self._comparisons)
        busy = calling or bool(self._works)
        began = time.monotonic()
        self._decode()
        self._compare()
        called = time.monotonic()
        self._lead = max(0.0, self._lead - (called - began)) if calling else 0.0
        if self._lead == 0:
            self._step_job()
            self._lead = (time.monotonic() - called) * self._pace.share / (1 - self._pace.share)
        return busy

    # what is to be done

    def _wanted(self) -> tuple[str, ...]:
        """The kinds that there is room for."""
        calls = {"generate": self._lanes.free, "compare": self._pace.comparisons - len(self._comparisons)}
        return (*(k for k in self._calls if calls[k] > 0), *self._urgent())

    def _urgent(self) -> tuple[str, ...]:
        """The kinds of job that may begin now: all of them, or those that go before the running one."""
        return self._jobs[: self._jobs.index(self._works[-1].kind)] if self._works else self._jobs

    def _admit(self) -> None:
        """Take what there is room for: all generations that wait, so that they are read together."""
        while (kinds := self._wanted()) and (first := self._broker.take(kinds, 1, 0)):
            more = self._lanes.free - 1
            self._receive(first)
            if first[0].kind == "generate" and more > 0:
                self._receive(self._broker.take(("generate",), more, 0))

    def _rest(self) -> None:
        """Sleep until there is work. Whoever wakes the loop without any has news of the ledger."""
        deliveries = self._broker.take(self._wanted(), 1, self._pace.wait)
        if not deliveries:
            self._followed = float("-inf")
        self._receive(deliveries)

    def _receive(self, deliveries: Sequence[Delivery]) -> None:
        """Begin all of them; what cannot be begun now waits again, oldest first."""
        if deliveries:
            crash_points.reach("take.after")
        for number, delivery in enumerate(deliveries):
            try:
                self._begin(delivery)
            except Exception:
                for left in deliveries[number:]:
                    self._owed.owe(self._broker.give_back, left)
                with suppress(Unavailable, OSError):  # stays owed
                    self._owed.pay()
                raise
        self._owed.pay()

    def _begin(self, delivery: Delivery) -> None:
        """Raises only what concerns all work, not this delivery."""
        if delivery.kind not in CALLS:
            self._start_job(delivery)
            return
        for call in self._running():
            if call.channel == delivery.job_id:  # lost while this process was frozen, and come back to it
                self._discard(call)
        try:
            (self._start_generation if delivery.kind == "generate" else self._start_comparison)(delivery)
        except (Unavailable, Disagrees):
            raise
        except Exception as error:
            self._refuse(delivery, error)

    def _start_generation(self, delivery: Delivery) -> None:
        request = SpeechRequest.model_validate(delivery.payload)
        version = pinned(request.version, self.replica.head(), request.min_version)
        model = self.replica.base
        asked = rows(model, request)
        needed = memory_estimates.cache_bytes(model, 1, max(r.most for r in asked))
        if (
            request.echo and request.logprobs is not None
        ):  # the distributions at all places that are read together
            needed += memory_estimates.measure_bytes(model, 1, max(READ, *(len(r.prompt) for r in asked)))
        memory_estimates.admit("this answer", needed, model.device, "ask for fewer tokens", "max_new_tokens")
        self._lanes.add(version, self.replica.weights(version), asked)
        generation = Generation(delivery, request, version, asked)
        self._generations |= {r: (generation, i) for i, r in enumerate(asked)}
        crash_points.reach("generate.after_admit")

    def _start_comparison(self, delivery: Delivery) -> None:
        request = CompareRequest.model_validate(delivery.payload)
        head = self.replica.head()
        a, b = ((v, self.replica.weights(v)) for v in (pinned(v, head) for v in request.versions))
        steps = compare_steps(self.replica.base, self.replica.stand, request, (a, b))
        self._comparisons.append(Comparison(delivery, steps))

    def _start_job(self, delivery: Delivery) -> None:
        """Begin a job, and with an edit those that wait behind it, as far as they are this worker's share."""
        members = self._started(delivery)
        if delivery.kind == "edit" and self._pace.edits > 1:
            members |= self._joining()
        if members:
            jobs = [job for _, job in members.values()]
            self._works.append(Work(delivery.kind, members, self._tasks[delivery.kind](*jobs)))

    def _joining(self) -> Members:
        """Begin more of the waiting edits: an equal part for each worker that edits. What cannot be begun waits again."""
        members: Members = {}
        waiting: list[Delivery] = []
        try:
            share = -(-(self._broker.waiting("edit") + 1) // self._desk.editors())
            if (more := min(self._pace.edits, share) - 1) > 0:
                waiting = self._broker.take(("edit",), more, 0)
            while waiting:
                members |= self._started(waiting[0])
                waiting.pop(0)
        except (Unavailable, OSError):
            for left in waiting:
                self._owed.owe(self._broker.give_back, left)
        return members

    def _started(self, delivery: Delivery) -> Members:
        """The job, begun; nothing when there is nothing to do for it."""
        try:
            job = self._desk.start(delivery.job_id)
        except Unavailable:
            raise
        except Exception:  # the row is as it was: the sweep rings for it again
            log.exception("job cannot be started", extra={"job": delivery.job_id})
            job = None
        if job is None:
            self._acknowledge(delivery)
            return {}
        log.info("job started", extra={**about(job), "kind": job.kind, "attempt": job.attempt})
        return {job.id: (delivery, job)}

    # one step of everything

    def _decode(self) -> None:
        for said in self._lanes.turn():
            self._speak(said)
            self._owed.pay()
            if said:
                crash_points.reach("generate.after_token")

    def _speak(self, step: list[Said]) -> None:
        """Publish what one step of a lane said, then the ends it brought."""
        spoke: dict[Generation, None] = {}
        for said in step:
            generation, index = self._generations[said.row]
            generation.speak()
            spoke[generation] = None
            if generation.request.stream and (token := generation.news(index, said.piece)):
                self._owed.tell(generation.channel, "token", token)
            if said.row.finish_reason == "error":
                generation.close()
        self._end([generation for generation in spoke if generation.ended])

    def _end(self, ended: Sequence[Generation]) -> None:
        """Publish how generations ended, then acknowledge them."""
        for generation in ended:
            crash_points.reach("generate.before_end")
            self._discard(generation)
            self._tell_end(generation)
        for generation in ended:
            self._acknowledge(generation.delivery, "generate.after_end")

    def _tell_end(self, generation: Generation) -> None:
        """A generation fails as a whole when one of its rows failed."""
        for r in generation.rows:
            metrics.ANSWERS.labels(r.finish_reason).inc()
        if any(r.finish_reason == "error" for r in generation.rows):
            detail = (
                f"version {generation.version} could not speak: the worker's log has the details. Ask again."
            )
            self._owed.tell(generation.channel, "error", problem(Unavailable(detail)), last=True)
            return
        answer = generation.answer()
        self._owed.tell(generation.channel, "end", answer, last=True)
        fields = {"version": generation.version, "seconds": answer["seconds"], **answer["usage"]}
        log.info("generation ended", extra={**about(generation.delivery), **fields})

    def _compare(self) -> None:
        for comparison in list(self._comparisons):
            try:
                next(comparison.steps)
                continue
            except StopIteration as end:
                self._owed.tell(comparison.channel, "end", end.value, last=True)
                self._acknowledge(comparison.delivery)
            except Exception as error:
                self._refuse(comparison.delivery, error)
            self._discard(comparison)
        self._owed.pay()

    def _step_job(self) -> None:
        """One step of the running jobs. What it raises is their end and nothing else's."""
        if not self._works:
            return
        work = self._works[-1]
        try:
            if all(self._desk.cancel_requested(job) for job in work.jobs):
                raise Cancelled("the job was cancelled while it ran.")
            news = next(work.steps)
        except Disagrees:
            raise
        except Unavailable as error:
            self._interrupt(work, error)
        except StopIteration:
            self._leave_jobs(work)
        except Exception as error:
            self._leave_jobs(work, error)
        else:
            self._hear(work, news)
        self._owed.pay()

    def _hear(self, work: Work, news: News) -> None:
        """How far the jobs are, or that one of them has ended."""
        if isinstance(news, Ended):
            self._leave_job(work, news.job, news.error)
        elif isinstance(news, Told):
            self._owed.owe(self._progress, work, news.job, news.progress)
        else:
            for job in work.jobs:
                self._owed.owe(self._progress, work, job.id, news)

    def _fail(self, job: RunningJob, error: Exception) -> None:
        """The row says how the job ended, unless it is another's by now."""
        about_it = about(job)
        if isinstance(error, Cancelled):
            log.info("job cancelled", extra=about_it)
            self._owed.owe(self._write, self._desk.finish, job, "cancelled", None)
        elif isinstance(error, LeaseLost):
            log.warning("job taken over by another worker", extra=about_it)
        elif isinstance(error, PalimpsestError):
            log.info("job failed", extra={**about_it, "detail": error.detail})
            self._owed.owe(self._write, self._desk.fail, job, error)
        else:
            log.error("job failed", exc_info=error, extra=about_it)
            self._owed.owe(self._write, self._desk.fail, job, problem(error)["detail"])

    def _interrupt(self, work: Work, error: Unavailable) -> None:
        """Something that the jobs need is down: they wait again, a bounded number of times."""
        for job in work.jobs:
            log.warning("job interrupted", extra={**about(job), "detail": error.detail})
            self._interrupted[job.id] += 1
            if self._interrupted[job.id] >= INTERRUPTIONS:
                self._leave_job(work, job.id, error)
        self._hand_back(work)

    def _progress(self, work: Work, name: str, progress: Progress) -> None:
        """Tell how far a job is; the desk knows whether it is still this worker's."""
        if name not in work.members:
            return
        try:
            self._desk.progress(work.members[name][1], progress)
        except LeaseLost as error:
            self._leave_job(work, name, error)

    def _write(self, action: Callable[..., None], job: RunningJob, *arguments: object) -> None:
        """Write a job's end. Where that cannot be, for a reason of its own, the sweep finds the job again."""
        try:
            action(job, *arguments)
        except (PalimpsestError, OSError):
            raise
        except Exception:
            log.exception("the end of a job cannot be written", extra=about(job))
            self._desk.abandon(job)

    def _leave_jobs(self, work: Work, error: Exception | None = None) -> None:
        """The steps have come to an end: so have all jobs that were left."""
        for job in work.jobs:
            self._leave_job(work, job.id, error)
        self._dismiss(work)

    def _leave_job(self, work: Work, name: str, error: Exception | None = None) -> None:
        """A job has ended: nothing is left to do for it but to acknowledge its delivery."""
        if name not in work.members:
            return
        delivery, job = work.members.pop(name)
        if error is None:
            log.info("job ended", extra=about(job))
        else:
            self._fail(job, error)
        self._followed = float("-inf")  # an edit has moved the head
        self._interrupted.pop(name, None)
        self._acknowledge(delivery, "end.after_publish")
        if not work.members:
            self._dismiss(work)

    def _dismiss(self, work: Work) -> None:
        """Nothing remains to be done."""
        work.steps.close()
        if work in self._works:
            self._works.remove(work)

    # watching

    def _running(self) -> list[Generation | Comparison]:
        """The calls that are being answered."""
        return [*dict.fromkeys(g for g, _ in self._generations.values()), *self._comparisons]

    def _look(self) -> None:
        """Leave the calls that are another worker's by now, and end those that nobody waits for any more."""
        now = time.monotonic()
        if now - self._looked < self._pace.look:
            return
        self._looked = now
        for call in self._running():
            if not self._broker.owns(call.delivery):
                log.warning("call taken over by another worker", extra=about(call.delivery))
                self._discard(call)
                self._owed.owe(
                    self._broker.done, call.delivery
                )  # changes nothing but what the broker remembers
            elif self._broker.cancelled(call.channel):
                self._cancel(call)
        self._owed.pay()

    def _cancel(self, call: Generation | Comparison) -> None:
        if isinstance(call, Generation):
            call.close()
            self._end([call])
        else:
            self._discard(call)
            self._refuse(call.delivery, Cancelled("the comparison was cancelled."))

    def _follow(self) -> None:
        """Keep up with the ledger: build the newest version and attest to its digest."""
        now = time.monotonic()
        if now - self._followed < self._pace.follow:
            return
        self._followed = now
        head = self.replica.head()
        if self.position is not None and self.position[0] == head:
            return
        try:
            digest = self.replica.vouch(head)
        except (Unavailable, Disagrees):
            raise
        except Exception:
            # Older versions can still be served; readiness shows that this replica is not at head.
            log.exception("version cannot be built", extra={"version": head})
            return
        self._desk.heartbeat(head, digest)
        self._desk.tell_room(head, self.replica.room(head))
        self.position = (head, digest)
        log.info("version reached", extra={"version": head, "digest": digest})

    # ends

    def _acknowledge(self, delivery: Delivery, point: str = "") -> None:
        """Tell the broker that a delivery is dealt with, after all that was owed before."""
        if point:
            self._owed.owe(crash_points.reach, point)
        self._owed.owe(self._broker.done, delivery)
        self._owed.owe(crash_points.reach, "done.after")

    def _refuse(self, delivery: Delivery, error: Exception) -> None:
        """End a call with an error."""
        if isinstance(error, ValidationError):
            error = InvalidInput("the request was not understood by the worker: update it with the API.")
        if not isinstance(error, PalimpsestError):
            log.error("call failed", exc_info=error, extra={**about(delivery), "kind": delivery.kind})
        self._owed.tell(delivery.job_id, "error", problem(error), last=True)
        self._acknowledge(delivery)

    def _discard(self, call: Generation | Comparison) -> None:
        """Work for a call no longer, without a word."""
        if isinstance(call, Comparison):
            self._comparisons.remove(call)
            call.steps.close()
            return
        for r in call.rows:
            self._generations.pop(r)
        call.close()

    def _close(self) -> None:
        """Stop kindly: hand the jobs back, let generations end, and hand back what has not."""
        for work in self._works[::-1]:
            self._hand_back(work)
        self._owed.pay()
        deadline = time.monotonic() + self._pace.grace
        while (self._lanes or self._comparisons) and time.monotonic() < deadline:
            self.turned = time.monotonic()
            self._look()
            self._decode()
            self._compare()
        for call in self._running():
            self._discard(call)
            self._leave(call)
        self._lanes = Lanes(self.replica, self._pace.rows, self._memory)
        self._owed.pay()

    def _leave(self, call: Generation | Comparison) -> None:
        """Another worker answers a call that cannot be ended here. Where there is none, a client that has heard a part
        of it is told."""
        if self._desk.sole and isinstance(call, Generation) and call.begun:
            self._refuse(call.delivery, STOPPING)
        else:
            self._owed.owe(self._broker.give_back, call.delivery)

    def _hand_back(self, work: Work) -> None:
        """Its jobs wait again, as if they had not been begun; `release` rings their bells."""
        self._dismiss(work)
        for delivery, job in work.members.values():
            log.info("job handed back", extra=about(job))
            self._owed.owe(self._write, self._desk.release, job)
            self._acknowledge(delivery)


def about(work: Delivery | RunningJob) -> dict[str, str]:
    """What a line of the log says of a call or a job: what it is, and which HTTP request asked for it."""
    name = work.job_id if isinstance(work, Delivery) else work.id
    return {"job": name, **({"request": work.request_id} if work.request_id else {})}
