"""Development mode: requests from this machine without an API key. Once a key has existed it must be asked for."""

from __future__ import annotations

import logging
from enum import Enum
from pathlib import Path

from service.application.api_keys import ApiKeys
from service.kit.files import write_atomically
from service.settings import Settings

MARKER_NAME = "keys-required"
MARKER_TEXT = (
    b"An API key has existed. `palimpsest serve` accepts requests without one only with --development.\n"
)

log = logging.getLogger(__name__)


class Development(Enum):
    """When requests without a key are accepted."""

    OFF = "off"
    UNTIL_FIRST_KEY = "until the first key"
    ON = "on"


def development_mode(settings: Settings, default: Development) -> Development:
    """Return the mode that the settings ask for; `default` if they configure nothing that concerns it."""
    if settings.development is not None:
        return Development.ON if settings.development else Development.OFF
    configured = settings.api_key or settings.database_url or settings.redis_url
    return Development.OFF if configured else default


class KeyMarker:
    """A file in the data folder that says that a key has existed, so that an emptied table opens nothing."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / MARKER_NAME
        self._is_set = False

    def is_set(self) -> bool:
        """Return whether a key has existed."""
        self._is_set = self._is_set or self._path.exists()
        return self._is_set

    def set(self) -> None:
        """Record that a key exists. A folder that cannot be written is no error: its process is not in
        development mode, or remembers the key while it runs."""
        if self.is_set():
            return
        self._is_set = True
        try:
            write_atomically(self._path, MARKER_TEXT)
        except OSError as error:
            log.info("the file %s cannot be written: %s", MARKER_NAME, error.strerror)


class KeylessAccess:
    """Whether requests without a key are accepted. Blocks on the database: call it from a thread."""

    def __init__(self, mode: Development, marker: KeyMarker) -> None:
        self.mode, self.marker = mode, marker

    def is_allowed(self, keys: ApiKeys) -> bool:
        """Return whether a request without a key is accepted now."""
        if self.mode is Development.UNTIL_FIRST_KEY:
            return not self.require_key_if_any(keys)
        return self.mode is Development.ON

    def require_key_if_any(self, keys: ApiKeys) -> bool:
        """Return whether a key has existed, and record it."""
        if not self.marker.is_set() and keys.any_exist():
            self.marker.set()
        return self.marker.is_set()
