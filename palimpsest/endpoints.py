"""Everything that can be asked, each call once: `Client` takes its steps, and so does `AsyncClient`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar
from urllib.parse import quote

from palimpsest.errors import Failed, Rejected, of_problem
from palimpsest.flow import Flow, Listing, Say
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
from palimpsest.sync_async import call, listing
from palimpsest.transport import Door, given

J = TypeVar("J", bound=Job)
Version = int | Literal["head", "base"]
OnProgress = Callable[[Progress], object]
MEDIA_TYPES = {"svg": "image/svg+xml", "png": "image/png", "html": "text/html"}
WAIT = 30.0  #: seconds that the service holds an answer back


class Neighbour(TypedDict):
    """A prompt that must keep its answer."""

    prompt: str
    target: str


class Probes(TypedDict, total=False):
    """Prompts that measure an edit: those that should change, and those that must not."""

    paraphrase: Sequence[str]
    neighborhood: Sequence[Neighbour]


class _Fact(TypedDict):
    subject: str
    prompt: str


class EditRequest(_Fact, total=False):
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


class Calls:
    """The calls. What is left out is left to the service; its `/docs` has every field."""

    _door: Door
    _wait: float  #: seconds that an answer may be held back, less than the client has patience for

    # edits

    @call
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
        body = given(
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
        made = yield from self._made(Edit, body, key, wait, on_progress)
        return _landed(made) if wait else made

    @call
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
        answer = yield from self._door.create("/edits", {"edits": list(edits)}, key, 0)
        made = [Edit.of(one) for one in answer["items"]]
        return (yield from self._all_ended(made, on_end)) if wait else made

    @call
    def get_edit(self, id: str) -> Flow[Edit]:
        """The edit as it stands."""
        return (yield from self._one(Edit, id))

    @listing
    def edits(self, *, status: str | None = None, subject: str | None = None) -> Listing[Edit]:
        """All edits, newest first."""
        yield from self._door.items("/edits", Edit, **given(status=status, subject=subject))

    @call
    def revert(self, edit: Edit | str, *, wait: bool = True) -> Flow[Edit]:
        """Take an edit back, whatever came after it; cancel one that has not landed. Saying it twice is harmless."""
        return (yield from self._taken_back(Edit, edit, wait))

    @call
    def delta(self, edit: Edit | str) -> Flow[bytes]:
        """The edit's vectors as safetensors."""
        return (yield from self._door.file(f"{_path(Edit, edit)}/delta"))

    # traces

    @call
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
        body = given(
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
        made = yield from self._made(Trace, body, key, wait, on_progress)
        return _done(made) if wait else made

    @call
    def get_trace(self, id: str) -> Flow[Trace]:
        """The trace as it stands."""
        return (yield from self._one(Trace, id))

    @listing
    def traces(self) -> Listing[Trace]:
        """All traces, newest first."""
        yield from self._door.items("/trace", Trace)

    @call
    def picture(self, of: Trace | Evaluation, form: Literal["svg", "png", "html"] = "svg") -> Flow[bytes]:
        """A trace's heat map, or an evaluation's plot; as `html` a page that needs nothing else."""
        return (yield from self._door.file(_path(type(of), of), MEDIA_TYPES[form]))

    # evaluations

    @call
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
        found_on: Literal["base", "edited"] | None = None,
        strengths: Sequence[float] | None = None,
        together: int | None = None,
        generation: bool | None = None,
        damage: bool | None = None,
        plain: int | None = None,
        seed: int | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Flow[Evaluation]:
        """How good edits are on many records, or on the table of facts beside the model. The ledger stays as it is."""
        body = given(
            records=None if records is None else list(records),
            dataset=dataset,
            limit=limit,
            method=method,
            hparams=hparams,
            objective=objective,
            mode=mode,
            checkpoints=checkpoints,
            found_on=found_on,
            strengths=strengths,
            together=together,
            generation=generation,
            damage=damage,
            plain=plain,
            seed=seed,
        )
        made = yield from self._made(Evaluation, body, key, wait, on_progress)
        return _done(made) if wait else made

    @call
    def get_evaluation(self, id: str) -> Flow[Evaluation]:
        """The evaluation as it stands."""
        return (yield from self._one(Evaluation, id))

    @listing
    def evaluations(self) -> Listing[Evaluation]:
        """All evaluations, newest first, without their results."""
        yield from self._door.items("/evaluations", Evaluation)

    # jobs of all kinds

    @listing
    def jobs(
        self, *, status: str | None = None, kind: str | None = None, dead: bool | None = None
    ) -> Listing[Job]:
        """Jobs of all kinds, newest first."""
        told = None if dead is None else str(dead).lower()
        yield from self._door.items("/jobs", Job, **given(status=status, kind=kind, dead=told))

    @call
    def retry(self, job: Job | str) -> Flow[Job]:
        """Let a failed job wait again, as if it had never been tried."""
        return Job.of((yield from self._door.once(f"{_path(Job, job)}/retry")))

    def _wait_for(self, job: J, on_progress: OnProgress | None) -> Flow[J]:
        """See `wait_for` of the clients."""
        return (yield from self._ended(job, on_progress))

    def _cancel(self, job: J, wait: bool) -> Flow[J]:
        """See `cancel` of the clients."""
        return (yield from self._taken_back(type(job), job, wait))

    # speech

    @call
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
        body = given(
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
        return Generation.of((yield from self._door.read("/generate", body)))

    @call
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
        body = given(
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
        answer = yield from self._door.read("/generate", body)
        shared = {name: answer.get(name) for name in ("version", "usage", "seconds")}
        return [Generation.of({**choice, **shared}) for choice in answer["choices"]]

    @listing
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
        body = given(
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
        restart = False

        def hear(event: Event) -> Listing[Token]:
            nonlocal restart
            if event.name == "error":
                raise of_problem(500, event.data)
            if event.name == "restart":
                restart = True
            elif event.name == "token":
                yield Say(Token.of({**event.data, "restart": restart}))
                restart = False
            elif event.name == "end":
                reason = event.data["choices"][0]["finish_reason"]
                last = {**event.data, "text": "", "finish_reason": reason, "restart": restart}
                yield Say(Token.of(last))

        yield from self._door.spoken("/generate", body, hear)

    @call
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
        body = given(
            prompt=prompt,
            versions=list(versions),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            top=top,
        )
        return Comparison.of((yield from self._door.read("/compare", body)))

    # ledger and model

    @listing
    def ledger(self, *, version: int | None = None) -> Listing[Entry]:
        """What was applied and reverted, oldest first, with who and when; up to a version, or all."""
        yield from self._door.items("/ledger", Entry, **given(version=version))

    @call
    def verify(self) -> Flow[Verification]:
        """Check the hash chain, every edit's factors and the workers' weights; true when all agree."""
        return Verification.of((yield from self._door.get("/ledger/verify")))

    @call
    def models(self) -> Flow[list[Model]]:
        """The resident model, its head version, and its workers."""
        return [Model.of(one) for one in (yield from self._door.get("/models"))["items"]]

    # a version elsewhere

    @call
    def export(
        self, version: Version = "head", format: Literal["peft", "safetensors", "edits"] = "peft"
    ) -> Flow[bytes]:
        """The edits of a version for use elsewhere: a zip with a LoRA adapter for PEFT, the edited weights, or the edits for `import_edits`."""
        return (yield from self._door.made("/export", self._wait, version=str(version), format=format))

    @call
    def import_edits(
        self,
        exported: bytes,
        *,
        key: str | None = None,
        wait: bool = True,
        on_end: Callable[[Edit], object] | None = None,
    ) -> Flow[list[Edit]]:
        """Land the edits that another service exported, as they were found there. What is here already is left alone."""
        answer = yield from self._door.create("/import", exported, key, 0)
        made = [Edit.of(one) for one in answer["items"]]
        return (yield from self._all_ended(made, on_end)) if wait else made

    # what the calls share

    def _made(
        self, kind: type[J], body: Mapping[str, Any], key: str | None, wait: bool, hear: OnProgress | None
    ) -> Flow[J]:
        held = self._wait if wait and hear is None else 0
        job = kind.of((yield from self._door.create(kind.path, body, key, held)))
        return (yield from self._ended(job, hear)) if wait else job

    def _one(self, kind: type[J], id: str) -> Flow[J]:
        return kind.of((yield from self._door.get(_path(kind, id))))

    def _taken_back(self, kind: type[J], job: J | str, wait: bool) -> Flow[J]:
        answer = yield from self._door.take_back(_path(kind, job), self._wait if wait else 0)
        return (yield from self._ended(kind.of(answer))) if wait else kind.of(answer)

    def _all_ended(self, edits: list[Edit], on_end: Callable[[Edit], object] | None) -> Flow[list[Edit]]:
        ended = []
        for one in edits:
            ended.append((yield from self._ended(one)))
            if on_end is not None:
                on_end(ended[-1])
        return ended

    def _ended(self, job: J, on_progress: OnProgress | None = None) -> Flow[J]:
        """The job when it has ended: the events say how far it is, the resource what became of it."""
        kind, path = type(job), _path(type(job), job)

        def hear(event: Event) -> None:
            if event.name == "progress" and on_progress is not None:
                on_progress(Progress.of(event.data))

        if on_progress is not None and not job.over:
            yield from self._door.followed(f"{path}/events", hear)
        while not job.over:
            job = kind.of((yield from self._door.look(path, self._wait)))
        return job


def _path(kind: type[Job], job: Job | str) -> str:
    return f"{kind.path}/{quote(job if isinstance(job, str) else job.id, safe='')}"


def _landed(edit: Edit) -> Edit:
    """The edit, or the error that says why there is none."""
    if edit.status == "rejected" and not edit.dry_run:
        raise Rejected(f"the edit was rejected: {edit.reason}", edit)
    return edit if edit.landed or edit.dry_run else _done(edit)


def _done(job: J) -> J:
    if job.status in ("failed", "cancelled"):
        raise Failed(f"{job.id} is {job.status}: {job.reason or 'it was asked to end.'}", job)
    return job
