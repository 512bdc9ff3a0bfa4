"""The calls of the service, written once for `Client` and `AsyncClient`."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import date, datetime
from typing import IO, Any, Literal, Required, TypedDict, TypeVar
from urllib.parse import quote, urlencode

from palimpsest.errors import EditRejected, JobFailed, error_from_problem
from palimpsest.resources import (
    Comparison,
    Edit,
    EditTable,
    Entry,
    Evaluation,
    Export,
    FactChange,
    Generation,
    Job,
    Model,
    NamedVersion,
    Progress,
    RevertResult,
    Token,
    Trace,
    Training,
    Verification,
)
from palimpsest.sync_async import endpoint, iterable_endpoint
from palimpsest.transport import Transport, drop_none

J = TypeVar("J", bound=Job)
Version = int | str  #: a number, "head", "base", or a name that `name_version` gave
ExportFormat = Literal["peft", "safetensors", "edits"]
OnProgress = Callable[[Progress], object]
MEDIA_TYPES = {"svg": "image/svg+xml", "png": "image/png", "html": "text/html"}
MAX_PREFER_WAIT = 30.0  #: seconds that the service may delay a response


class Message(TypedDict):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class ChatPrompt(TypedDict, total=False):
    """A conversation in place of a prompt. `continue_final_message` continues the last message, one of the
    assistant."""

    messages: Required[Sequence[Message]]
    continue_final_message: bool


class Neighbour(TypedDict):
    """A prompt whose answer the edit must preserve."""

    prompt: str
    target: str


class ChatNeighbour(ChatPrompt):
    """A conversation whose answer the edit must preserve."""

    target: Required[str]


class Probes(TypedDict, total=False):
    """Prompts that measure an edit: paraphrases that must change, and neighbours that must not. "auto": the service
    finds them."""

    paraphrase: Sequence[str | ChatPrompt] | Literal["auto"]
    neighborhood: Sequence[Neighbour | ChatNeighbour] | Literal["auto"]


#: a text to continue, or a conversation to answer in the form of the model's chat template
Prompt = str | Sequence[Message]


class EditRequest(TypedDict, total=False):
    """The body of `POST /edits`: with `prompt`, or with `messages`."""

    subject: Required[str]
    prompt: str
    messages: Sequence[Message]
    continue_final_message: bool
    target_new: str
    target_true: str
    separator: Literal["", " "]
    objective: Literal["write", "erase", "amplify"]
    on_conflict: Literal["report", "supersede", "reject"]
    method: str
    hparams: Mapping[str, Any]
    probes: Probes | Literal["auto"]
    guard: Mapping[str, Any]
    batch: str
    dry_run: bool
    try_layers: bool


class Endpoints:
    """The calls of both clients. Arguments that are None take the service's default; `/docs` of the service lists all
    fields."""

    _transport: Transport
    _prefer_wait: float  #: seconds that the service may delay a response; less than the client's timeout

    # edits

    @endpoint
    async def edit(
        self,
        subject: str,
        prompt: Prompt,
        target_new: str | None = None,
        target_true: str | None = None,
        *,
        continue_final_message: bool | None = None,
        separator: Literal["", " "] | None = None,
        objective: Literal["write", "erase", "amplify"] | None = None,
        on_conflict: Literal["report", "supersede", "reject"] | None = None,
        method: str | None = None,
        form: Literal["weights", "gated"] | None = None,
        hparams: Mapping[str, Any] | None = None,
        probes: Probes | Literal["auto"] | None = None,
        guard: Mapping[str, Any] | None = None,
        batch: str | None = None,
        dry_run: bool | None = None,
        try_layers: bool | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Edit:
        """Edit the model so that the prompt continues with `target_new`; `{}` in the prompt stands for the subject.

        The prompt may be a list of messages that mention the subject: the model then answers the conversation with
        `target_new`, or with `continue_final_message` continues its last message, one of the assistant.

        Return the applied edit. Raise `EditRejected` when the guard rejects it. A dry run is returned in either case.
        With `wait=False` return the queued edit. `key` is an idempotency key: a second call with it returns the same
        edit.

        The service finds probes unless some are given; `{}` gives none. `Edit.also_changed` lists the other subjects
        whose answers the edit changes.
        """
        body = drop_none(
            subject=subject,
            **_prompt_fields(prompt),
            continue_final_message=continue_final_message,
            target_new=target_new,
            target_true=target_true,
            separator=separator,
            objective=objective,
            on_conflict=on_conflict,
            method=method,
            form=form,
            hparams=hparams,
            probes=probes,
            guard=guard,
            batch=batch,
            dry_run=dry_run,
            try_layers=try_layers,
        )
        edit = await self._create_job(Edit, body, key, wait, on_progress)
        return _require_applied(edit) if wait else edit

    @endpoint
    async def edit_many(
        self,
        edits: Iterable[EditRequest],
        *,
        batch: str | None = None,
        key: str | None = None,
        wait: bool = True,
        on_end: Callable[[Edit], object] | None = None,
    ) -> list[Edit]:
        """Submit up to 1,000 edits. All of them are queued, or none if one is invalid. `batch` is a name that they
        share, for `edits` and `revert_batch`.

        Return them in order once all have ended. Rejected edits do not raise: check `applied` and `reason`. `on_end` is
        called with each edit that has ended.
        """
        body = drop_none(edits=list(edits), batch=batch)
        response = await self._transport.create("/edits", body, key, 0)
        return await self._edits_of(response, wait, on_end)

    @endpoint
    async def get_edit(self, id: str) -> Edit:
        """Return an edit."""
        return await self._get_job(Edit, id)

    @iterable_endpoint
    def edits(
        self,
        *,
        status: str | None = None,
        subject: str | None = None,
        search: str | None = None,
        actor: str | None = None,
        batch: str | None = None,
        since: datetime | date | str | None = None,
        until: datetime | date | str | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Edit]:
        """Yield edits, newest first; at most `limit`.

        `search`: words that are in the subject, the prompt or the objects. `since` and `until`: when they were created;
        a day in `until` is included.
        """
        filters = drop_none(status=status, subject=subject, search=search, actor=actor, batch=batch)
        filters |= _period(since, until)
        return self._transport.iter_items("/edits", Edit, limit, **filters)

    @endpoint
    async def save_edits(
        self,
        file: IO[bytes],
        form: Literal["csv", "json"] = "csv",
        *,
        status: str | None = None,
        subject: str | None = None,
        search: str | None = None,
        actor: str | None = None,
        batch: str | None = None,
        since: datetime | date | str | None = None,
        until: datetime | date | str | None = None,
    ) -> None:
        """Write the list that `edits` would yield to a file in chunks: as CSV, or as one JSON object."""
        filters = drop_none(status=status, subject=subject, search=search, actor=actor, batch=batch)
        filters |= _period(since, until)
        await self._transport.download_to(file, "/edits/export", format=form, **filters)

    @endpoint
    async def preview_edits(self, csv: str, columns: Mapping[str, Sequence[str]] | None = None) -> EditTable:
        """Check the text of a CSV file line by line; nothing is queued. `edit` of each valid line can be given to
        `edit_many`. `columns`: the columns of a field, where they have other names."""
        return EditTable.from_json(
            await self._transport.post_query("/edits/preview", drop_none(csv=csv, columns=columns))
        )

    @endpoint
    async def revert_many(self, edits: Iterable[Edit | str]) -> RevertResult:
        """Revert up to 1,000 edits together: all, or none if one does not exist. Those that are not applied yet are
        cancelled."""
        ids = [edit if isinstance(edit, str) else edit.id for edit in edits]
        return RevertResult.from_json(await self._transport.post_query("/edits/revert", {"edits": ids}))

    @endpoint
    async def revert_batch(self, batch: str) -> RevertResult:
        """Revert all edits of a batch together."""
        return RevertResult.from_json(await self._transport.post_query("/edits/revert", {"batch": batch}))

    @endpoint
    async def revert(self, edit: Edit | str, *, wait: bool = True) -> Edit:
        """Revert an applied edit, or cancel one that is not applied yet. Repeating the call has no further effect."""
        return await self._cancel_or_revert(Edit, edit, wait)

    @endpoint
    async def delta(self, edit: Edit | str) -> bytes:
        """Return the factors of an edit in the safetensors format."""
        return await self._transport.download(f"{_job_path(Edit, edit)}/delta")

    # traces

    @endpoint
    async def trace(
        self,
        prompt: Prompt,
        subject: str,
        *,
        continue_final_message: bool | None = None,
        target: str | None = None,
        separator: Literal["", " "] | None = None,
        kinds: Sequence[Literal["hidden", "mlp", "attn"]] | None = None,
        window: int | None = None,
        samples: int | None = None,
        noise: float | str | None = None,
        mentions: Literal["all", "last"] | None = None,
        severed: bool | None = None,
        version: Version | None = None,
        seed: int | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Trace:
        """Compute which hidden states carry a fact (causal tracing). `picture` renders the result.

        The prompt may be a list of messages that mention the subject.
        """
        body = drop_none(
            **_prompt_fields(prompt),
            continue_final_message=continue_final_message,
            subject=subject,
            target=target,
            separator=separator,
            kinds=kinds,
            window=window,
            samples=samples,
            noise=noise,
            mentions=mentions,
            severed=severed,
            version=version,
            seed=seed,
        )
        trace = await self._create_job(Trace, body, key, wait, on_progress)
        return _require_success(trace) if wait else trace

    @endpoint
    async def get_trace(self, id: str) -> Trace:
        """Return a trace."""
        return await self._get_job(Trace, id)

    @iterable_endpoint
    def traces(self, *, limit: int | None = None) -> AsyncIterator[Trace]:
        """Yield traces, newest first; at most `limit`."""
        return self._transport.iter_items("/trace", Trace, limit)

    @endpoint
    async def picture(self, job: Trace | Evaluation, form: Literal["svg", "png", "html"] = "svg") -> bytes:
        """Return the heat map of a trace or the plot of an evaluation; `html` is a self-contained page."""
        return await self._transport.download(_job_path(type(job), job), MEDIA_TYPES[form])

    # evaluations

    @endpoint
    async def evaluate(
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
        suites: Sequence[str] | None = None,
        recall_facts: int | None = None,
        damage: bool | None = None,
        damage_texts: int | None = None,
        seed: int | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Evaluation:
        """Measure the quality of edits on records, or on the fact table of the model. The ledger does not change."""
        body = drop_none(
            records=None if records is None else list(records),
            dataset=dataset,
            limit=limit,
            method=method,
            hparams=hparams,
            objective=objective,
            mode=mode,
            checkpoints=checkpoints,
            search_model=search_model,
            strengths=strengths,
            batch_size=batch_size,
            generation=generation,
            suites=None if suites is None else list(suites),
            recall_facts=recall_facts,
            damage=damage,
            damage_texts=damage_texts,
            seed=seed,
        )
        evaluation = await self._create_job(Evaluation, body, key, wait, on_progress)
        return _require_success(evaluation) if wait else evaluation

    @endpoint
    async def get_evaluation(self, id: str) -> Evaluation:
        """Return an evaluation."""
        return await self._get_job(Evaluation, id)

    @iterable_endpoint
    def evaluations(self, *, limit: int | None = None) -> AsyncIterator[Evaluation]:
        """Yield evaluations without their results, newest first; at most `limit`."""
        return self._transport.iter_items("/evaluations", Evaluation, limit)

    @endpoint
    async def report(
        self, evaluations: Iterable[Evaluation | str], form: Literal["html", "csv"] = "html"
    ) -> bytes:
        """Return evaluations beside each other, with paired differences from the first: a self-contained page, or CSV
        with a line for each measure."""
        ids = [e if isinstance(e, str) else e.id for e in evaluations]
        query = urlencode({"id": ids, "format": form}, doseq=True)
        return await self._transport.download(f"/evaluations/report?{query}")

    # trainings

    @endpoint
    async def train(
        self,
        records: Sequence[Mapping[str, Any]] | None = None,
        *,
        dataset: Literal["facts"] | None = None,
        limit: int | None = None,
        layer: int | None = None,
        dimensions: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
        false_open_rate: float | None = None,
        seed: int | None = None,
        key: str | None = None,
        wait: bool = True,
        on_progress: OnProgress | None = None,
    ) -> Training:
        """Train the scope classifier of SERAC on records with paraphrases, or on the fact table of the model."""
        body = drop_none(
            records=None if records is None else list(records),
            dataset=dataset,
            limit=limit,
            layer=layer,
            dimensions=dimensions,
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            false_open_rate=false_open_rate,
            seed=seed,
        )
        training = await self._create_job(Training, body, key, wait, on_progress)
        return _require_success(training) if wait else training

    @endpoint
    async def get_training(self, id: str) -> Training:
        """Return a training."""
        return await self._get_job(Training, id)

    @iterable_endpoint
    def trainings(self, *, limit: int | None = None) -> AsyncIterator[Training]:
        """Yield trainings, newest first; at most `limit`."""
        return self._transport.iter_items("/trainings", Training, limit)

    # jobs of all kinds

    @iterable_endpoint
    def jobs(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        exhausted: bool | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[Job]:
        """Yield jobs of every kind, newest first; at most `limit`. `exhausted`: failed after the maximum number of
        attempts."""
        exhausted_text = None if exhausted is None else str(exhausted).lower()
        return self._transport.iter_items(
            "/jobs", Job, limit, status=status, kind=kind, exhausted=exhausted_text
        )

    @endpoint
    async def retry(self, job: Job | str) -> Job:
        """Queue a failed job again with all its attempts."""
        return Job.from_json(await self._transport.post_once(f"{_job_path(Job, job)}/retry"))

    # generation

    @endpoint
    async def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        version: Version | None = None,
        min_version: int | None = None,
    ) -> Generation:
        """Generate a continuation of the prompt with the newest version, or with `version`.

        The prompt is a text, or the messages of a conversation, which a chat model answers.
        `min_version=edit.version` generates with that version or a newer one, on any worker: the caller reads its own
        edit.
        """
        body = drop_none(
            **_prompt_fields(prompt),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            version=version,
            min_version=min_version,
        )
        return Generation.from_json(await self._transport.post_query("/generate", body))

    @endpoint
    async def generate_many(
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
    ) -> list[Generation]:
        """Generate continuations of up to 64 prompts, all with the same version."""
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
        response = await self._transport.post_query("/generate", body)
        shared = {name: response.get(name) for name in ("version", "usage", "seconds")}
        return [Generation.from_json({**choice, **shared}) for choice in response["choices"]]

    @iterable_endpoint
    async def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        version: Version | None = None,
        min_version: int | None = None,
    ) -> AsyncIterator[Token]:
        """Generate token by token. The last `Token` has an empty text and the `finish_reason`; see `Token.reset`."""
        body = drop_none(
            **_prompt_fields(prompt),
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
        async with aclosing(self._transport.stream_events("/generate", body)) as events:
            async for event in events:
                data = event.json()
                if event.event == "error":
                    raise error_from_problem(500, data)
                if event.event == "reset":
                    reset = True
                elif event.event == "token":
                    yield Token.from_json({**data, "reset": reset})
                    reset = False
                elif event.event == "end":
                    reason = data["choices"][0]["finish_reason"]
                    yield Token.from_json({**data, "text": "", "finish_reason": reason, "reset": reset})

    @endpoint
    async def compare(
        self,
        prompt: Prompt,
        versions: tuple[Version, Version] = ("base", "head"),
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        top: int | None = None,
    ) -> Comparison:
        """Generate with two versions from the same prompt, and return the next tokens whose probabilities differ
        most."""
        body = drop_none(
            **_prompt_fields(prompt),
            versions=list(versions),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
            top=top,
        )
        return Comparison.from_json(await self._transport.post_query("/compare", body))

    # ledger and model

    @iterable_endpoint
    def ledger(self, *, version: Version | None = None) -> AsyncIterator[Entry]:
        """Yield the entries of the ledger, oldest first; up to `version`, or all."""
        return self._transport.iter_items("/ledger", Entry, version=version)

    @iterable_endpoint
    def diff(self, before: Version, after: Version = "head") -> AsyncIterator[FactChange]:
        """Yield the facts whose active edit differs between two versions."""
        return self._transport.iter_items("/ledger/diff", FactChange, before=before, after=after)

    @endpoint
    async def name_version(self, name: str, version: Version = "head") -> NamedVersion:
        """Give a name to a version. It means this version until it is deleted, whatever is applied or reverted."""
        body = {"version": version}
        return NamedVersion.from_json(await self._transport.put(_name_path(name), body))

    @iterable_endpoint
    def version_names(self) -> AsyncIterator[NamedVersion]:
        """Yield the names that were given to versions, by name."""
        return self._transport.iter_items("/versions", NamedVersion)

    @endpoint
    async def delete_version_name(self, name: str) -> NamedVersion:
        """Delete a name; the version stays, with its number."""
        return NamedVersion.from_json(await self._transport.delete(_name_path(name)))

    @endpoint
    async def verify(
        self, *, expect: str | None = None, expect_record: str | None = None, full: bool = False
    ) -> Verification:
        """Verify the chains of hashes, the signatures, the factors and the weights of the workers.

        The result is true if all match. `expect` and `expect_record` are the `anchor` and `record_anchor` of an earlier
        verification, which the ledger must still contain. `full` reads the bytes of all factors.
        """
        response = await self._transport.get(
            "/ledger/verify", expect=expect, expect_record=expect_record, full=True if full else None
        )
        return Verification.from_json(response)

    @endpoint
    async def models(self) -> list[Model]:
        """Return the served model, its head version and its workers."""
        return [Model.from_json(one) for one in (await self._transport.get("/models"))["items"]]

    # export and import

    @endpoint
    async def export(
        self, version: Version = "head", format: ExportFormat = "peft", *, solve_gated: bool = False
    ) -> bytes:
        """Return the edits of a version as a file.

        `peft` is a zip with a LoRA adapter for PEFT, `safetensors` the edited weights, `edits` a file for
        `import_edits`. With `solve_gated` gated edits are solved into an adapter or weights, which then differ from
        what the service serves.
        """
        file = io.BytesIO()
        await self._export(file, version, format, solve_gated)
        return file.getvalue()

    @endpoint
    async def export_to(
        self,
        file: IO[bytes],
        version: Version = "head",
        format: ExportFormat = "peft",
        *,
        solve_gated: bool = False,
    ) -> str:
        """Write the edits of a version to a file in chunks; see `export`. Return the file name that the service
        suggests."""
        return await self._export(file, version, format, solve_gated)

    @endpoint
    async def import_edits(
        self,
        exported: bytes,
        *,
        key: str | None = None,
        wait: bool = True,
        on_end: Callable[[Edit], object] | None = None,
    ) -> list[Edit]:
        """Commit edits that another service exported, with their exported factors. Edits that are already present are
        skipped."""
        response = await self._transport.create("/import", exported, key, 0)
        return await self._edits_of(response, wait, on_end)

    @endpoint
    async def submit_import(
        self, exported: bytes, *, key: str | None = None
    ) -> tuple[list[Edit], frozenset[str]]:
        """Submit edits that another service exported; return them, and the ids of those that were already present."""
        response = await self._transport.create("/import", exported, key, 0)
        return await self._edits_of(response, False, None), frozenset(response["already_present"])

    @endpoint
    async def get_export(self, id: str) -> Export:
        """Return an export by its id."""
        return await self._get_job(Export, id)

    # shared by the calls

    async def _export(
        self, file: IO[bytes], version: Version, format: ExportFormat, solve_gated: bool
    ) -> str:
        body = {"version": version, "format": format} | ({"solve_gated": True} if solve_gated else {})
        job = _require_success(await self._create_job(Export, body, None, True, None))
        return await self._transport.download_to(file, f"{_job_path(Export, job)}/file")

    async def _create_job(
        self,
        kind: type[J],
        body: Mapping[str, Any],
        key: str | None,
        wait: bool,
        on_progress: OnProgress | None,
    ) -> J:
        prefer_wait = self._prefer_wait if wait and on_progress is None else 0
        job = kind.from_json(await self._transport.create(kind.path, body, key, prefer_wait))
        return await self._wait_until_finished(job, on_progress) if wait else job

    async def _get_job(self, kind: type[J], id: str) -> J:
        return kind.from_json(await self._transport.get(_job_path(kind, id)))

    async def _cancel_or_revert(self, kind: type[J], job: J | str, wait: bool) -> J:
        response = await self._transport.delete(_job_path(kind, job), self._prefer_wait if wait else 0)
        job = kind.from_json(response)
        return await self._wait_until_finished(job) if wait else job

    async def _edits_of(
        self, response: Mapping[str, Any], wait: bool, on_end: Callable[[Edit], object] | None
    ) -> list[Edit]:
        """Return the edits of a response, after they have ended if `wait` is set."""
        edits = [Edit.from_json(one) for one in response["items"]]
        if not wait:
            return edits
        finished = []
        for edit in edits:
            finished.append(await self._wait_until_finished(edit))
            if on_end is not None:
                on_end(finished[-1])
        return finished

    async def _wait_until_finished(self, job: J, on_progress: OnProgress | None = None) -> J:
        """Follow the events of a job for its progress, then read its final state."""
        kind, path = type(job), _job_path(type(job), job)
        if on_progress is not None and not job.finished:
            async with aclosing(self._transport.follow_events(f"{path}/events")) as events:
                async for event in events:
                    if event.event == "progress":
                        on_progress(Progress.from_json(event.json()))
        while not job.finished:
            job = kind.from_json(await self._transport.get(path, wait=self._prefer_wait))
        return job


def _job_path(kind: type[Job], job: Job | str) -> str:
    return f"{kind.path}/{quote(job if isinstance(job, str) else job.id, safe='')}"


def _name_path(name: str) -> str:
    return f"/versions/{quote(name, safe='')}"


def _period(since: datetime | date | str | None, until: datetime | date | str | None) -> dict[str, str]:
    """Return the parameters of a period in ISO 8601."""
    times = drop_none(since=since, until=until)
    return {name: t if isinstance(t, str) else t.isoformat() for name, t in times.items()}


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """Return the field of a request that the prompt is."""
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}


def _require_applied(edit: Edit) -> Edit:
    """Return an edit that was applied or measured as a dry run; raise the reason otherwise."""
    if edit.status == "rejected" and not edit.dry_run:
        raise EditRejected(f"the edit was rejected: {edit.reason}", edit, "edit_rejected")
    return edit if edit.applied or edit.dry_run else _require_success(edit)


def _require_success(job: J) -> J:
    """Return a job that has its result; raise its error otherwise."""
    if job.status in ("failed", "cancelled"):
        code = job.error.code if job.error else job.status
        detail = f"{job.id} failed: {job.reason}" if job.status == "failed" else f"{job.id} was cancelled."
        raise JobFailed(detail, job, code)
    return job
