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
STANDARD_ATTRIBUTES = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
#: the loggers of the house: only they say more than warnings, since libraries might say what users wrote
PROJECT_LOGGERS = ("api", "cli", "palimpsest", "service", "workers")

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def event_fields(record: logging.LogRecord) -> dict[str, Any]:
    """The event's own fields; the `detail` of an error of the house is one of them."""
    extra = {name: value for name, value in vars(record).items() if name not in STANDARD_ATTRIBUTES}
    if _is_domain_error(record):
        extra["detail"] = record.exc_info[1].detail  # type: ignore[index, union-attr]
    return extra


def _is_domain_error(record: logging.LogRecord) -> bool:
    """Whether the record tells of an error that the house raises on purpose: its words say it all."""
    return bool(record.exc_info) and isinstance(record.exc_info[1], PalimpsestError)  # type: ignore[index]


class TextFormatter(logging.Formatter):
    """`2026-11-21T03:00:00Z WARNING workers.heartbeat: heartbeat failed detail="..."`, then the trace of an unforeseen error."""

    default_time_format = "%Y-%m-%dT%H:%M:%S%z"
    default_msec_format = ""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        parts = [
            f"{name}={json.dumps(value, default=str, ensure_ascii=False)}"
            for name, value in event_fields(record).items()
        ]
        return " ".join([super().formatMessage(record), *parts])

    def format(self, record: logging.LogRecord) -> str:
        if _is_domain_error(record):
            record = logging.makeLogRecord({**vars(record), **event_fields(record), "exc_info": None})
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One JSON object for each event: `time`, `level`, `logger`, `event`, the event's own fields, and the `trace` of an
    unforeseen error. ASCII, so that no character can break the line or the reader."""

    def format(self, record: logging.LogRecord) -> str:
        payload: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _format_message(record),
        }
        payload |= {
            name: json_safe(value) for name, value in event_fields(record).items() if name not in payload
        }
        if record.exc_info and not _is_domain_error(record):
            payload["trace"] = self.formatException(record.exc_info)
        return json.dumps(payload, allow_nan=False)


def _format_message(record: logging.LogRecord) -> str:
    """The event; as it was written where somebody else's arguments do not fit it."""
    try:
        return record.getMessage()
    except Exception:
        return str(record.msg)


def json_safe(value: Any) -> Any:
    """A field as JSON has it; what JSON cannot say becomes text."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=str))
    except (TypeError, ValueError, RecursionError):  # odd keys, infinite numbers, circles
        return repr(value)


def stderr_handler(log_format: LogFormat) -> logging.StreamHandler[Any]:
    """Writes each event to stderr as a line of this form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(_drop_misconfigured)
    handler.addFilter(_add_request_id)
    return handler


def log_to_stderr(log_format: LogFormat = "text", level: LogLevel = "warning") -> None:
    """Set up the log of this process: `Settings.log_format` and `Settings.log_level`."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(
        level=max(threshold, logging.WARNING), handlers=[stderr_handler(log_format)], force=True
    )
    for name in PROJECT_LOGGERS:
        logging.getLogger(name).setLevel(threshold if threshold < logging.WARNING else logging.NOTSET)
    logging.captureWarnings(capture=True)


def _drop_misconfigured(record: logging.LogRecord) -> bool:
    """A wrong configuration ends the process, and `main` says it as its last words."""
    return not (record.exc_info and isinstance(record.exc_info[1], Misconfigured))


def _add_request_id(record: logging.LogRecord) -> bool:
    """Every line that is written while a request is answered, here or by a worker, bears its id."""
    if request_id.get() and not hasattr(record, "request"):
        record.request = request_id.get()
    return True
