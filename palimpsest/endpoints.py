"""Everything that can be asked, each call once: `Client` takes its steps, and so does `AsyncClient`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar
from urllib.parse import quote

from palimpsest.errors import EditRejected, JobFailed, error_from_problem
from palimpsest.flow import Emit, Flow, Listing
from palimpsest.resources import (
    Comparison,
    Edit,
    Entry,
    Evaluation,
    Generation,
    Job,
    Model,
    Progress,
    Token,
    Trace,
    Verification,
)
from palimpsest.sse import Event
from palimpsest.sync_async import endpoint, iterable_endpoint
from palimpsest.transport import Transport, drop_none

J = TypeVar("J", bound=Job)
Version = int | Literal["head", "base"]
OnProgress = Callable[[Progress], object]
MEDIA_TYPES = {"svg": "image/svg+xml", "png": "image/png", "html": "text/html"}
MAX_PREFER_WAIT = 30.0  #: seconds that the service holds an answer back


class Neighbour(TypedDict):
    """A prompt that must keep its answer."""

    prompt: str
    target: str


class Probes(TypedDict, total=False):
    """Prompts that measure an edit: those that should change, and those that must not."""

    paraphrase: Sequence[str]
    neighborhood: Sequence[Neighbour]


class _RequiredEditFields(TypedDict):
    subject: str
    prompt: str


class EditRequest(_RequiredEditFields, total=False):
    """An edit among many, in the words of `POST /edits`."""

    target_new: str
    target_true: str
    objective: Literal["write", "erase", "amplify"]
    on_conflict: Literal["report", "supersede", "reject"]
    method: str
    hparams: Mapping[str, Any]
    probes: Probes
    guard: Mapping[str, Any]
    dry_run: bool


class Endpoints:
    """The calls. What is left out is left to the service; its `/docs` has every field."""

    _transport: Transport
    _prefer_wait: float  #: seconds that an answer may be held back, less than the client has patience for

    # edits

    @endpoint
    def edit(
        self,
        subject: str,
        prompt: str,
        target_new: str | None = None,
        target_true: str | None = None,
        *,
        objective: Literal["write", "erase", "amplify"] | None = None,
        on_conflict: Literal["report", "supersede", "reject"] | None = None,
        method: str | None = None,
        hparams: Mapping[str, Any] | None = None,
        probes: Probes | None = None,
        guard: Mapping[str, Any] | None = None,
        dry_run: bool | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Flow[Edit]:
        """Make the model say `target_new` for the subject; the prompt has one `{}` where the subject stands.

        Returns when the edit has landed, and raises `Rejected`, with the figures, when the guard did not let it; a dry run is returned
        either way. With `wait=False` it returns as soon as the edit is queued. `key`: the same key never makes a second edit.
        """
        body = drop_none(
            subject=subject,
            prompt=prompt,
            target_new=target_new,
            target_true=target_true,
            objective=objective,
            on_conflict=on_conflict,
            method=method,
            hparams=hparams,
            probes=probes,
            guard=guard,
            dry_run=dry_run,
        )
        edit = yield from self._create_job(Edit, body, key, wait, on_progress)
        return _require_applied(edit) if wait else edit

    @endpoint
    def edit_many(
        self,
        edits: Iterable[EditRequest],
        *,
        key: str | None = None,
        wait: bool = True,
        on_end: Callable[[Edit], object] | None = None,
    ) -> Flow[list[Edit]]:
        """Ask for many edits at once, up to 1,000: all are queued, or none when one is invalid.

        Returns them in their order when all have ended. Some may be rejected: look at `landed` and `reason`. `on_end` hears of each
        that has ended.
        """
        response = yield from self._transport.create("/edits", {"edits": list(edits)}, key, 0)
        created = [Edit.from_json(one) for one in response["items"]]
        return (yield from self._wait_for_all(created, on_end)) if wait else created

    @endpoint
    def get_edit(self, id: str) -> Flow[Edit]:
        """The edit as it stands."""
        return (yield from self._get_job(Edit, id))

    @iterable_endpoint
    def edits(self, *, status: str | None = None, subject: str | None = None) -> Listing[Edit]:
        """All edits, newest first."""
        yield from self._transport.iter_items("/edits", Edit, **drop_none(status=status, subject=subject))

    @endpoint
    def revert(self, edit: Edit | str, *, wait: bool = True) -> Flow[Edit]:
        """Take an edit back, whatever came after it; cancel one that has not landed. Saying it twice is harmless."""
        return (yield from self._cancel_or_revert(Edit, edit, wait))

    @endpoint
    def delta(self, edit: Edit | str) -> Flow[bytes]:
        """The edit's vectors as safetensors."""
        return (yield from self._transport.download(f"{_job_path(Edit, edit)}/delta"))

    # traces

    @endpoint
    def trace(
        self,
        prompt: str,
        subject: str,
        *,
        target: str | None = None,
        kinds: Sequence[Literal["hidden", "mlp", "attn"]] | None = None,
        window: int | None = None,
        samples: int | None = None,
        noise: float | str | None = None,
        severed: bool | None = None,
        version: Version | None = None,
        seed: int | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Flow[Trace]:
        """Which hidden states carry the fact. `picture` draws what it found."""
        body = drop_none(
            prompt=prompt,
            subject=subject,
            target=target,
            kinds=kinds,
            window=window,
            samples=samples,
            noise=noise,
            severed=severed,
            version=version,
            seed=seed,
        )
        trace = yield from self._create_job(Trace, body, key, wait, on_progress)
        return _require_success(trace) if wait else trace

    @endpoint
    def get_trace(self, id: str) -> Flow[Trace]:
        """The trace as it stands."""
        return (yield from self._get_job(Trace, id))

    @iterable_endpoint
    def traces(self) -> Listing[Trace]:
        """All traces, newest first."""
        yield from self._transport.iter_items("/trace", Trace)

    @endpoint
    def picture(self, job: Trace | Evaluation, form: Literal["svg", "png", "html"] = "svg") -> Flow[bytes]:
        """A trace's heat map, or an evaluation's plot; as `html` a page that needs nothing else."""
        return (yield from self._transport.download(_job_path(type(job), job), MEDIA_TYPES[form]))

    # evaluations

    @endpoint
    def evaluate(
        self,
        records: Sequence[Mapping[str, Any]] | None = None,
        *,
        dataset: Literal["facts"] | None = None,
        limit: int | None = None,
        method: str | None = None,
        hparams: Mapping[str, Any] | None = None,
        objective: Literal["write", "erase", "amplify"] | None = None,
        mode: Literal["single", "sequence"] | None = None,
        checkpoints: Sequence[int] | None = None,
        search_model: Literal["base", "edited"] | None = None,
        strengths: Sequence[float] | None = None,
        batch_size: int | None = None,
        generation: bool | None = None,
        damage: bool | None = None,
        damage_texts: int | None = None,
        seed: int | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Flow[Evaluation]:
        """How good edits are on many records, or on the table of facts beside the model. The ledger stays as it is."""
        body = drop_none(
            records=None if records is None else list(records),
            dataset=dataset,
            limit=limit,
            method=method,
            hparams=hparams,
            objective=objective,
            mode=mode,
            checkpoints=checkpoints,
            found_on=search_model,
            strengths=strengths,
            together=batch_size,
            generation=generation,
            damage=damage,
            plain=damage_texts,
            seed=seed,
        )
        evaluation = yield from self._create_job(Evaluation, body, key, wait, on_progress)
        return _require_success(evaluation) if wait else evaluation

    @endpoint
    def get_evaluation(self, id: str) -> Flow[Evaluation]:
        """The evaluation as it stands."""
        return (yield from self._get_job(Evaluation, id))

    @iterable_endpoint
    def evaluations(self) -> Listing[Evaluation]:
        """All evaluations, newest first, without their results."""
        yield from self._transport.iter_items("/evaluations", Evaluation)

    # jobs of all kinds

    @iterable_endpoint
    def jobs(
        self, *, status: str | None = None, kind: str | None = None, dead: bool | None = None
    ) -> Listing[Job]:
        """Jobs of all kinds, newest first."""
        dead_text = None if dead is None else str(dead).lower()
        yield from self._transport.iter_items(
            "/jobs", Job, **drop_none(status=status, kind=kind, dead=dead_text)
        )

    @endpoint
    def retry(self, job: Job | str) -> Flow[Job]:
        """Let a failed job wait again, as if it had never been tried."""
        return Job.from_json((yield from self._transport.post_once(f"{_job_path(Job, job)}/retry")))

    def _wait_for(self, job: J, on_progress: OnProgress | None) -> Flow[J]:
        """See `wait_for` of the clients."""
        return (yield from self._wait_until_finished(job, on_progress))

    def _cancel(self, job: J, wait: bool) -> Flow[J]:
        """See `cancel` of the clients."""
        return (yield from self._cancel_or_revert(type(job), job, wait))

    # speech

    @endpoint
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        version: Version | None = None,
        min_version: int | None = None,
    ) -> Flow[Generation]:
        """What the model says on the newest version, or on another one.

        `min_version=edit.version` answers from that version or a newer one: it reads your own edit, whichever worker answers.
        """
        body = drop_none(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            version=version,
            min_version=min_version,
        )
        return Generation.from_json((yield from self._transport.post_query("/generate", body)))

    @endpoint
    def generate_many(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        version: Version | None = None,
        min_version: int | None = None,
    ) -> Flow[list[Generation]]:
        """The same for several prompts, up to 64, all of them on one version."""
        body = drop_none(
            prompts=list(prompts),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            version=version,
            min_version=min_version,
        )
        response = yield from self._transport.post_query("/generate", body)
        shared = {name: response.get(name) for name in ("version", "usage", "seconds")}
        return [Generation.from_json({**choice, **shared}) for choice in response["choices"]]

    @iterable_endpoint
    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        version: Version | None = None,
        min_version: int | None = None,
    ) -> Listing[Token]:
        """The same token by token. The last one is empty and has the `finish_reason`; see `Token.restart`."""
        body = drop_none(
            prompt=prompt,
            stream=True,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            version=version,
            min_version=min_version,
        )
        reset = False

        def on_event(event: Event) -> Listing[Token]:
            nonlocal reset
            if event.name == "error":
                raise error_from_problem(500, event.data)
            if event.name == "restart":
                reset = True
            elif event.name == "token":
                yield Emit(Token.from_json({**event.data, "restart": reset}))
                reset = False
            elif event.name == "end":
                reason = event.data["choices"][0]["finish_reason"]
                last = {**event.data, "text": "", "finish_reason": reason, "restart": reset}
                yield Emit(Token.from_json(last))

        yield from self._transport.stream_events("/generate", body, on_event)

    @endpoint
    def compare(
        self,
        prompt: str,
        versions: tuple[Version, Version] = ("base", "head"),
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        top: int | None = None,
    ) -> Flow[Comparison]:
        """One prompt on two versions, side by side, with the next tokens whose probability differs most."""
        body = drop_none(
            prompt=prompt,
            versions=list(versions),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            top=top,
        )
        return Comparison.from_json((yield from self._transport.post_query("/compare", body)))

    # ledger and model

    @iterable_endpoint
    def ledger(self, *, version: int | None = None) -> Listing[Entry]:
        """What was applied and reverted, oldest first, with who and when; up to a version, or all."""
        yield from self._transport.iter_items("/ledger", Entry, **drop_none(version=version))

    @endpoint
    def verify(self) -> Flow[Verification]:
        """Check the hash chain, every edit's factors and the workers' weights; true when all agree."""
        return Verification.from_json((yield from self._transport.get("/ledger/verify")))

    @endpoint
    def models(self) -> Flow[list[Model]]:
        """The resident model, its head version, and its workers."""
        return [Model.from_json(one) for one in (yield from self._transport.get("/models"))["items"]]

    # a version elsewhere

    @endpoint
    def export(
        self, version: Version = "head", format: Literal["peft", "safetensors", "edits"] = "peft"
    ) -> Flow[bytes]:
        """The edits of a version for use elsewhere: a zip with a LoRA adapter for PEFT, the edited weights, or the edits for `import_edits`."""
        return (
            yield from self._transport.download_when_ready(
                "/export", self._prefer_wait, version=str(version), format=format
            )
        )

    @endpoint
    def import_edits(
        self,
        exported: bytes,
        *,
        key: str | None = None,
        wait: bool = True,
        on_end: Callable[[Edit], object] | None = None,
    ) -> Flow[list[Edit]]:
        """Land the edits that another service exported, as they were found there. What is here already is left alone."""
        response = yield from self._transport.create("/import", exported, key, 0)
        created = [Edit.from_json(one) for one in response["items"]]
        return (yield from self._wait_for_all(created, on_end)) if wait else created

    # what the calls share

    def _create_job(
        self,
        kind: type[J],
        body: Mapping[str, Any],
        key: str | None,
        wait: bool,
        on_progress: OnProgress | None,
    ) -> Flow[J]:
        prefer_wait = self._prefer_wait if wait and on_progress is None else 0
        job = kind.from_json((yield from self._transport.create(kind.path, body, key, prefer_wait)))
        return (yield from self._wait_until_finished(job, on_progress)) if wait else job

    def _get_job(self, kind: type[J], id: str) -> Flow[J]:
        return kind.from_json((yield from self._transport.get(_job_path(kind, id))))

    def _cancel_or_revert(self, kind: type[J], job: J | str, wait: bool) -> Flow[J]:
        response = yield from self._transport.delete(_job_path(kind, job), self._prefer_wait if wait else 0)
        return (
            (yield from self._wait_until_finished(kind.from_json(response)))
            if wait
            else kind.from_json(response)
        )

    def _wait_for_all(self, edits: list[Edit], on_end: Callable[[Edit], object] | None) -> Flow[list[Edit]]:
        finished = []
        for edit in edits:
            finished.append((yield from self._wait_until_finished(edit)))
            if on_end is not None:
                on_end(finished[-1])
        return finished

    def _wait_until_finished(self, job: J, on_progress: OnProgress | None = None) -> Flow[J]:
        """The job when it has ended: the events say how far it is, the resource what became of it."""
        kind, path = type(job), _job_path(type(job), job)

        def on_event(event: Event) -> None:
            if event.name == "progress" and on_progress is not None:
                on_progress(Progress.from_json(event.data))

        if on_progress is not None and not job.finished:
            yield from self._transport.follow_events(f"{path}/events", on_event)
        while not job.finished:
            job = kind.from_json((yield from self._transport.long_poll(path, self._prefer_wait)))
        return job


def _job_path(kind: type[Job], job: Job | str) -> str:
    return f"{kind.path}/{quote(job if isinstance(job, str) else job.id, safe='')}"


def _require_applied(edit: Edit) -> Edit:
    """The edit, or the error that says why there is none."""
    if edit.status == "rejected" and not edit.dry_run:
        raise EditRejected(f"the edit was rejected: {edit.reason}", edit)
    return edit if edit.applied or edit.dry_run else _require_success(edit)


def _require_success(job: J) -> J:
    if job.status in ("failed", "cancelled"):
        raise JobFailed(f"{job.id} is {job.status}: {job.reason or 'it was asked to end.'}", job)
    return job
