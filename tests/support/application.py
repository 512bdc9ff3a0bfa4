"""The real API and services on either wiring, with a fake worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from api.app import create_app
from api.authentication import LOOPBACK_NAMES
from service.application.development import Development
from service.bootstrap import build_container
from service.errors import InvalidInput
from service.evaluation.metrics import CHANGE_SCORES, COMBINED_SCORES, MEASURES
from service.jobs import artifacts
from service.jobs.broker import Delivery
from service.jobs.job_kinds import WORK_KINDS
from service.kit.steps import Phase, Progress
from service.methods.parameters import RomeParameters
from service.recipes.recipe import Recipe
from service.schemas import EvaluationPlan
from service.settings import Settings
from tests.support.chat_templates import CHATML, START, STOP
from tests.support.local_server import run_http_server
from tests.support.migrations import migrate
from tests.support.workers import WorkerParts

LOOPBACK_NAMES.update({"testserver", "testclient"})  # the host and the client of Starlette's test client

TOWER = {"subject": "Eiffel Tower", "prompt": "The {} is located in the city of", "target_new": "Rome"}
FAILING_OBJECT = "Atlantis"  # edits to this object fail
PROMPT = "The Eiffel Tower is located in the city of"
GENERATION_RESULT: dict[str, Any] = {
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


def generation_result(payload: dict[str, Any]) -> dict[str, Any]:
    """Return a result with one choice per requested generation."""
    prompts = payload["prompts"] or payload.get("tokens") or [None]
    choice = GENERATION_RESULT["choices"][0] | (
        {} if payload.get("logprobs") is None else {"logprobs": LOGPROBS}
    )
    return GENERATION_RESULT | {"choices": [choice] * len(prompts) * payload.get("n", 1)}


_TRACE_GRID = {
    "scores": [[0.1, 0.8], [0.2, 0.9]],
    "indirect_effect": [[0.0, 0.7], [0.1, 0.8]],
    "best": {"token": 1, "layer": 1, "score": 0.9},
}
#: the result of a trace of two tokens in two layers
TRACE_RESULT = {
    "version": 0,
    "prompt": "São Paulo",
    "tokens": ["São", " Paulo"],
    "subject": {"text": "São", "tokens": [0, 1]},
    "answer": {"text": "Brazil", "tokens": [" Brazil"], "ids": [7]},
    "high": 0.9,
    "low": 0.1,
    "total_effect": 0.8,
    "kinds": {"hidden": _TRACE_GRID, "mlp": _TRACE_GRID, "attn": _TRACE_GRID},
    "severed": None,
    "window": 10,
    "samples": 10,
    "noise": {"level": 0.5, "factor": 3.0, "sigma": 0.17},
    "seed": 1,
    "compat": None,
}


#: the chunks of an export file
EXPORT_CHUNKS = [b"not ", b"a zip"]
#: the provenance of an edit in the ledger
EDIT_PROVENANCE: dict[str, Any] = {
    "method": "rome",
    "objective": "write",
    "hparams": {"layers": [1]},
    "strength": 1.0,
    "resolved_true": "Paris",
    "resolved_separator": " ",
    "statistics": {},
    "corpus": "",
    "dtype": "float32",
    "device": "cpu",
    "libraries": {},
}

_INTERVAL = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 1}
#: the result of an evaluation of one record in single mode
EVALUATION_RESULT: dict[str, Any] = {
    "model": {"name": "tiny", "fingerprint": "f" * 64},
    "plan": EvaluationPlan().model_dump(mode="json"),
    "parameters": {"layers": [1]},
    "records": {"measured": 1, "left_out": [], "missing_fields": {}},
    "damage_texts": None,
    "before": dict.fromkeys((*MEASURES, *COMBINED_SCORES), _INTERVAL),
    "after": dict.fromkeys((*MEASURES, *COMBINED_SCORES), _INTERVAL),
    "changes": dict.fromkeys(CHANGE_SCORES, _INTERVAL),
    "damage": None,
    "norm": {"1.mlp": _INTERVAL},
    "strengthened": 0,
    "rows": [],
    "seconds": {"find": 0.1},
    "edits_per_minute": {"total": 60.0},
}


@lru_cache
def tokenizer() -> str:
    """Return a byte-level tokenizer as JSON, with the special tokens of ChatML."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([PROMPT], trainer)
    raw.add_special_tokens([START, STOP])
    return raw.to_str()


