"""The verbs of the house: what the doors call, by the noun that they are about. Each is one transaction, and free of torch.

Everything is checked before anything is written; what is announced is committed.
"""

from __future__ import annotations

from datetime import timedelta

from service.jobs.broker import Broker
from service.operations.calls import Calls
from service.operations.edits import Edits
from service.operations.evaluations import Evaluations
from service.operations.exports import Exports
from service.operations.imports import Imports
from service.operations.jobs import Jobs
from service.operations.ledger import Ledger
from service.operations.models import Models
from service.operations.queue import Queue
from service.operations.resident import Resident
from service.operations.traces import Traces
from service.settings import Settings
from service.store.database import Database


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
