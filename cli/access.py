"""Who may send requests to a process: the development mode at its start, and what the start says about it."""

from __future__ import annotations

from api.authentication import is_loopback
from service.application.api_keys import ApiKeys
from service.application.development import Development, KeylessAccess, KeyMarker, development_mode
from service.db.database import Database
from service.settings import Settings

NOTICES = {
    Development.ON: "Development mode: every program on this machine can use the service without an API key.",
    Development.UNTIL_FIRST_KEY: (
        "Development mode: requests from this machine need no API key, until the first one is created with `palimpsest keys "
        "create`."
    ),
}
NO_KEY_NOTICE = (
    "Every request needs an API key, and there is none: create one with `palimpsest keys create --name NAME --scopes admin`, "
    "or start with --development to accept requests from this machine without one."
)


def resolve_development(settings: Settings, database: Database, default: Development) -> Development:
    """Return the mode of a process, `default` if nothing is configured. Records that a key exists."""
    mode = development_mode(settings, default if is_loopback(settings.host) else Development.OFF)
    marker = KeyMarker(settings.data_dir)
    if settings.api_key:
        marker.set()
    key_required = KeylessAccess(mode, marker).require_key_if_any(ApiKeys(database))
    return Development.OFF if key_required and mode is Development.UNTIL_FIRST_KEY else mode


def access_notice(settings: Settings, database: Database, development: Development) -> str:
    """Return what a start says about keys; "" if requests need one and one exists."""
    if development is Development.OFF:
        has_key = settings.api_key or any(key.revoked is None for key in ApiKeys(database).all())
        return "" if has_key else NO_KEY_NOTICE
    return NOTICES[development]
