"""A whole worker on a tiny model: real store, broker, desk, replica, engine, editor and tracer."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.bootstrap import Wired, wire
from service.engine.decoding import Batch, row
from service.engine.engine import Engine
from service.engine.versioned_model import Replica
from service.errors import Disagrees, Misconfigured, Unavailable
from service.jobs.job_store import Desk
from service.models.loading import load
from service.schemas import CompareRequest, EditRequest, EvaluationRequest, GenerateRequest, TraceRequest
from service.settings import Settings
from tests.support.fakes import heard, pieces
from tests.support.tiny_models import tiny
from workers import worker
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
    place = tmp_path_factory.mktemp("model")
    model = tiny("gpt2")
    model.model.save_pretrained(place)
    model.tokenizer.save_pretrained(place)
    (place / "recipe.json").write_text(json.dumps(RECIPE))
    (place / "corpus.txt").write_text("\n".join(f"{PROMPT} Paris, and {i} is a number." for i in range(60)))
    return place


def settings(folder: Path, data: Path, **changes: Any) -> Settings:
    values = {
        "model": str(folder),
        "data": data,
        "stat_tokens": 1000,
        "corpus": folder / "corpus.txt",
        "threads": 1,
    }
    return Settings(**{**values, **changes})


class Shop:
    """A worker and its doors."""

    def __init__(self, asked: Settings, **changes: Any) -> None:
        self.wired: Wired = replace(wire(asked), **changes)
        self.worker = Worker(asked, self.wired)
        self.do = self.wired.operations

    def open(self) -> Shop:
        thread = self.worker.start_in_thread()
        while not self.worker.ready.wait(0.05):
            self.worker.check()
            assert thread.is_alive()
        return self

    def close(self) -> None:
        self.worker.stop()
        self.wired.close()

    def edit(self, subject: str = "Eiffel Tower", target: str = " Rome", **more: Any) -> dict[str, Any]:
        """An edit, queued."""
        request = EditRequest(
            subject=subject, prompt="The {} is located in the city of", target_new=target, guard=OPEN, **more
        )
        return self.do.edits.submit([request], "somebody")[0]

    def wait(self, job: dict[str, Any]) -> dict[str, Any]:
        """The resource with which a job ended."""
        return heard(self.wired.broker, job["id"])[-1].data

    def generate(self, **asked: Any) -> str:
        return self.do.calls.generate(GenerateRequest(**asked))

    def end(self, channel: str) -> dict[str, Any]:
        last = heard(self.wired.broker, channel)[-1]
        assert last.name == "end", last
        return last.data


@pytest.fixture
def shop(folder: Path, tmp_path: Path, wiring: Stores) -> Iterator[Shop]:
    opened = Shop(settings(folder, tmp_path, **wiring))
    try:
        yield opened.open()
    finally:
        opened.close()


def alone(shop: Shop, folder: Path, version: int, request: GenerateRequest) -> list[int]:
    """What a replica of its own says at a version, with nothing else going on."""
    model = load(folder)
    replica = Replica(model, Desk(shop.wired.database, shop.wired.broker, model.fingerprint, "reader"))
    batch = Batch(model, [row(model, request.texts()[0], request)])
    (r,) = batch.rows
    with replica.stand(replica.weights(version)):
        while len(batch):
            batch.step()
    return r.said


def test_a_worker_registers_its_model(shop: Shop) -> None:
    """A worker that serves is shown with its model's shape and recipe, and the service is ready."""
    model = shop.do.models.resident()
    assert (model["layers"], model["width"], model["positions"]) == (3, 16, 64)
    assert model["recipe"]["rome"]["layers"] == [1]
    assert model["statistics"]["1"]["digest"]
    assert shop.do.models.ready()["ready"]


def test_everything_at_once(shop: Shop, folder: Path) -> None:
    """Generations, a comparison, edits and a trace run together; every text is that of its version alone."""
    texts = [f"{PROMPT}", "Big Ben", "In which country"]
    asked = [
        GenerateRequest(prompt=t, max_new_tokens=30, temperature=0.9, seed=i, stream=True, version="base")
        for i, t in enumerate(texts)
    ]
    first = [shop.do.calls.generate(r) for r in asked]
    edits = [shop.edit(), shop.edit("Big Ben", " London")]
    trace = shop.do.traces.submit(
        TraceRequest(prompt=PROMPT, subject="Eiffel Tower", samples=2, window=2), "somebody"
    )
    meanwhile = [shop.do.calls.generate(r) for r in asked]
    applied = [shop.wait(e) for e in edits]
    assert [e["status"] for e in applied] == ["applied", "applied"], applied
    assert [e["version"] for e in applied] == [1, 2]
    traced = shop.wait(trace)
    assert traced["status"] == "done", traced
    assert len(traced["result"]["kinds"]["hidden"]["scores"][0]) == 3
    for channels in (first, meanwhile):
        for channel, request in zip(channels, asked, strict=True):
            events = heard(shop.wired.broker, channel)
            end = events[-1].data
            assert end["version"] == 0
            assert end["choices"][0]["tokens"] == alone(shop, folder, 0, request)
            assert "".join(pieces(events)) == end["choices"][0]["text"]
    for version in (1, 2):
        request = GenerateRequest(prompt=PROMPT, max_new_tokens=10, version=version)
        assert shop.end(shop.do.calls.generate(request))["choices"][0]["tokens"] == alone(
            shop, folder, version, request
        )
    compared = shop.end(shop.do.calls.compare(CompareRequest(prompt=PROMPT, max_new_tokens=4)))
    assert [s["version"] for s in compared["sides"]] == [0, 2]
    assert compared["total_variation"] > 0
    verified = shop.do.ledger.verify()
    assert verified["ok"], verified


