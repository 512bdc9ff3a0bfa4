"""The one loop of a worker: it interleaves decoding with one step at a time of the running job.

A turn admits new requests (their version pinned then), gives every live batch a decode step and every comparison one of
its steps, then runs ONE step of the running job. So an edit never holds up the tokens of others for longer than one of
its steps, and no answer ever sees another version's weights: between steps the model holds its base bytes.

What the loop has to tell the broker or the desk is owed in order and paid at once; when that fails because they are down
it stays owed, `run` raises, and the next `run` goes on where it was.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from pydantic import ValidationError

from service.errors import Cancelled, InvalidInput, LeaseLost, PalimpsestError, Unavailable
from service.jobs.broker import KINDS, Broker, Delivery
from service.jobs.desk import Desk, RunningJob
from service.progress import Steps
from service.requests import CompareRequest, GenerateRequest
from service.serving.calls import Comparison, Generation, pinned, problem
from service.serving.comparison import compare_steps
from service.serving.generation import Row, Said, row
from service.serving.lanes import Lanes
from service.serving.replica import Replica

log = logging.getLogger(__name__)

Task = Callable[[RunningJob], Steps[None]]
CALLS = ("generate", "compare")
INTERRUPTIONS = 3  # times a job may find something down that it needs before it fails
STOPPING = Unavailable("the worker is stopping: ask again.")


@dataclass(eq=False)
class Work:
    """The job that is running, and what remains of it."""

    delivery: Delivery
    job: RunningJob
    steps: Steps[None]


@dataclass(frozen=True)
class Pace:
    """How the loop shares its time."""

    rows: int = 32  #: rows that decode side by side
    comparisons: int = 4  #: comparisons side by side
    wait: float = 1.0  #: longest sleep when there is nothing to do, in seconds
    look: float = 0.05  #: seconds between two looks for cancelled calls
    follow: float = 0.5  #: seconds between two looks at the ledger's head
    grace: float = 5.0  #: seconds for running generations to end when the loop is stopped


class Engine:
    """Serves one replica. All methods but `position` and `turned` belong to the thread that calls `run`."""

    def __init__(
        self,
        replica: Replica,
        desk: Desk,
        broker: Broker,
        tasks: Mapping[str, Task],
        pace: Pace | None = None,
    ) -> None:
        self.replica = replica
        self.position: tuple[int, str] | None = (
            None  #: the newest version that the replica can serve, and its digest
        )
        self.turned = time.monotonic()  #: when the loop last came round
        self._desk = desk
        self._broker = broker
        self._tasks = tasks
        self._jobs = tuple(kind for kind in KINDS if kind in tasks)
        self._pace = pace or Pace()
        self._lanes = Lanes(replica, self._pace.rows)
        self._generations: dict[Row, tuple[Generation, int]] = {}
        self._comparisons: list[Comparison] = []
        self._work: Work | None = None
        self._interrupted: Counter[str] = Counter()
        self._owed: deque[Callable[[], object]] = deque()
        self._looked = self._followed = float("-inf")

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set; then let generations end, and hand back what is not done."""
        while not stop.is_set():
            if not self.turn() and not stop.is_set():
                self._receive(self._broker.take((*CALLS, *self._jobs), 1, self._pace.wait))
        self._close()

    def turn(self) -> bool:
        """Once round; whether there was anything to do."""
        self.turned = time.monotonic()
        self._pay()
        self._follow()
        self._admit()
        self._look()
        busy = bool(self._lanes or self._comparisons or self._work)
        self._decode()
        self._compare()
        self._step_job()
        return busy

    # what is to be done

    def _admit(self) -> None:
        """Take what there is room for."""
        if free := self._lanes.free:
            self._receive(self._broker.take(("generate",), free, 0))
        if free := self._pace.comparisons - len(self._comparisons):
            self._receive(self._broker.take(("compare",), free, 0))
        if self._work is None and self._jobs:
            self._receive(self._broker.take(self._jobs, 1, 0))

    def _receive(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.kind not in CALLS:
                self._start_job(delivery)
                continue
            try:
                (self._start_generation if delivery.kind == "generate" else self._start_comparison)(delivery)
            except Exception as error:
                self._refuse(delivery, error)
        self._pay()

    def _start_generation(self, delivery: Delivery) -> None:
        request = GenerateRequest.model_validate(delivery.payload)
        version = pinned(request.version, self.replica.head(), request.min_version)
        rows = [row(self.replica.base, text, request) for text in request.texts()]
        self._lanes.add(version, self.replica.weights(version), rows)
        generation = Generation(delivery, request, version, rows)
        self._generations |= {r: (generation, i) for i, r in enumerate(rows)}

    def _start_comparison(self, delivery: Delivery) -> None:
        request = CompareRequest.model_validate(delivery.payload)
        head = self.replica.head()
        a, b = ((v, self.replica.weights(v)) for v in (pinned(v, head) for v in request.versions))
        steps = compare_steps(self.replica.base, self.replica.stand, request, (a, b))
        self._comparisons.append(Comparison(delivery, steps))

    def _start_job(self, delivery: Delivery) -> None:
        if self._work is not None:
            self._broker.give_back(delivery)
            return
        try:
            job = self._desk.start(delivery.job_id)
        except Exception:
            self._broker.give_back(delivery)
            raise
        if job is None:
            self._owe(self._broker.done, delivery)
            return
        log.info("job started", extra={"job": job.id, "kind": job.kind, "attempt": job.attempt})
        self._work = Work(delivery, job, self._tasks[job.kind](job))

    # one step of everything

    def _decode(self) -> None:
        for said in self._lanes.turn():
            self._speak(said)
            self._pay()

    def _speak(self, step: list[Said]) -> None:
        """Publish what one step of a lane said, then the ends it brought."""
        spoke: dict[Generation, None] = {}
        for said in step:
            generation, index = self._generations[said.row]
            spoke[generation] = None
            if said.piece and generation.request.stream:
                token = {"index": index, "text": said.piece, "version": generation.version}
                self._owe(self._broker.publish, generation.channel, "token", token)
            if said.row.finish_reason == "error":
                generation.close()
        for generation in spoke:
            if generation.ended:
                self._end_generation(generation)

    def _end_generation(self, generation: Generation) -> None:
        """Publish the end of a generation; it fails as a whole when one of its rows failed."""
        for r in generation.rows:
            self._generations.pop(r)
        if any(r.finish_reason == "error" for r in generation.rows):
            detail = (
                f"version {generation.version} could not speak: the worker's log has the details. Ask again."
            )
            self._refuse(generation.delivery, Unavailable(detail))
            return
        answer = generation.answer()
        self._owe(self._broker.publish, generation.channel, "end", answer, True)
        self._owe(self._broker.done, generation.delivery)
        fields = {"version": generation.version, "seconds": answer["seconds"], **answer["usage"]}
        log.info("generation ended", extra=fields)

    def _compare(self) -> None:
        for comparison in list(self._comparisons):
            try:
                next(comparison.steps)
                continue
            except StopIteration as end:
                self._owe(self._broker.publish, comparison.channel, "end", end.value, True)
                self._owe(self._broker.done, comparison.delivery)
            except Exception as error:
                self._refuse(comparison.delivery, error)
            self._comparisons.remove(comparison)
        self._pay()

    def _step_job(self) -> None:
        """One step of the running job. Whatever it raises is the end of this job and of nothing else."""
        if self._work is None:
            return
        work, desk = self._work, self._desk
        cancelled = desk.cancel_requested(work.job)
        try:
            if cancelled:
                raise Cancelled("the job was cancelled while it ran.")
            progress = next(work.steps)
        except StopIteration:
            log.info("job ended", extra={"job": work.job.id})
        except Cancelled:
            log.info("job cancelled", extra={"job": work.job.id})
            self._owe(desk.finish, work.job, "cancelled", None)
        except Unavailable as error:
            log.warning("job interrupted", extra={"job": work.job.id, "detail": error.detail})
            self._interrupted[work.job.id] += 1
            if self._interrupted[work.job.id] < INTERRUPTIONS:
                self._hand_back()
                return
            self._owe(desk.fail, work.job, error)
        except LeaseLost:
            log.warning("job taken over by another worker", extra={"job": work.job.id})
        except PalimpsestError as error:
            log.info("job failed", extra={"job": work.job.id, "detail": error.detail})
            self._owe(desk.fail, work.job, error)
        except Exception as error:
            log.exception("job failed", extra={"job": work.job.id})
            self._owe(desk.fail, work.job, problem(error)["detail"])
        else:
            self._owe(desk.progress, work.job, progress)
            self._pay()
            return
        self._work = None
        self._followed = float("-inf")  # an edit has moved the head
        self._interrupted.pop(work.job.id, None)
        work.steps.close()
        self._owe(self._broker.done, work.delivery)
        self._pay()

    # watching

    def _look(self) -> None:
        """End the calls that nobody waits for any more."""
        now = time.monotonic()
        if now - self._looked < self._pace.look:
            return
        self._looked = now
        for generation in {g for g, _ in self._generations.values()}:
            if self._broker.cancelled(generation.channel):
                generation.close()
                self._end_generation(generation)
        for comparison in list(self._comparisons):
            if self._broker.cancelled(comparison.channel):
                self._comparisons.remove(comparison)
                comparison.steps.close()
                self._refuse(comparison.delivery, Cancelled("the comparison was cancelled."))
        self._pay()

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
            digest = self.replica.digest(head)
        except Exception:
            # Older versions can still be served; readiness shows that this replica is not at head.
            log.exception("version cannot be built", extra={"version": head})
            return
        self._desk.attest(head, digest)
        self._desk.heartbeat(head, digest)
        self.position = (head, digest)
        log.info("version reached", extra={"version": head, "digest": digest})

    # telling

    def _owe(self, action: Callable[..., object], *arguments: object) -> None:
        self._owed.append(partial(action, *arguments))

    def _pay(self) -> None:
        """Tell what is owed, in order. A refusal is final; when the other side is down it is told later."""
        while self._owed:
            try:
                self._owed[0]()
            except Unavailable:
                raise
            except PalimpsestError as error:
                log.warning("refused", extra={"detail": error.detail})
            self._owed.popleft()

    def _refuse(self, delivery: Delivery, error: Exception) -> None:
        if isinstance(error, ValidationError):
            error = InvalidInput("the request was not understood by the worker: update it with the API.")
        if not isinstance(error, PalimpsestError):
            log.error("call failed", exc_info=error, extra={"kind": delivery.kind})
        self._owe(self._broker.publish, delivery.job_id, "error", problem(error), True)
        self._owe(self._broker.done, delivery)

    def _close(self) -> None:
        """Stop kindly: hand the running job back, let generations end, refuse the rest."""
        self._hand_back()
        deadline = time.monotonic() + self._pace.grace
        while (self._lanes or self._comparisons) and time.monotonic() < deadline:
            self._look()
            self._decode()
            self._compare()
        for generation in {g for g, _ in self._generations.values()}:
            for r in generation.rows:
                self._generations.pop(r)
            generation.close()
            self._leave(generation.delivery, generation.begun)
        for comparison in self._comparisons:
            comparison.steps.close()
            self._leave(comparison.delivery, begun=False)
        self._comparisons = []
        self._lanes = Lanes(self.replica, self._pace.rows)
        self._pay()

    def _leave(self, delivery: Delivery, begun: bool) -> None:
        """A call that cannot be ended here: another worker answers it, unless its client has heard a part."""
        if begun:
            self._refuse(delivery, STOPPING)
        else:
            self._owe(self._broker.give_back, delivery)

    def _hand_back(self) -> None:
        """The running job waits again, as if it had not been begun; `release` rings its bell."""
        if self._work is None:
            return
        work, self._work = self._work, None
        work.steps.close()
        log.info("job handed back", extra={"job": work.job.id})
        self._owe(self._desk.release, work.job)
        self._owe(self._broker.done, work.delivery)
        self._pay()
