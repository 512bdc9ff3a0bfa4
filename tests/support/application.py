"""The real operations behind the real application, on either wiring; only the worker is a double."""

from __future__ import annotations

import threading
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from api.app import create_app
from api.authentication import LOOPBACK
from service.bootstrap import wire
from service.errors import PalimpsestError
from service.evaluation.metrics import CHANGES, MEASURES, SCORES
from service.jobs import artifacts
from service.jobs.broker import KINDS, Delivery
from service.jobs.job_store import Desk
from service.kit.steps import Progress
from service.recipes.recipe import Recipe, RomeParameters
from service.schemas import EvaluationPlan
from service.settings import Settings
from tests.support.migrations import migrate

LOOPBACK.add("testserver")  # what Starlette's client calls every application

TOWER = {"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target_new": "Rome"}
NOWHERE = "Atlantis"  # an edit to this object fails
PROMPT = "The Eiffel Tower is located in the city of"
ANSWER: dict[str, Any] = {
    "version": 0,
    "choices": [{"text": " Paris", "tokens": [1], "finish_reason": "length"}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1},
    "seconds": 0.1,
}


LOGPROBS = {
    "tokens": [" Paris"],
    "token_logprobs": [-0.5],
    "top_logprobs": [{" Paris": -0.5}],
    "text_offset": [0],
}


def answered(asked: dict[str, Any]) -> dict[str, Any]:
    """A choice for each answer that was asked for."""
    prompts = asked["prompts"] or asked.get("tokens") or [None]
    choice = ANSWER["choices"][0] | ({} if asked.get("logprobs") is None else {"logprobs": LOGPROBS})
    return ANSWER | {"choices": [choice] * len(prompts) * asked.get("choices", 1)}


_GRID = {
    "scores": [[0.1, 0.8], [0.2, 0.9]],
    "indirect_effect": [[0.0, 0.7], [0.1, 0.8]],
    "best": {"token": 1, "layer": 1, "score": 0.9},
}
#: the result of a trace of two tokens in two layers
TRACED = {
    "version": 0,
    "prompt": "São Paulo",
    "tokens": ["São", " Paulo"],
    "subject": {"text": "São", "tokens": [0, 1]},
    "answer": {"text": "Brazil", "tokens": [" Brazil"], "ids": [7]},
    "high": 0.9,
    "low": 0.1,
    "total_effect": 0.8,
    "kinds": {"hidden": _GRID, "mlp": _GRID, "attn": _GRID},
    "severed": None,
    "window": 10,
    "samples": 10,
    "noise": {"level": 0.5, "factor": 3.0, "sigma": 0.17},
    "seed": 1,
    "compat": None,
}


#: the file of an export, in pieces
EXPORTED = [b"not ", b"a zip"]
#: how an edit was found, as the ledger has it
FOUND: dict[str, Any] = {
    "method": "rome",
    "objective": "write",
    "hparams": {"layers": [1]},
    "strength": 1.0,
    "resolved_true": "Paris",
    "statistics": {},
    "corpus": "",
    "dtype": "float32",
    "device": "cpu",
    "libraries": {},
}

_MEAN = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 1}
#: the result of an evaluation of one record, edited alone
EVALUATED = {
    "model": {"name": "tiny", "fingerprint": "f" * 64},
    "plan": EvaluationPlan().model_dump(mode="json"),
    "parameters": {"layers": [1]},
    "records": {"measured": 1, "left_out": [], "lacking": {}},
    "plain": None,
    "before": dict.fromkeys((*MEASURES, *SCORES), _MEAN),
    "after": dict.fromkeys((*MEASURES, *SCORES), _MEAN),
    "changes": dict.fromkeys(CHANGES, _MEAN),
    "damage": None,
    "norm": {"1.mlp": _MEAN},
    "strengthened": 0,
    "rows": [],
    "seconds": {"find": 0.1},
    "edits_per_minute": {"all": 60.0},
}


