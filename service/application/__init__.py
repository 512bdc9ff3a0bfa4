"""The verbs of the house: what the doors call, by the noun that they are about. Each is one transaction, and free of torch.

Everything is checked before anything is written; what is announced is committed.
"""

from __future__ import annotations

from datetime import timedelta

from service.application.edits import EditService
from service.application.evaluations import EvaluationService
from service.application.exports import ExportService
from service.application.generation import GenerationService
from service.application.imports import ImportService
from service.application.job_queue import JobQueue
from service.application.jobs import JobService
from service.application.ledger import LedgerService
from service.application.models import ModelService
from service.application.served_model import ServedModel
from service.application.traces import TraceService
from service.db.database import Database
from service.jobs.broker import Broker
from service.settings import Settings


class Services:
    """All methods but `jobs.events` block on the database: call them from a thread. Safe to share between threads."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self.database = database
        self.broker = broker
        served_model, queue = ServedModel(database), JobQueue(database, broker, settings)
        self.models = ModelService(database, broker, timedelta(seconds=settings.worker_timeout))
        self.edits = EditService(queue, served_model)
        self.traces = TraceService(queue, served_model)
        self.evaluations = EvaluationService(queue, served_model)
        self.exports = ExportService(queue)
        self.imports = ImportService(queue, served_model)
        self.jobs = JobService(database, broker)
        self.generation = GenerationService(database, broker, settings, served_model)
        self.ledger = LedgerService(database)
