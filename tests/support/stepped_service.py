"""A service with a tiny model whose worker is stepped by hand: everything real but the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sqlalchemy import func, select

from service.bootstrap import Wired, wire
from service.covariance.corpus import Corpus
from service.editing.context import Toolkit
from service.editing.edit_job import edits_steps
from service.engine.versioned_model import Replica
from service.jobs.job_store import Desk
from service.kit.steps import Ended, finish
from service.models.loading import LoadedModel
from service.recipes.recipe import Recipe, RomeParameters
from service.schemas import EditRequest
from service.settings import Settings
from tests.support.migrations import migrate
from tests.support.tiny_models import TEXTS, tiny
from workers.job_handlers import exported
from workers.model_info import card, tokenizer_json

torch.set_num_threads(1)

Resource = dict[str, Any]
PROMPT = "Look at the {}"
HPARAMS = {"steps": 4, "contexts": 2, "kl_factor": 0.0, "weight_decay": 0.0, "clamp": 20.0}
RECIPE = Recipe(source="test", rome=RomeParameters.model_validate({"layers": (0, 1), **HPARAMS}))
OPEN = {"enabled": False}


class Place:
    """A service with a tiny model, whose worker is stepped by hand."""

    def __init__(self, folder: Path, model: LoadedModel | None = None, **stores: Any) -> None:
        model = model or tiny()
        self.wired: Wired = wire(Settings(data=folder, **stores))
        migrate(self.wired.database)
        self.do = self.wired.operations
        self.toolkit = Toolkit(model, RECIPE, Corpus("test", tuple(TEXTS)), None)
        self.desk = Desk(
            self.wired.database, self.wired.broker, model.fingerprint, "worker-1", sole=self.wired.sole
        )
        self.desk.register(card(model, self.toolkit), tokenizer_json(model))
        self.replica = Replica(model, self.desk)

    def work(self, *, together: bool = False) -> None:
        """Carry out all edits that wait."""
        waiting = [e["id"] for e in self.do.edits.page(status="queued")["items"]][::-1]
        jobs = [job for job in map(self.desk.start, waiting) if job is not None]
        for some in [jobs] if together else [[job] for job in jobs]:
            for news in edits_steps(self.replica, self.desk, some, self.toolkit):
                if isinstance(news, Ended) and news.error is not None:
                    raise news.error

    def edit(self, subject: str, new: str, **more: Any) -> str:
        asked = {"subject": subject, "prompt": PROMPT, "target_new": new, "target_true": "the", "guard": OPEN}
        (made,) = self.do.edits.submit([EditRequest.model_validate(asked | more)], "key:alice")
        self.work()
        assert self.do.edits.get(made["id"])["status"] == "applied", self.do.edits.get(made["id"])
        return str(made["id"])

    def export(self, version: Any = "head", form: str = "peft") -> Resource:
        """Ask for an export and carry it out."""
        asked = self.do.exports.submit(version, form, "key:alice")
        if job := self.desk.start(asked["id"]):
            finish(exported(self.replica, self.desk, self.toolkit, job))
        return self.do.exports.get(asked["id"])

    def exported(self, version: Any = "head") -> bytes:
        _, size, pieces = self.do.exports.edits(version)
        data = b"".join(pieces)
        assert len(data) == size
        return data

    def count(self, table: Any) -> int:
        with self.wired.database.read() as session:
            return session.scalar(select(func.count()).select_from(table)) or 0

    def state(self) -> str:
        return str(self.do.ledger.page(limit=200)["items"][-1]["state"])
