"""SQLAlchemy compiles each statement once per process, instead of once per database of a test."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, create_engine, util
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite

from service.db import database

_compiled: Any = util.LRUCache(5000)


def share_compiled_statements() -> None:
    """Let all engines of a driver use one cache. The keys of SQLAlchemy's caches contain the dialect."""
    for dialect in (SQLiteDialect_pysqlite, PGDialect_psycopg):
        dialect.__eq__ = lambda self, other: type(self) is type(other)  # type: ignore[method-assign]
        dialect.__hash__ = lambda self: hash(type(self))  # type: ignore[method-assign]
    vars(database)["create_engine"] = _create_engine_with_cache


def _create_engine_with_cache(*arguments: Any, **options: Any) -> Engine:
    return create_engine(*arguments, execution_options={"compiled_cache": _compiled}, **options)
