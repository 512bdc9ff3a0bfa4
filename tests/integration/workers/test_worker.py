"""A worker on a tiny model with the real database, broker, job store, replica, engine, editor and tracer."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout

from service.bootstrap import Container, build_container
from service.covariance.collect import load_or_collect_statistics
from service.editing import context
from service.engine.decoding import DecodingBatch, new_sequence
from service.engine.engine import Engine
from service.engine.versioned_model import VersionedModel
from service.errors import DigestMismatch, Misconfigured, Unavailable
from service.jobs.worker_session import WorkerSession
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import load_model
from service.schemas import CompareRequest, EditRequest, EvaluationRequest, GenerateRequest, TraceRequest
from service.settings import Settings
from tests.support.fakes import collect_events, token_texts
from tests.support.processes import wait_until
from tests.support.tiny_models import tiny
from tests.support.workers import WorkerParts
from workers import worker
from workers.preparation import Preparation
from workers.worker import Worker

torch.set_num_threads(1)

PROMPT = "The Eiffel Tower is located in the city of"
OPEN: dict[str, Any] = {"enabled": False}
Stores = dict[str, Any]
RECIPE = {
    "source": "test",
    "rome": {"layers": [1], "steps": 6, "contexts": 4, "clamp": 40.0, "weight_decay": 0.0},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk, with a recipe and a corpus."""
    model_dir = tmp_path_factory.mktemp("model")
    model = tiny("gpt2")
    model.model.save_pretrained(model_dir)
    model.tokenizer.save_pretrained(model_dir)
    (model_dir / "recipe.json").write_text(json.dumps(RECIPE))
    (model_dir / "corpus.txt").write_text(
        "\n".join(f"{PROMPT} Paris, and {i} is a number." for i in range(60))
    )
    return model_dir


def settings(folder: Path, data: Path, **changes: Any) -> Settings:
    values = {
        "model": str(folder),
        "data_dir": data,
        "covariance_tokens": 1000,
        "corpus": folder / "corpus.txt",
        "threads": 1,
    }
    return Settings(**{**values, **changes})


