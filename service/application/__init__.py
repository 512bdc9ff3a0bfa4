"""The verbs of the house: what the doors call, by the noun that they are about. Each is one transaction, and free of torch.

Everything is checked before anything is written; what is announced is committed.
"""

from __future__ import annotations

from datetime import timedelta

from service.application.edits import Edits
from service.application.evaluations import Evaluations
from service.application.exports import Exports
from service.application.generation import Calls
from service.application.imports import Imports
from service.application.job_queue import Queue
from service.application.jobs import Jobs
from service.application.ledger import Ledger
from service.application.models import Models
from service.application.served_model import Resident
from service.application.traces import Traces
from service.db.database import Database
from service.jobs.broker import Broker
from service.settings import Settings


class Operations:
    """All methods but `jobs.events` block on the database: call them from a thread. Safe to share between threads."""

    def __init__(self, database: Database, broker: Broker, settings: Settings) -> None:
        self.database = database
        self.broker = broker
        resident, queue = Resident(database), Queue(database, broker, settings)
        self.models = Models(database, broker, timedelta(seconds=settings.lease))
        self.edits = Edits(queue, resident)
        self.traces = Traces(queue, resident)
        self.evaluations = Evaluations(queue, resident)
        self.exports = Exports(queue)
        self.imports = Imports(queue, resident)
        self.jobs = Jobs(database, broker)
        self.calls = Calls(database, broker, settings, resident)
        self.ledger = Ledger(database)
