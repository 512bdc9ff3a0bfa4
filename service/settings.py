"""Settings: each is the environment variable `PALIMPSEST_<NAME>` and, unless only tests need it, a flag of `palimpsest
serve`.

Secrets can be read from files: the file `palimpsest_<name>` in the folder `PALIMPSEST_SECRETS`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "models" / "almanac"
#: marks a setting that is only an environment variable
WITHOUT_FLAG: dict[str, JsonValue] = {"flag": False}


class Settings(BaseSettings):
    """Configuration of a process. `docs/settings.md` lists every field, which a test checks."""

    model_config = SettingsConfigDict(
        env_prefix="PALIMPSEST_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    host: str = Field(
        "127.0.0.1", description="address to listen on; without API keys it must be a loopback address"
    )
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 selects a free port")
    data_dir: Path = Field(
        Path.home() / ".local" / "share" / "palimpsest",
        description="folder of the SQLite database, the statistics and the recipes",
    )
    model: str = Field(
        str(SHIPPED_MODEL),
        description="folder, GGUF file or Hugging Face name of the model, or the name of a fetched one",
    )
    models_dir: Path = Field(
        Path.home() / ".cache" / "palimpsest" / "models",
        description="folder of the models that `palimpsest fetch` gets",
    )
    adapter: Path | None = Field(
        None,
        description="folder of a LoRA adapter that is merged into the model when it is loaded; unset: none",
    )
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the database; unset: SQLite in the data folder"
    )
    redis_url: str | None = Field(
        None, description="URL of Redis, which connects several processes; unset: an in-process queue"
    )
    redis_prefix: str = Field("palimpsest", description="prefix of all keys in Redis")
    roles: str = Field(
        "generate,edit,trace,evaluate",
        description="kinds of work of a worker, some of generate,edit,trace,evaluate",
    )
    device: str = Field("cpu", description="device of the model, such as cpu, cuda or cuda:1")
    device_map: Literal["auto"] | None = Field(
        None,
        description="auto: spread the layers of the model over all GPUs of this machine and, as far as they do not fit there, the CPU; unset: the whole model is on --device",
    )
    dtype: str = Field("float32", description="precision of the weights: float32, bfloat16 or float16")
    threads: int | None = Field(None, ge=1, description="number of CPU threads of a worker; unset: all")
    api_key: str | None = Field(
        None,
        description="root API key with all scopes, at least 16 characters; `palimpsest keys` creates others",
    )
    development: bool | None = Field(
        None,
        description="accept requests from this machine without an API key; unset: only `palimpsest serve`, and until a key has existed",
    )
    ledger_key: str | None = Field(
        None,
        description="key that signs the audit records, 64 hexadecimal digits, the same in every process; unset: the file ledger.key in the data folder",
    )
    role_password: str | None = Field(
        None, description="password that `palimpsest migrate --grant-to` gives to the role; unset: none"
    )
    max_queue: int = Field(
        1000, ge=1, description="maximum number of queued jobs; more are rejected with status 429"
    )
    max_attempts: int = Field(3, ge=1, description="maximum number of attempts of a job whose worker fails")
    worker_timeout: float = Field(
        30.0,
        ge=1,
        description="seconds without a heartbeat after which the jobs of a worker are given to another one",
    )
    max_edits_per_batch: int = Field(
        16, ge=1, description="maximum number of queued edits that a worker processes in one batch"
    )
    requests_per_minute: int = Field(
        6000,
        ge=1,
        description="maximum number of requests of one API key per minute; more are rejected with status 429",
    )
    max_queued_per_key: int = Field(
        500,
        ge=1,
        description="maximum number of queued jobs of one API key, and of its waiting calls; more are rejected with status 429",
    )
    job_retention_days: int = Field(
        90,
        ge=0,
        le=36500,
        description="days after which a finished job that is not in the ledger is deleted; 0: never",
    )
    idempotency_key_retention_days: int = Field(
        7, ge=0, le=36500, description="days after which an Idempotency-Key can be used again; 0: never"
    )
    attestation_retention_days: int = Field(
        90,
        ge=0,
        le=36500,
        description="days for which the attestations of a worker that is gone are kept; 0: for ever",
    )
    max_body: int = Field(1_000_000, ge=1000, description="maximum size of a request body in bytes")
    max_records_body: int = Field(
        20_000_000, ge=1000, description="maximum size of a request body with records in bytes"
    )
    max_import_body: int = Field(
        200_000_000, ge=1000, description="maximum size of an imported file in bytes"
    )
    max_connections: int | None = Field(
        None,
        ge=16,
        description="maximum number of open HTTP connections; unset: what the limit of open files allows",
    )
    max_new_tokens: int = Field(
        16_384, ge=1, description="maximum number of new tokens of one request, over all its generations"
    )
    tokens_per_minute: int = Field(
        1_000_000,
        ge=1,
        description="maximum number of tokens that the requests of one API key may need per minute, prompts included",
    )
    max_concurrent_per_key: int = Field(
        64,
        ge=1,
        description="maximum number of calls and event streams that one API key has open in one process",
    )
    metrics_host: str = Field("127.0.0.1", description="address of the metrics and health server of a worker")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port of the metrics and health server of a worker; unset: no server",
    )
    log_format: Literal["text", "json"] = Field("text", description="format of log lines")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="minimum level of log lines"
    )
    crash_at: str | None = Field(
        None,
        description="for tests: crash point at which the process kills itself",
        json_schema_extra=WITHOUT_FLAG,
    )
    corpus: Path | None = Field(
        None,
        description="text for the key statistics: a file, a folder, hub:NAME, or samples; unset: the fact table of the model, else samples",
    )
    covariance_tokens: int | None = Field(
        None,
        ge=1000,
        description="number of tokens of the key statistics; unset: four for each dimension of a key, at least 8,000",
    )

    form: Literal["weights", "gated"] | None = Field(
        None,
        description="form of edits that name none: weights or gated; unset: that of the recipe",
    )

    def resolved_database_url(self) -> str:
        """Return the URL of the database."""
        return self.database_url or f"sqlite:///{self.sqlite_path()}"

    def sqlite_path(self) -> Path:
        """Return the file of the default SQLite database."""
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
        """Flags override environment variables, which override the files in PALIMPSEST_SECRETS."""
        return init_settings, env_settings, SecretsSettingsSource(settings_cls, _secrets_folder())


def _secrets_folder() -> str | None:
    folder = os.environ.get("PALIMPSEST_SECRETS")
    if folder and not Path(folder).is_dir():
        raise SettingsError(f"PALIMPSEST_SECRETS is {folder!r}, which is not a folder.")
    return folder or None
