"""Log lines on stderr, as text or as JSON: time, level, logger, event, and the fields of the event."""

from __future__ import annotations

import json
import logging
import math
from datetime import UTC, datetime
from typing import Any, Literal

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

from service.errors import Misconfigured, PalimpsestError
from service.kit.ids import request_id

#: loggers of this project. Libraries log warnings only, since their messages may contain prompts.
PROJECT_LOGGERS = ("api", "cli", "palimpsest", "service", "workers")
#: attributes of every record; all others are fields of the event
STANDARD_ATTRIBUTES = {*RESERVED_ATTRS, "color_message"}

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def add_event_fields(record: logging.LogRecord) -> bool:
    """Logging filter: add the request id, and replace the traceback of a domain error by its code and detail."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, Misconfigured):
        return False  # `main` prints it when the process exits
    if request_id.get() and not hasattr(record, "request"):
        record.request = request_id.get()
    if isinstance(error, PalimpsestError):
        record.exc_info = None
        record.error, record.detail = error.code, error.detail
    try:
        record.getMessage()
    except Exception:  # a library passed arguments that do not fit its message
        record.args = None
    return True


def event_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the fields that the caller logged."""
    return {name: value for name, value in vars(record).items() if name not in STANDARD_ATTRIBUTES}


class TextFormatter(logging.Formatter):
    """`2026-11-21T03:00:00+0000 WARNING workers.heartbeat: heartbeat failed detail="..."`."""

    default_time_format = "%Y-%m-%dT%H:%M:%S%z"
    default_msec_format = ""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = (
            f"{name}={json.dumps(value, default=str, ensure_ascii=False)}"
            for name, value in event_fields(record).items()
        )
        return " ".join([super().formatMessage(record), *fields])


class JsonLinesFormatter(JsonFormatter):
    """One JSON object a line, in ASCII: `time`, `level`, `logger`, `event`, the fields, and `trace` for a traceback."""

    def __init__(self) -> None:
        super().__init__(reserved_attrs=STANDARD_ATTRIBUTES, json_ensure_ascii=True)

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        return {name: json_safe(value) for name, value in log_data.items()}

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        log_data["time"] = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        log_data["level"], log_data["logger"] = record.levelname.lower(), record.name
        log_data["event"] = record.message
        log_data.update({k: v for k, v in event_fields(record).items() if k not in log_data})
        if "exc_info" in message_dict:
            log_data["trace"] = message_dict["exc_info"]


def json_safe(value: Any) -> Any:
    """Return a value that JSON can represent; other values become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=str))
    except (TypeError, ValueError, RecursionError):  # keys of other types, infinities, cycles
        return repr(value)


def stderr_handler(log_format: LogFormat) -> logging.StreamHandler[Any]:
    """Return a handler that writes each event as one line of this format to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLinesFormatter() if log_format == "json" else TextFormatter())
    handler.addFilter(add_event_fields)
    return handler


def log_to_stderr(log_format: LogFormat = "text", level: LogLevel = "warning") -> None:
    """Configure the log of this process with `Settings.log_format` and `Settings.log_level`."""
    threshold = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(
        level=max(threshold, logging.WARNING), handlers=[stderr_handler(log_format)], force=True
    )
    for name in PROJECT_LOGGERS:
        logging.getLogger(name).setLevel(threshold if threshold < logging.WARNING else logging.NOTSET)
    logging.captureWarnings(capture=True)