def test_an_edit_does_not_wait_for_an_evaluation(shop: Shop) -> None:
    """An edit that is asked for while an evaluation runs lands before its end, and the evaluation goes on."""
    record = {"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target_new": "Rome"}
    asked = EvaluationRequest(records=[record] * 500, together=1, damage=False)  # type: ignore[call-arg]
    evaluation = shop.do.evaluations.submit(asked, "somebody")["id"]
    while shop.do.evaluations.get(evaluation)["status"] == "queued":
        threading.Event().wait(0.01)
    landed = shop.wait(shop.edit())
    assert (landed["status"], landed["version"]) == ("applied", 1)
    at = shop.do.evaluations.get(evaluation)
    assert (at["status"], at["attempts"]) == ("running", 1)
    while shop.do.evaluations.get(evaluation)["progress"] == at["progress"]:
        threading.Event().wait(0.01)
    assert shop.wait(shop.do.evaluations.cancel(evaluation))["status"] == "cancelled"


def test_read_your_own_writes(shop: Shop) -> None:
    """A generation that is asked for right after an edit's end sees it."""
    version = shop.wait(shop.edit())["version"]
    end = shop.end(shop.generate(prompt=PROMPT, max_new_tokens=2, min_version=version))
    assert end["version"] >= version


def test_a_job_that_cannot_be_done_fails_alone(shop: Shop) -> None:
    """A failing job has a reason that a person can use, and the next one is done."""
    bad = shop.do.traces.submit(
        TraceRequest(prompt=PROMPT, subject="Eiffel Tower", noise=1e38, samples=2), "somebody"
    )
    good = shop.edit()
    ended = shop.wait(bad)
    assert ended["status"] == "failed"
    assert "noise" in ended["error"]["detail"]
    assert shop.wait(good)["status"] == "applied"


