"""What the server of forked commands imports before it forks."""

from __future__ import annotations

import gc

import psycopg
import transformers.models.gpt2.modeling_gpt2
import uvicorn.protocols.http.h11_impl

import api.app
import cli.api
import cli.http_server
import cli.main
import cli.serve
import cli.worker
import cli.worker_process
import workers.health_server
import workers.worker
from tests.support.disk_writes import do_not_wait_for_the_disk

__all__ = ["api", "cli", "psycopg", "transformers", "uvicorn", "workers"]

do_not_wait_for_the_disk()
gc.collect()
gc.freeze()  # a collection in a child would copy the shared pages