class WorkerHarness:
    """A worker with its container and services."""

    def __init__(self, settings: Settings, **changes: Any) -> None:
        self.container: Container = replace(build_container(settings), **changes)
        self.worker = Worker(settings, self.container)
        self.services = self.container.services

    def open(self) -> WorkerHarness:
        thread = self.worker.start_in_thread()
        while not self.worker.ready.wait(0.05):
            self.worker.check()
            assert thread.is_alive()
        return self

    def close(self) -> None:
        self.worker.stop()
        self.container.close()

    def edit(self, subject: str = "Eiffel Tower", target: str = " Rome", **more: Any) -> dict[str, Any]:
        """Submit an edit without a guard, and return its resource."""
        request = EditRequest(
            subject=subject, prompt="The {} is located in the city of", target_new=target, guard=OPEN, **more
        )
        return self.services.edits.submit([request], "somebody")[0]

    def wait_for_end(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return the resource in the end event of a job."""
        return collect_events(self.container.broker, job["id"])[-1].data

    def generate(self, **fields: Any) -> str:
        return self.services.generation.generate(GenerateRequest(**fields))

    def end_event(self, channel: str) -> dict[str, Any]:
        last = collect_events(self.container.broker, channel)[-1]
        assert last.name == "end", last
        return last.data


@pytest.fixture
def harness(folder: Path, tmp_path: Path, wiring: Stores) -> Iterator[WorkerHarness]:
    created = WorkerHarness(settings(folder, tmp_path, **wiring))
    try:
        yield created.open()
    finally:
        created.close()


def tokens_alone(harness: WorkerHarness, folder: Path, version: int, request: GenerateRequest) -> list[int]:
    """Return the tokens of a request at a version from a separate replica that runs nothing else."""
    model = load_model(folder)
    replica = VersionedModel(
        model,
        WorkerParts(harness.container.database, harness.container.broker, model.fingerprint, "reader").ledger,
    )
    batch = DecodingBatch(model, [new_sequence(model, request.prompt_texts()[0], request)])
    (r,) = batch.sequences
    with replica.use_patch(replica.patch(version)):
        while len(batch):
            batch.step()
    return r.output_ids


def test_a_worker_registers_its_model(harness: WorkerHarness) -> None:
    """A serving worker registers the shape and the recipe of its model, and the service is ready; its statistics
    follow when they are collected."""
    model = harness.services.models.describe()
    assert (model["layers"], model["width"], model["positions"]) == (3, 16, 64)
    assert model["recipe"]["rome"]["layers"] == [1]
    assert harness.services.models.check_ready()["ready"]
    wait_until(lambda: "1" in harness.services.models.describe()["statistics"], "the statistics")
    model = harness.services.models.describe()
    assert model["statistics"]["1"]["digest"] and model["corpus"]["source"] == "the file corpus.txt"
    assert [w["preparing"] for w in model["workers"]] == [None]


@pytest.fixture
def held_collection(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event. The collection of statistics takes steps until it is set."""
    goes_on, collect = threading.Event(), load_or_collect_statistics

    def held(*arguments: Any) -> Stepper[Any]:
        while not goes_on.is_set():
            yield Progress(Phase.STATISTICS, 1, 10)
        return (yield from collect(*arguments))

    monkeypatch.setattr(context, "load_or_collect_statistics", held)
    return goes_on


def test_all_else_is_served_while_statistics_are_collected(
    folder: Path, tmp_path: Path, wiring: Stores, held_collection: threading.Event
) -> None:
    """Before the statistics are there, generations and traces are answered, and an edit is accepted, says what it
    waits for, and is applied afterwards. GET /models shows the progress of the worker."""
    harness = WorkerHarness(settings(folder, tmp_path, worker_timeout=2, **wiring)).open()
    try:
        edit = harness.edit()
        wait_until(
            lambda: (harness.services.edits.get(edit["id"])["progress"] or {}).get("phase") == "statistics",
            "the edit to wait for the statistics",
        )
        channel = harness.generate(prompt=PROMPT, max_new_tokens=4)
        assert len(harness.end_event(channel)["choices"][0]["tokens"]) == 4
        request = TraceRequest(subject="Eiffel Tower", prompt="The {} is in", samples=1)
        trace = harness.services.traces.submit(request, "somebody")
        assert harness.wait_for_end(trace)["status"] == "done"

        def is_held() -> bool:
            workers = harness.services.models.describe()["workers"]  # none while a lease is late
            preparing = (workers[0]["preparing"] if workers else None) or {}
            return (preparing.get("phase"), preparing.get("done"), preparing.get("total")) == (
                "statistics",
                1,
                10,
            )

        wait_until(is_held, "the progress of the collection")
        assert harness.services.edits.get(edit["id"])["status"] == "running"
        held_collection.set()
        assert harness.wait_for_end(edit)["status"] == "applied"
    finally:
        held_collection.set()
        harness.close()


def test_an_edit_that_waits_can_be_cancelled(
    folder: Path, tmp_path: Path, held_collection: threading.Event
) -> None:
    """A cancelled edit ends although what it waits for is not there."""
    harness = WorkerHarness(settings(folder, tmp_path)).open()
    try:
        edit = harness.edit()
        wait_until(lambda: harness.services.edits.get(edit["id"])["progress"], "the edit to wait")
        harness.services.edits.cancel(edit["id"], "somebody")
        assert harness.wait_for_end(edit)["status"] == "cancelled"
    finally:
        held_collection.set()
        harness.close()


def test_a_failed_collection_fails_edits_and_not_the_worker(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When statistics cannot be collected, an edit fails with the reason, generations go on, and the next edit tries
    again."""

    def fails(*_: Any) -> Stepper[Any]:
        yield Progress(Phase.STATISTICS, 0, 1)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(context, "load_or_collect_statistics", fails)
        harness = WorkerHarness(settings(folder, tmp_path)).open()
        edit = harness.wait_for_end(harness.edit())
    try:
        assert (edit["status"], edit["error"]["code"]) == ("failed", "preparation_failed")
        assert "No space left on device" in edit["error"]["detail"]
        channel = harness.generate(prompt=PROMPT, max_new_tokens=2)
        assert harness.end_event(channel)["choices"]
        assert harness.wait_for_end(harness.edit())["status"] == "applied"
    finally:
        harness.close()


def test_a_worker_that_does_not_edit_collects_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker with the roles generate and trace loads no corpus and collects no statistics."""

    def refused(*_: Any) -> Stepper[Any]:
        raise AssertionError("it prepares what it does not need")

    monkeypatch.setattr(context, "load_corpus", refused)
    harness = WorkerHarness(settings(folder, tmp_path, roles="generate,trace")).open()
    try:
        channel = harness.generate(prompt=PROMPT, max_new_tokens=2)
        assert harness.end_event(channel)["choices"]
        assert harness.worker.preparation is not None
        assert (harness.worker.preparation.describe(), harness.worker.preparation.error) == (None, None)
        assert not (tmp_path / "statistics").exists()
    finally:
        harness.close()


def test_a_corpus_that_cannot_be_read_ends_the_start(folder: Path, tmp_path: Path) -> None:
    """A missing corpus is an error of the configuration: the worker ends before it is ready."""
    harness = WorkerHarness(settings(folder, tmp_path, corpus=tmp_path / "none.txt"))
    try:
        with pytest.raises(Misconfigured, match=r"none\.txt' cannot be read"):
            harness.open()
    finally:
        harness.close()


STRONG = {"clamp": 40.0, "weight_decay": 0.0, "kl_factor": 0.0, "steps": 12}


def test_the_first_edit_chooses_a_layer(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A model without a recipe is edited: the first edit tries layers, says which it took and why, and its layer is
    the provisional recipe of the next edit and of GET /models. The ledger records the layer. An edit that names its
    layers is made there and chooses nothing."""
    bare = tmp_path / "model"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("recipe.json"))
    harness = WorkerHarness(settings(bare, tmp_path / "data", worker_timeout=2, **wiring)).open()
    try:
        assert len(harness.services.models.describe()["recipe"]["candidate_layers"]) > 1
        named = harness.wait_for_end(harness.edit("Big Ben", hparams={**STRONG, "layers": [2]}))
        assert named["result"]["layers"] == [2] and "layer_search" not in named["result"]
        # after ten steps on random weights the new object leads only an improbable one
        first = harness.wait_for_end(harness.edit(target="the", hparams=STRONG, target_true="Zanzibar"))
        assert first["status"] == "applied", first
        search = first["result"]["layer_search"]
        assert any(trial["holds"] for trial in search["tried"]), search
        assert [trial["layer"] for trial in search["tried"]] == [0, 1]
        assert search["layer"] == max(search["tried"], key=lambda trial: trial["score"])["layer"]
        assert first["result"]["layers"] == [search["layer"]]
        entry = harness.services.ledger.page()["items"][-1]
        assert entry["body"]["hparams"]["layers"] == [search["layer"]]
        second = harness.wait_for_end(harness.edit("Louvre", hparams=STRONG))
        assert second["result"]["layers"] == [search["layer"]] and "layer_search" not in second["result"]
        wait_until(lambda: not harness.services.models.describe()["recipe"]["candidate_layers"], "the recipe")
        assert "provisional" in harness.services.models.describe()["recipe"]["source"]
    finally:
        harness.close()


def test_a_dry_run_tries_layers(harness: WorkerHarness) -> None:
    """A dry run with `try_layers` scores the edit at several layers, that of the recipe among them, is measured at the
    best one, and changes neither the ledger nor the recipe."""
    before = harness.services.models.describe()["recipe"]
    asked: dict[str, Any] = {"hparams": STRONG, "dry_run": True, "try_layers": True}
    tried = harness.wait_for_end(harness.edit(target="the", target_true="Zanzibar", **asked))
    search = tried["result"]["layer_search"]
    layers = [trial["layer"] for trial in search["tried"]]
    assert len(layers) > 1 and layers == sorted(set(layers)) and set(before["rome"]["layers"]) <= set(layers)
    assert search["layer"] == max(search["tried"], key=lambda trial: trial["score"])["layer"]
    assert tried["result"]["layers"] == [search["layer"]] and tried["version"] is None
    assert harness.services.models.describe()["recipe"] == before


def test_everything_at_once(harness: WorkerHarness, folder: Path) -> None:
    """Generations, edits and a trace run concurrently; the tokens of each generation equal those of a
    separate replica at its version."""
    texts = [f"{PROMPT}", "Big Ben", "In which country"]
    requests = [
        GenerateRequest(prompt=t, max_new_tokens=30, temperature=0.9, seed=i, stream=True, version="base")
        for i, t in enumerate(texts)
    ]
    first_channels = [harness.services.generation.generate(r) for r in requests]
    edits = [harness.edit(), harness.edit("Big Ben", " London")]
    trace = harness.services.traces.submit(
        TraceRequest(prompt=PROMPT, subject="Eiffel Tower", samples=2, window=2), "somebody"
    )
    second_channels = [harness.services.generation.generate(r) for r in requests]
    applied = [harness.wait_for_end(e) for e in edits]
    assert [e["status"] for e in applied] == ["applied", "applied"], applied
    assert [e["version"] for e in applied] == [1, 2]
    trace_result = harness.wait_for_end(trace)
    assert trace_result["status"] == "done", trace_result
    assert len(trace_result["result"]["kinds"]["hidden"]["scores"][0]) == 3
    for channels in (first_channels, second_channels):
        for channel, request in zip(channels, requests, strict=True):
            events = collect_events(harness.container.broker, channel)
            end = events[-1].data
            assert end["version"] == 0
            assert end["choices"][0]["tokens"] == tokens_alone(harness, folder, 0, request)
            assert "".join(token_texts(events)) == end["choices"][0]["text"]
    for version in (1, 2):
        request = GenerateRequest(prompt=PROMPT, max_new_tokens=10, version=version)
        assert harness.end_event(harness.services.generation.generate(request))["choices"][0][
            "tokens"
        ] == tokens_alone(harness, folder, version, request)
    comparison = harness.end_event(
        harness.services.generation.compare(CompareRequest(prompt=PROMPT, max_new_tokens=4))
    )
    assert [s["version"] for s in comparison["sides"]] == [0, 2]
    assert comparison["total_variation"] > 0
    verification = harness.services.ledger.verify()
    assert verification["ok"], verification


def test_an_edit_does_not_wait_for_an_evaluation(harness: WorkerHarness) -> None:
    """An edit that is submitted during an evaluation is committed before its end, and the evaluation
    continues."""
    record = {"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target_new": "Rome"}
    request = EvaluationRequest(records=[record] * 500, batch_size=1, damage=False)
    evaluation = harness.services.evaluations.submit(request, "somebody")["id"]
    while harness.services.evaluations.get(evaluation)["status"] == "queued":
        threading.Event().wait(0.01)
    applied = harness.wait_for_end(harness.edit())
    assert (applied["status"], applied["version"]) == ("applied", 1)
    snapshot = harness.services.evaluations.get(evaluation)
    assert (snapshot["status"], snapshot["attempts"]) == ("running", 1)
    while harness.services.evaluations.get(evaluation)["progress"] == snapshot["progress"]:
        threading.Event().wait(0.01)
    assert harness.wait_for_end(harness.services.evaluations.cancel(evaluation))["status"] == "cancelled"


def test_read_your_own_writes(harness: WorkerHarness) -> None:
    """A generation with `min_version` right after the end of an edit uses that version or a later one."""
    version = harness.wait_for_end(harness.edit())["version"]
    end = harness.end_event(harness.generate(prompt=PROMPT, max_new_tokens=2, min_version=version))
    assert end["version"] >= version


def test_a_job_that_cannot_be_done_fails_alone(harness: WorkerHarness) -> None:
    """A failed job has an error that names the cause, and the next job is applied."""
    bad = harness.services.traces.submit(
        TraceRequest(prompt=PROMPT, subject="Eiffel Tower", noise=1e38, samples=2), "somebody"
    )
    good = harness.edit()
    end = harness.wait_for_end(bad)
    assert end["status"] == "failed"
    assert "noise" in end["error"]["detail"]
    assert harness.wait_for_end(good)["status"] == "applied"


def test_running_job_is_requeued_on_stop_and_done_later(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A worker that stops requeues its job without counting the attempt, and the next worker runs it once."""
    config = settings(folder, tmp_path, **wiring)
    harness = WorkerHarness(config).open()
    job = harness.edit(hparams={"steps": 200})
    while harness.services.edits.get(job["id"])["status"] == "queued":
        threading.Event().wait(0.01)
    harness.worker.stop()
    requeued = harness.services.edits.get(job["id"])
    harness.container.close()
    assert (requeued["status"], requeued["attempts"]) == ("queued", 0)
    harness = WorkerHarness(config).open()
    try:
        ended = harness.wait_for_end(job)
        assert (ended["status"], ended["version"], ended["attempts"]) == ("applied", 1, 1)
    finally:
        harness.close()


def test_a_stopped_worker_releases_the_lock_of_its_preparation(
    folder: Path, tmp_path: Path, held_collection: threading.Event
) -> None:
    """A worker that stops while it collects statistics leaves no lock behind: the next one does not wait for its
    silence."""
    harness = WorkerHarness(settings(folder, tmp_path)).open()
    preparation = harness.worker.preparation
    assert preparation is not None
    progress = Progress(Phase.STATISTICS, 1, 10)
    wait_until(
        lambda: replace(preparation.progress or progress, seconds_left=None) == progress, "the collection"
    )
    (lock,) = (tmp_path / "statistics").glob("preparing-*.lock")
    with pytest.raises(Timeout):
        FileLock(lock, timeout=0).acquire()
    harness.close()
    with FileLock(lock, timeout=0):
        assert not lock.with_suffix(".progress").exists()


def _has_ended(preparation: Preparation) -> bool:
    return preparation.progress is None


def test_editor_context_is_prepared_once(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A second start has the same statistics as the first, which stored them on disk."""
    config = settings(folder, tmp_path, **wiring)
    digests = []
    for _ in range(2):
        harness = WorkerHarness(config).open()
        preparation = harness.worker.preparation
        assert preparation is not None
        wait_until(partial(_has_ended, preparation), "the statistics")
        preparation.announce()
        digests.append(harness.services.models.describe()["statistics"])
        harness.close()
    assert digests[0] == digests[1]
    assert list((tmp_path / "statistics").iterdir())


def test_killed_worker_is_removed_at_start(folder: Path, tmp_path: Path) -> None:
    """At its start the embedded service removes the worker that a crash left registered, before it loads the
    model."""
    config = settings(folder, tmp_path)
    harness = WorkerHarness(config).open()
    worker_parts = WorkerParts(
        harness.container.database,
        harness.container.broker,
        harness.services.models.describe()["fingerprint"],
        "killed",
    )
    harness.close()
    worker_parts.session.register({"name": "tiny"}, "{}")
    harness = WorkerHarness(config)
    assert harness.services.models.check_ready()["ready"]  # the heartbeat of the dead worker is recent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            harness.worker, "_load", lambda: pytest.fail(str(harness.services.models.check_ready()))
        )
        with pytest.raises(Unavailable, match="no worker is alive"):
            harness.worker.run()
    harness.close()


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    """A worker whose model cannot be loaded ends with the reason and never becomes ready."""
    config = settings(tmp_path / "nothing", tmp_path, corpus=None)
    harness = WorkerHarness(config)
    harness.worker.start_in_thread().join(30)
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        harness.worker.check()
    assert not harness.worker.ready.is_set()
    harness.close()


def test_a_worker_of_noise_never_becomes_ready(tmp_path: Path) -> None:
    """A worker whose model loads and predicts noise ends with the reason and never becomes ready."""
    model = tiny("llama")
    model.lm_head.weight.data.mul_(30.0)  # type: ignore[operator]
    model.model.save_pretrained(tmp_path / "noise")
    model.tokenizer.save_pretrained(tmp_path / "noise")
    harness = WorkerHarness(settings(tmp_path / "noise", tmp_path, corpus=None))
    with pytest.raises(Misconfigured, match="predicts noise"):
        harness.worker.run()
    assert not harness.worker.ready.is_set()
    harness.close()


def test_crashed_loop_is_reported_and_restarted(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the engine loop crashes the service is not ready; the loop restarts and answers the queued
    generation."""
    down, go = threading.Event(), threading.Event()
    step = Engine.step

    def faulty(engine: Engine) -> bool:
        if down.is_set():
            raise RuntimeError("the device fell off")
        return step(engine)

    monkeypatch.setattr(Engine, "step", faulty)
    monkeypatch.setattr("workers.worker.RESTART_DELAY", 0.5)
    harness = WorkerHarness(settings(folder, tmp_path, **wiring)).open()
    try:
        down.set()
        channel = harness.generate(prompt=PROMPT, max_new_tokens=3)
        while harness.worker.ready.is_set():
            go.wait(0.01)
        with pytest.raises(RuntimeError, match="fell off"):
            harness.worker.check()
        with pytest.raises(Unavailable, match="no worker"):
            harness.services.models.check_ready()
        down.clear()
        assert harness.end_event(channel)["choices"][0]["tokens"]
        assert harness.worker.ready.wait(10)
        harness.worker.check()
        assert harness.services.models.check_ready()["ready"]
    finally:
        harness.close()


def test_worker_resumes_after_outage(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an outage of the stores a worker reports a health problem and keeps its running job, which it
    finishes afterwards in the same attempt."""
    down = threading.Event()
    step = Engine.step

    def cut_off(engine: Engine) -> bool:
        if down.is_set():
            raise Unavailable("the database does not answer.")
        return step(engine)

    monkeypatch.setattr(Engine, "step", cut_off)
    monkeypatch.setattr("workers.worker.RESTART_DELAY", 0.2)
    harness = WorkerHarness(settings(folder, tmp_path, **wiring)).open()
    try:
        assert harness.worker.health_problem() is None
        job = harness.edit(hparams={"steps": 100})
        wait_until_running(harness, job)
        down.set()
        wait_until(lambda: harness.worker.health_problem() is not None, "the problem")
        assert "database" in str(harness.worker.health_problem())
        assert harness.services.models.describe()["workers"]  # until its lease expires
        down.clear()
        end = harness.wait_for_end(job)
        assert (end["status"], end["attempts"]) == ("applied", 1)
        assert harness.worker.health_problem() is None
    finally:
        harness.close()


def wait_until_running(harness: WorkerHarness, job: dict[str, Any]) -> None:
    wait_until(lambda: harness.services.edits.get(job["id"])["status"] != "queued", "the start of the job")


def test_worker_with_digest_mismatch_ends(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose digest is in the minority ends with the reason, and its row keeps the reason."""

    def attest(session: WorkerSession, version: int, digest: str) -> None:
        session.quarantine("its memory is bad.")
        raise DigestMismatch("this worker takes itself out: its memory is bad.")

    monkeypatch.setattr(WorkerSession, "attest", attest)
    harness = WorkerHarness(settings(folder, tmp_path, **wiring))
    harness.worker.start_in_thread().join(60)
    with pytest.raises(DigestMismatch):
        harness.worker.check()
    assert [w["reason"] for w in harness.services.models.describe()["workers"]] == ["its memory is bad."]
    harness.close()


def test_worker_waits_for_the_store_while_loading(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker retries the check for workers of another model until the database responds, and then serves."""
    original = WorkerSession.foreign_workers
    calls: list[WorkerSession] = []

    def foreign_workers(session: WorkerSession) -> list[str]:
        calls.append(session)
        if len(calls) < 3:
            raise Unavailable("the database does not answer.")
        return original(session)

    monkeypatch.setattr(WorkerSession, "foreign_workers", foreign_workers)
    monkeypatch.setattr(worker, "RESTART_DELAY", 0.01)
    harness = WorkerHarness(settings(folder, tmp_path, **wiring)).open()
    assert len(calls) >= 3
    harness.close()


def test_two_models_are_not_served_side_by_side(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A worker does not start while another worker serves another model; the error names that worker and
    model."""
    harness = WorkerHarness(settings(folder, tmp_path, **wiring), single_process=False)
    harness.container.database.migrate()
    WorkerParts(harness.container.database, harness.container.broker, "f" * 64, "worker_a").session.register(
        {"name": "gpt2-xl"}, "{}"
    )
    harness.worker.start_in_thread().join(60)
    with pytest.raises(Misconfigured, match=r"worker_a .* gpt2-xl"):
        harness.worker.check()
    harness.close()


def test_a_worker_does_what_its_roles_say(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A worker runs only the kinds of its roles, and its roles are listed."""
    harness = WorkerHarness(settings(folder, tmp_path, **wiring, roles="generate")).open()
    try:
        edit = harness.edit()
        assert harness.end_event(harness.generate(prompt=PROMPT, max_new_tokens=2))["version"] == 0
        assert harness.services.edits.get(edit["id"])["status"] == "queued"
        assert [w["roles"] for w in harness.services.models.describe()["workers"]] == [["generate"]]
    finally:
        harness.close()
