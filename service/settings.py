"""The one reader of the environment: every setting is `PALIMPSEST_<NAME>` and a flag of `palimpsest serve`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

SHIPPED_MODEL = Path(__file__).resolve().parent.parent / "models" / "almanac"


class Settings(BaseSettings):
    """How a process of Palimpsest is wired. `docs/settings.md` lists every field; a test holds it to that."""

    model_config = SettingsConfigDict(env_prefix="PALIMPSEST_", frozen=True, extra="ignore")

    host: str = Field("127.0.0.1", description="address to listen on; loopback only without an API key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    data: Path = Field(
        Path.home() / ".local" / "share" / "palimpsest",
        description="folder of the ledger (SQLite) and of the statistics of models",
    )
    model: str = Field(str(SHIPPED_MODEL), description="folder or hub name of the resident model")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the ledger; SQLite in the data folder when left out"
    )
    redis_url: str | None = Field(None, description="Redis for several workers; in-process when left out")
    device: str = Field("cpu", description="device of the model: cpu, cuda, cuda:1")
    dtype: str = Field("float32", description="precision of the resident model: float32 or bfloat16")
    threads: int | None = Field(None, ge=1, description="CPU threads of the worker; all when left out")
    api_key: str | None = Field(None, description="bearer key that every request must carry")
    max_queue: int = Field(1000, ge=1, description="waiting jobs above which new ones get 429")
    max_attempts: int = Field(3, ge=1, description="how often a job is tried when its worker dies")
    corpus: Path | None = Field(
        None, description="text file for the statistics; the model's own facts or samples when left out"
    )
    stat_tokens: int = Field(60_000, ge=1000, description="tokens behind the statistics of keys")

    def database(self) -> str:
        """The ledger's URL."""
        return self.database_url or f"sqlite:///{self.data / 'palimpsest.sqlite3'}"
