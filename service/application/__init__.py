"""Application services: what the API and the command line call, one service per noun.

Each method is one transaction. It validates before it writes, and notifies after it commits. No module imports torch.
"""

from __future__ import annotations

from datetime import timedelta
from typing import cast

from service.application.edits import EditService
from service.application.evaluations import EvaluationService
from service.application.exports import ExportService
from service.application.generation import GenerationService
from service.application.imports import ImportService
from service.application.job_queue import JobQueue
from service.application.job_resource import JobResourceService
from service.application.jobs import JobService
from service.application.ledger import LedgerService
from service.application.models import ModelService
from service.application.served_model import ServedModel
from service.application.traces import TraceService
from service.application.trainings import TrainingService
from service.application.version_diff import VersionDiff
from service.application.version_names import VersionNameService
from service.db.database import Database
from service.jobs.broker import Broker
from service.jobs.job_kinds import JOB_KINDS
from service.settings import Settings


class Services:
    """All services. Their methods block on the database, except `jobs.events`: call them from a thread. Thread-safe."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self.database = database
        self.broker = broker
        served_model, queue = ServedModel(database), JobQueue(database, broker, settings)
        self.models = ModelService(database, broker, timedelta(seconds=settings.worker_timeout))
        #: the service of each kind of job, by the name of the kind
        self.by_kind: dict[str, JobResourceService] = {
            kind.name: kind.service_class()(kind, queue, served_model) for kind in JOB_KINDS.values()
        }
        self.edits = cast(EditService, self.by_kind["edit"])
        self.traces = cast(TraceService, self.by_kind["trace"])
        self.evaluations = cast(EvaluationService, self.by_kind["evaluation"])
        self.trainings = cast(TrainingService, self.by_kind["training"])
        self.exports = cast(ExportService, self.by_kind["export"])
        self.imports = ImportService(queue, served_model)
        self.jobs = JobService(database, broker)
        self.generation = GenerationService(database, broker, settings, served_model)
        self.ledger = LedgerService(database)
        self.version_names = VersionNameService(database)
        self.version_diff = VersionDiff(database)
