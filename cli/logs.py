"""Log lines on stderr: an event and its fields, one line each. An error of the house shows no stack trace."""

from __future__ import annotations

import json
import logging
import math
from datetime import UTC, datetime
from typing import Any, Literal

from service.errors import Misconfigured, PalimpsestError
from service.kit.ids import request_id

#: what every record carries; the rest are the event's own fields
ORDINARY = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
#: the loggers of the house: only they say more than warnings, since libraries might say what users wrote
HOUSE = ("api", "cli", "palimpsest", "service", "workers")

Form = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]


def fields(record: logging.LogRecord) -> dict[str, Any]:
    """The event's own fields; the `detail` of an error of the house is one of them."""
    own = {name: value for name, value in vars(record).items() if name not in ORDINARY}
    if _expected(record):
        own["detail"] = record.exc_info[1].detail  # type: ignore[index, union-attr]
    return own


def _expected(record: logging.LogRecord) -> bool:
    """Whether the record tells of an error that the house raises on purpose: its words say it all."""
    return bool(record.exc_info) and isinstance(record.exc_info[1], PalimpsestError)  # type: ignore[index]


class Text(logging.Formatter):
    """`2026-11-21T03:00:00Z WARNING workers.heartbeat: heartbeat failed detail="..."`, then the trace of an unforeseen error."""

    default_time_format = "%Y-%m-%dT%H:%M:%S%z"
    default_msec_format = ""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        told = [
            f"{name}={json.dumps(value, default=str, ensure_ascii=False)}"
            for name, value in fields(record).items()
        ]
        return " ".join([super().formatMessage(record), *told])

    def format(self, record: logging.LogRecord) -> str:
        if _expected(record):
            record = logging.makeLogRecord({**vars(record), **fields(record), "exc_info": None})
        return super().format(record)


class Json(logging.Formatter):
    """One JSON object for each event: `time`, `level`, `logger`, `event`, the event's own fields, and the `trace` of an
    unforeseen error. ASCII, so that no character can break the line or the reader."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _message(record),
        }
        told |= {name: plain(value) for name, value in fields(record).items() if name not in told}
        if record.exc_info and not _expected(record):
            told["trace"] = self.formatException(record.exc_info)
        return json.dumps(told, allow_nan=False)


def _message(record: logging.LogRecord) -> str:
    """The event; as it was written where somebody else's arguments do not fit it."""
    try:
        return record.getMessage()
    except Exception:
        return str(record.msg)


def plain(value: Any) -> Any:
    """A field as JSON has it; what JSON cannot say becomes text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=str))
    except (TypeError, ValueError, RecursionError):  # odd keys, infinite numbers, circles
        return repr(value)


def lines(form: Form) -> logging.StreamHandler[Any]:
    """Writes each event to stderr as a line of this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(Json() if form == "json" else Text())
    handler.addFilter(_not_said_otherwise)
    handler.addFilter(_name_the_request)
    return handler


def log_to_stderr(form: Form = "text", level: Level = "warning") -> None:
    """Set up the log of this process: `Settings.log_format` and `Settings.log_level`."""
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(least, logging.WARNING), handlers=[lines(form)], force=True)
    for name in HOUSE:
        logging.getLogger(name).setLevel(least if least < logging.WARNING else logging.NOTSET)
    logging.captureWarnings(capture=True)


def _not_said_otherwise(record: logging.LogRecord) -> bool:
    """A wrong configuration ends the process, and `main` says it as its last words."""
    return not (record.exc_info and isinstance(record.exc_info[1], Misconfigured))


def _name_the_request(record: logging.LogRecord) -> bool:
    """Every line that is written while a request is answered, here or by a worker, bears its id."""
    if request_id.get() and not hasattr(record, "request"):
        record.request = request_id.get()
    return True
