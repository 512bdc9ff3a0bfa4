"""What the server of forked commands imports before it forks."""

from __future__ import annotations

import gc

import api.app
import cli.main
import cli.worker_process
import workers.health_server
import workers.worker

__all__ = ["api", "cli", "workers"]

gc.collect()
gc.freeze()  # a collection in a child would copy the shared pages