def test_a_running_job_is_handed_back_and_done_later(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A worker that stops hands its job back uncounted; the next worker does it, once."""
    asked = settings(folder, tmp_path, **wiring)
    shop = Shop(asked).open()
    job = shop.edit(hparams={"steps": 200})
    while shop.do.edits.get(job["id"])["status"] == "queued":
        threading.Event().wait(0.01)
    shop.worker.stop()
    left = shop.do.edits.get(job["id"])
    shop.wired.close()
    assert (left["status"], left["attempts"]) == ("queued", 0)
    shop = Shop(asked).open()
    try:
        ended = shop.wait(job)
        assert (ended["status"], ended["version"], ended["attempts"]) == ("applied", 1, 1)
    finally:
        shop.close()


def test_the_tools_are_made_once(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A second start reads what the first one made."""
    asked = settings(folder, tmp_path, **wiring)
    digests = []
    for _ in range(2):
        shop = Shop(asked).open()
        digests.append(shop.do.models.resident()["statistics"])
        shop.close()
    assert digests[0] == digests[1]
    assert list((tmp_path / "statistics").iterdir())


def test_a_killed_worker_is_forgotten(folder: Path, tmp_path: Path) -> None:
    """Whom a crash left in the list is gone when the embedded service starts anew, before the model is loaded."""
    asked = settings(folder, tmp_path)
    shop = Shop(asked).open()
    desk = Desk(shop.wired.database, shop.wired.broker, shop.do.models.resident()["fingerprint"], "killed")
    shop.close()
    desk.register({"name": "tiny"}, "{}")
    shop = Shop(asked)
    assert shop.do.models.ready()["ready"]  # as the dead one's last heartbeat has it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shop.worker, "_load", lambda: pytest.fail(shop.do.models.ready()))
        with pytest.raises(Unavailable, match="no worker is alive"):
            shop.worker.run()
    shop.close()


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    """A model that is not there ends the worker with the reason, and the service stays unready."""
    asked = settings(tmp_path / "nothing", tmp_path, corpus=None)
    shop = Shop(asked)
    shop.worker.start_in_thread().join(30)
    with pytest.raises(Misconfigured, match="cannot be loaded"):
        shop.worker.check()
    assert not shop.worker.ready.is_set()
    shop.close()


def test_a_loop_that_falls_is_shown_and_stands_up(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the loop is down the service is not ready and says so; then the loop goes on and answers what waits."""
    down, go = threading.Event(), threading.Event()
    turn = Engine.turn

    def faulty(engine: Engine) -> bool:
        if down.is_set():
            raise RuntimeError("the device fell off")
        return turn(engine)

    monkeypatch.setattr(Engine, "turn", faulty)
    monkeypatch.setattr("workers.worker.REST", 0.5)
    shop = Shop(settings(folder, tmp_path, **wiring)).open()
    try:
        down.set()
        channel = shop.generate(prompt=PROMPT, max_new_tokens=3)
        while shop.worker.ready.is_set():
            go.wait(0.01)
        with pytest.raises(RuntimeError, match="fell off"):
            shop.worker.check()
        with pytest.raises(Unavailable, match="no worker"):
            shop.do.models.ready()
        down.clear()
        assert shop.end(channel)["choices"][0]["tokens"]
        assert shop.worker.ready.wait(10)
        shop.worker.check()
        assert shop.do.models.ready()["ready"]
    finally:
        shop.close()


def test_an_outage_is_no_fault_of_the_worker(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the stores are down a worker says so and keeps what it has begun; then it goes on with it."""
    down = threading.Event()
    turn = Engine.turn

    def cut_off(engine: Engine) -> bool:
        if down.is_set():
            raise Unavailable("the database does not answer.")
        return turn(engine)

    monkeypatch.setattr(Engine, "turn", cut_off)
    monkeypatch.setattr("workers.worker.REST", 0.2)
    shop = Shop(settings(folder, tmp_path, **wiring)).open()
    try:
        assert shop.worker.trouble() is None
        job = shop.edit(hparams={"steps": 100})
        running(shop, job)
        down.set()
        until_true(lambda: shop.worker.trouble() is not None)
        assert "database" in str(shop.worker.trouble())
        assert shop.do.models.resident()["workers"]  # its lease decides
        down.clear()
        ended = shop.wait(job)
        assert (ended["status"], ended["attempts"]) == ("applied", 1)
        assert shop.worker.trouble() is None
    finally:
        shop.close()


def until_true(true: Callable[[], bool]) -> None:
    while not true():
        threading.Event().wait(0.01)


def running(shop: Shop, job: dict[str, Any]) -> None:
    until_true(lambda: shop.do.edits.get(job["id"])["status"] != "queued")


def test_a_worker_that_disagrees_ends(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker whose weights are disputed ends with the reason, and its row stays to tell it."""

    def attest(desk: Desk, version: int, digest: str) -> None:
        desk.withdraw("its memory is bad.")
        raise Disagrees("this worker takes itself out: its memory is bad.")

    monkeypatch.setattr(Desk, "attest", attest)
    shop = Shop(settings(folder, tmp_path, **wiring))
    shop.worker.start_in_thread().join(60)
    with pytest.raises(Disagrees):
        shop.worker.check()
    assert [w["reason"] for w in shop.do.models.resident()["workers"]] == ["its memory is bad."]
    shop.close()


def test_a_store_that_goes_away_while_it_loads_is_waited_for(
    folder: Path, tmp_path: Path, wiring: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that cannot ask who else is there asks again, and serves when it is told."""
    whole, asked = Desk.strangers, []

    def strangers(desk: Desk) -> list[str]:
        asked.append(desk)
        if len(asked) < 3:
            raise Unavailable("the database does not answer.")
        return whole(desk)

    monkeypatch.setattr(Desk, "strangers", strangers)
    monkeypatch.setattr(worker, "REST", 0.01)
    shop = Shop(settings(folder, tmp_path, **wiring)).open()
    assert len(asked) >= 3
    shop.close()


def test_two_models_are_not_served_side_by_side(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """A worker that finds another model being served does not start, and names who serves it."""
    shop = Shop(settings(folder, tmp_path, **wiring), sole=False)
    shop.wired.database.migrate()
    Desk(shop.wired.database, shop.wired.broker, "f" * 64, "worker_a").register({"name": "gpt2-xl"}, "{}")
    shop.worker.start_in_thread().join(60)
    with pytest.raises(Misconfigured, match=r"worker_a .* gpt2-xl"):
        shop.worker.check()
    shop.close()


def test_a_worker_does_what_its_roles_say(folder: Path, tmp_path: Path, wiring: Stores) -> None:
    """What is not in its roles a worker leaves for others, and everybody can see what it does."""
    shop = Shop(settings(folder, tmp_path, **wiring, roles="generate")).open()
    try:
        edit = shop.edit()
        assert shop.end(shop.generate(prompt=PROMPT, max_new_tokens=2))["version"] == 0
        assert shop.do.edits.get(edit["id"])["status"] == "queued"
        assert [w["roles"] for w in shop.do.models.resident()["workers"]] == [["generate"]]
    finally:
        shop.close()