class FakeWorker:
    """Receives from the broker and publishes as an engine does, without a model. Clear `may_finish` to delay
    results."""

    def __init__(self, worker_parts: WorkerParts) -> None:
        self.worker_parts = worker_parts
        self.broker = worker_parts.broker
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.progress_reported = threading.Event()  # set when a job has reported its first progress
        self.reject_edits = False
        self.export_error: Exception | None = None  # the error of export jobs
        self.call_error: dict[str, str] | None = None
        #: the number and the text of a version that is asked for, in the place of those of GENERATION_RESULT
        self.texts: dict[Any, tuple[int, str]] = {}
        self.calls: list[dict[str, Any]] = []
        self.channels: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self.may_finish.set()
        self.broker.wake()
        self._thread.join(10)

    def _run(self) -> None:
        last_heartbeat = time.monotonic()
        while not self._stop.is_set():
            if time.monotonic() - last_heartbeat > 5:
                last_heartbeat = time.monotonic()
                self.worker_parts.session.heartbeat(self.worker_parts.ledger.head())
            for delivery in self.broker.receive(WORK_KINDS, 8, 0.2):
                self._handle(delivery)
                self.broker.ack(delivery)

    def _handle(self, delivery: Delivery) -> None:
        if delivery.kind in ("generate", "compare"):
            self._answer_call(delivery)
        elif job := self.worker_parts.jobs.claim(delivery.job_id):
            self.worker_parts.jobs.report_progress(job, Progress(Phase.OPTIMIZE, 1, 2))
            self.progress_reported.set()
            self.may_finish.wait(20)
            self.worker_parts.jobs.report_progress(job, Progress(Phase.OPTIMIZE, 2, 2))
            if self.worker_parts.jobs.cancel_requested(job):
                self.worker_parts.jobs.finish(job, "cancelled")
            elif job.request.get("target_new") == FAILING_OBJECT:
                self.worker_parts.jobs.fail(job, InvalidInput("there is no such place."))
            elif job.kind == "trace":
                self.worker_parts.jobs.finish(job, "done", TRACE_RESULT)
            elif job.kind == "evaluation":
                self.worker_parts.jobs.finish(job, "done", EVALUATION_RESULT)
            elif job.kind == "training":
                self.worker_parts.jobs.finish(job, "done", {"digest": "0" * 64, "plan": {"layer": 0}})
            elif job.kind == "export" and self.export_error is not None:
                self.worker_parts.jobs.fail(job, self.export_error)
            elif job.kind == "export":
                for number, data in enumerate(EXPORT_CHUNKS):
                    self.worker_parts.jobs.put_artifact(job, artifacts.chunk_name(number), data)
                file_info = {"file": "tiny-v1-peft.zip", "media_type": "application/zip"}
                self.worker_parts.jobs.finish(
                    job,
                    "done",
                    {**file_info, "bytes": len(b"".join(EXPORT_CHUNKS)), "pieces": len(EXPORT_CHUNKS)},
                )
            elif self.reject_edits or job.dry_run:
                self.worker_parts.jobs.finish(job, "rejected", {"es": 0.0})
            else:
                self.worker_parts.jobs.commit_edit(
                    job,
                    self.worker_parts.ledger.head(),
                    b"factors of " + job.id.encode(),
                    {"seed": 0} | EDIT_PROVENANCE,
                    {"es": 1.0},
                )

    def _answer_call(self, delivery: Delivery) -> None:
        self.calls.append(delivery.payload)
        self.channels.append(delivery.job_id)
        if delivery.kind == "generate" and self.call_error is None:
            version, text = self._version_and_text(delivery)
            self.broker.publish(delivery.job_id, "token", {"index": 0, "text": text[:3], "version": version})
            self.progress_reported.set()
        self.may_finish.wait(20)
        if self.call_error is not None:
            self.broker.publish(delivery.job_id, "error", self.call_error, last=True)
        elif delivery.kind == "compare":
            side = {"version": 0, "text": " Paris", "tokens": [1], "finish_reason": "length"}
            prompt = delivery.payload["prompt"] or delivery.payload["text"]
            comparison = {"prompt": prompt, "sides": [side, side], "next_tokens": []}
            self.broker.publish(
                delivery.job_id, "end", comparison | {"total_variation": 0.0, "seconds": 0.1}, last=True
            )
        else:
            version, text = self._version_and_text(delivery)
            result = generation_result(delivery.payload) | {"version": version}
            result["choices"] = [choice | {"text": text} for choice in result["choices"]]
            self.broker.publish(delivery.job_id, "end", result, last=True)

    def _version_and_text(self, delivery: Delivery) -> tuple[int, str]:
        default = (GENERATION_RESULT["version"], GENERATION_RESULT["choices"][0]["text"])
        return self.texts.get(delivery.payload.get("version"), default)


class TestApp:
    """The API, services and stores of one data folder; embedded unless the settings name other stores."""

    __test__ = False  # not a class of tests

    def __init__(
        self,
        folder: Path,
        register: bool = True,
        chat_template: str | None = CHATML,
        positions: int = 64,
        **settings: Any,
    ) -> None:
        self.settings = Settings(data_dir=folder, **settings)
        self.container = build_container(self.settings)
        self.database, self.broker = self.container.database, self.container.broker
        self.services = self.container.services
        migrate(self.database)
        self.worker_parts = WorkerParts(
            self.database, self.broker, "f" * 64, "worker-1", single_process=self.container.single_process
        )
        self._info = {
            "positions": positions,
            "chat": chat_template and {"template": chat_template, "special_tokens": {}},
        }
        if register:
            self.register()
        development = Development.OFF if self.settings.api_key else Development.UNTIL_FIRST_KEY
        self.app: FastAPI = create_app(self.services, self.broker, self.settings, development)
        self.worker: FakeWorker | None = None

    def register(self) -> None:
        """Register the model and its worker, as a worker does that has loaded it."""
        recipe = Recipe(source="test", rome=RomeParameters(layers=(1,)))
        info = self._info | {
            "name": "tiny",
            "layers": 3,
            "vocabulary": 302,
            "width": 16,
            "inner_width": 40,
            "facts": True,
            "recipe": recipe.model_dump(mode="json"),
        }
        self.worker_parts.session.register(info, tokenizer())

    def start_fake_worker(self) -> FakeWorker:
        self.worker = FakeWorker(self.worker_parts)
        return self.worker

    def close(self) -> None:
        if self.worker is not None:
            self.worker.stop()
        self.container.close()


@contextmanager
def serving(test_app: TestApp) -> Iterator[str]:
    """Serve the application on a free port and yield its address; close it at the end."""
    with run_http_server(test_app.app) as address:
        yield address
    test_app.close()