@lru_cache
def tokenizer() -> str:
    """A byte-level tokenizer: it can say every text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([PROMPT], trainer)
    return raw.to_str()


class FakeWorker:
    """Takes from the broker and publishes, as an engine does, without a model. `hold` keeps it from answering."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.broker = desk.broker
        self.go = threading.Event()
        self.go.set()
        self.half = threading.Event()  # set when a job has told its first progress
        self.rejects = False
        self.unable: PalimpsestError | str | None = None  # why it makes no export
        self.error: dict[str, str] | None = None
        self.calls: list[dict[str, Any]] = []
        self.channels: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.go.set()
        self.broker.wake()
        self._thread.join(10)

    def _run(self) -> None:
        beaten = time.monotonic()
        while not self._stop.is_set():
            if time.monotonic() - beaten > 5:
                beaten = time.monotonic()
                self.desk.heartbeat(self.desk.head())
            for delivery in self.broker.take(KINDS, 8, 0.2):
                self._do(delivery)
                self.broker.done(delivery)

    def _do(self, delivery: Delivery) -> None:
        if delivery.kind in ("generate", "compare"):
            self._speak(delivery)
        elif job := self.desk.start(delivery.job_id):
            self.desk.progress(job, Progress("value", 1, 2))
            self.half.set()
            self.go.wait(20)
            self.desk.progress(job, Progress("value", 2, 2))
            if self.desk.cancel_requested(job):
                self.desk.finish(job, "cancelled")
            elif job.request.get("target_new") == NOWHERE:
                self.desk.fail(job, "there is no such place.")
            elif job.kind == "trace":
                self.desk.finish(job, "done", TRACED)
            elif job.kind == "evaluation":
                self.desk.finish(job, "done", EVALUATED)
            elif job.kind == "export" and self.unable is not None:
                self.desk.fail(job, self.unable)
            elif job.kind == "export":
                for number, data in enumerate(EXPORTED):
                    self.desk.keep(job, artifacts.piece(number), data)
                told = {"file": "tiny-v1-peft.zip", "media_type": "application/zip"}
                self.desk.finish(
                    job, "done", {**told, "bytes": len(b"".join(EXPORTED)), "pieces": len(EXPORTED)}
                )
            elif self.rejects or job.dry_run:
                self.desk.finish(job, "rejected", {"es": 0.0})
            else:
                self.desk.apply(
                    job, self.desk.head(), b"factors of " + job.id.encode(), {"seed": 0} | FOUND, {"es": 1.0}
                )

    def _speak(self, delivery: Delivery) -> None:
        self.calls.append(delivery.payload)
        self.channels.append(delivery.job_id)
        if delivery.kind == "generate" and self.error is None:
            self.broker.publish(delivery.job_id, "token", {"index": 0, "text": " Pa", "version": 0})
            self.half.set()
        self.go.wait(20)
        if self.error is not None:
            self.broker.publish(delivery.job_id, "error", self.error, last=True)
        elif delivery.kind == "compare":
            side = {"version": 0, "text": " Paris", "tokens": [1], "finish_reason": "length"}
            told = {"prompt": delivery.payload["prompt"], "sides": [side, side], "next_tokens": []}
            self.broker.publish(
                delivery.job_id, "end", told | {"total_variation": 0.0, "seconds": 0.1}, last=True
            )
        else:
            self.broker.publish(delivery.job_id, "end", answered(delivery.payload), last=True)


class House:
    """Everything wired, on a folder of its own; embedded, unless the settings name other stores."""

    def __init__(self, folder: Path, register: bool = True, **settings: Any) -> None:
        self.settings = Settings(data=folder, **settings)
        self.wired = wire(self.settings)
        self.database, self.broker = self.wired.database, self.wired.broker
        self.operations = self.wired.operations
        migrate(self.database)
        self.desk = Desk(self.database, self.broker, "f" * 64, "worker-1", sole=self.wired.sole)
        if register:
            recipe = Recipe(source="test", rome=RomeParameters(layers=(1,)))
            info = {
                "name": "tiny",
                "layers": 3,
                "positions": 64,
                "width": 16,
                "inner_width": 40,
                "facts": True,
                "recipe": recipe.model_dump(mode="json"),
            }
            self.desk.register(info, tokenizer())
        self.app: FastAPI = create_app(self.operations, self.broker, self.settings)
        self.worker: FakeWorker | None = None

    def hire(self) -> FakeWorker:
        self.worker = FakeWorker(self.desk)
        return self.worker

    def close(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.wired.close()
