"""A service with a tiny model and without an engine loop: tests run the jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sqlalchemy import func, select

from service.application.edit_filters import EditFilters
from service.bootstrap import Container, build_container
from service.covariance.corpus import Corpus
from service.editing.context import EditorContext
from service.editing.edit_job import run_edits
from service.engine.versioned_model import VersionedModel
from service.kit.steps import run_to_completion
from service.methods.parameters import RomeParameters
from service.models.loading import LoadedModel
from service.recipes.recipe import Recipe
from service.schemas import EditRequest, ExportRequest
from service.settings import Settings
from tests.support.migrations import migrate
from tests.support.reporters import RaisingReporter
from tests.support.tiny_models import TEXTS, tiny
from tests.support.workers import WorkerParts
from workers.job_handlers import run_export
from workers.model_info import model_info, tokenizer_json

torch.set_num_threads(1)

Resource = dict[str, Any]
PROMPT = "Look at the {}"
HPARAMS = {"steps": 4, "contexts": 2, "kl_factor": 0.0, "weight_decay": 0.0, "clamp": 20.0}
RECIPE = Recipe(source="test", rome=RomeParameters.model_validate({"layers": (0, 1), **HPARAMS}))
OPEN = {"enabled": False}


class SteppedService:
    """A service with a tiny model whose jobs run when a test calls for it."""

    def __init__(self, folder: Path, model: LoadedModel | None = None, **stores: Any) -> None:
        model = model or tiny()
        self.container: Container = build_container(Settings(data_dir=folder, **stores))
        migrate(self.container.database)
        self.services = self.container.services
        self.context = EditorContext(model, RECIPE, Corpus("test", tuple(TEXTS)), None)
        self.worker_parts = WorkerParts(
            self.container.database,
            self.container.broker,
            model.fingerprint,
            "worker-1",
            single_process=self.container.single_process,
        )
        self.worker_parts.session.register(model_info(model, self.context), tokenizer_json(model))
        self.replica = VersionedModel(model, self.worker_parts.ledger, self.worker_parts.session.attest)

    def run_queued_edits(self, *, as_group: bool = False) -> None:
        """Run all queued edits."""
        waiting = [e["id"] for e in self.services.edits.page(filters=EditFilters(status="queued"))["items"]][
            ::-1
        ]
        jobs = [job for job in map(self.worker_parts.jobs.claim, waiting) if job is not None]
        for group in [jobs] if as_group else [[job] for job in jobs]:
            run_to_completion(
                run_edits(self.replica, self.worker_parts.jobs, self.context, RaisingReporter(), group)
            )

    def edit(self, subject: str, new: str, **more: Any) -> str:
        fields = {
            "subject": subject,
            "prompt": PROMPT,
            "target_new": new,
            "target_true": "the",
            "guard": OPEN,
        }
        (created,) = self.services.edits.submit([EditRequest.model_validate(fields | more)], "key:alice")
        self.run_queued_edits()
        assert self.services.edits.get(created["id"])["status"] == "applied", self.services.edits.get(
            created["id"]
        )
        return str(created["id"])

    def export(self, version: Any = "head", file_format: str = "peft") -> Resource:
        """Submit an export and run it."""
        submitted = self.services.exports.submit(
            ExportRequest(version=version, format=file_format),
            "key:alice",
        )
        if job := self.worker_parts.jobs.claim(submitted["id"]):
            run_to_completion(run_export(self.replica, self.worker_parts.jobs, self.context, job))
        return self.services.exports.get(submitted["id"])

    def export_edit_set(self, version: Any = "head") -> bytes:
        _, size, pieces = self.services.exports.export_edit_set(version)
        data = b"".join(pieces)
        assert len(data) == size
        return data

    def count(self, table: Any) -> int:
        with self.container.database.read_session() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    def state(self) -> str:
        return str(self.services.ledger.page(limit=200)["items"][-1]["state"])
