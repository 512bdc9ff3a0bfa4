"""The one reader of the environment: every setting is `PALIMPSEST_<NAME>` and a flag of `palimpsest serve`.

What is secret may come from files instead: each is `palimpsest_<name>` in the folder that `PALIMPSEST_SECRETS` names.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "models" / "almanac"


class Settings(BaseSettings):
    """How a process of Palimpsest is wired. `docs/settings.md` lists every field; a test holds it to that."""

    model_config = SettingsConfigDict(
        env_prefix="PALIMPSEST_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    host: str = Field("127.0.0.1", description="address to listen on; loopback only without any key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    data_dir: Path = Field(
        Path.home() / ".local" / "share" / "palimpsest",
        description="folder of the ledger (SQLite) and of the statistics of models",
    )
    model: str = Field(str(SHIPPED_MODEL), description="folder or hub name of the resident model")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the ledger; SQLite in the data folder when left out"
    )
    redis_url: str | None = Field(None, description="Redis for several workers; in-process when left out")
    redis_prefix: str = Field("palimpsest", description="what every key in Redis begins with")
    roles: str = Field(
        "generate,edit,trace,evaluate", description="what a worker does: some of generate,edit,trace,evaluate"
    )
    device: str = Field("cpu", description="device of the model: cpu, cuda, cuda:1")
    dtype: str = Field("float32", description="precision of the resident model: float32, bfloat16 or float16")
    threads: int | None = Field(None, ge=1, description="CPU threads of the worker; all when left out")
    api_key: str | None = Field(
        None, description="root key, good for everything; `palimpsest keys` makes others"
    )
    max_queue: int = Field(1000, ge=1, description="waiting jobs above which new ones get 429")
    max_attempts: int = Field(3, ge=1, description="how often a job is tried when its worker dies")
    worker_timeout: float = Field(
        30.0,
        ge=1,
        description="seconds of silence after which a worker counts as dead and its work is taken over",
    )
    max_edits_per_batch: int = Field(
        16, ge=1, description="most waiting edits that a worker carries out together"
    )
    requests_per_minute: int = Field(6000, ge=1, description="requests of one key in a minute; more get 429")
    max_queued_per_key: int = Field(
        500, ge=1, description="jobs of one key that may wait at once; more get 429"
    )
    max_body: int = Field(1_000_000, ge=1000, description="largest body of a request in bytes")
    max_records_body: int = Field(
        20_000_000, ge=1000, description="largest body of a request that carries records, in bytes"
    )
    max_import_body: int = Field(
        200_000_000, ge=1000, description="largest file of edits that may be imported, in bytes"
    )
    max_new_tokens: int = Field(4096, ge=1, description="most tokens that one request may ask for")
    metrics_host: str = Field("127.0.0.1", description="address of a worker's own metrics and health")
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="port of a worker's own metrics and health; off when left out"
    )
    log_format: Literal["text", "json"] = Field("text", description="form of the log lines: text or json")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="least level that is logged"
    )
    crash_at: str | None = Field(
        None, description="for tests: the crash point at which the process kills itself"
    )
    corpus: Path | None = Field(
        None,
        description="text for the statistics: a file, a folder, hub:NAME or samples; the model's own facts or samples when left out",
    )
    covariance_tokens: int = Field(60_000, ge=1000, description="tokens behind the statistics of keys")

    def resolved_database_url(self) -> str:
        """The ledger's URL."""
        return self.database_url or f"sqlite:///{self.sqlite_path()}"

    def sqlite_path(self) -> Path:
        """The file of the ledger where no other place is named."""
        return self.data_dir / "palimpsest.sqlite3"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags before the environment before files: `palimpsest_api_key` in the folder that PALIMPSEST_SECRETS names."""
        return init_settings, env_settings, SecretsSettingsSource(settings_cls, _secrets_folder())


def _secrets_folder() -> str | None:
    folder = os.environ.get("PALIMPSEST_SECRETS")
    if folder and not Path(folder).is_dir():
        raise SettingsError(f"PALIMPSEST_SECRETS names {folder!r}, which is no folder.")
    return folder or None
