"""Log lines on stderr: an event and its fields, one line each. An error of the house shows no stack trace."""

from __future__ import annotations

import json
import logging

from service.errors import Misconfigured, PalimpsestError

#: what every record carries; the rest are the event's own fields
ORDINARY = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}


class Line(logging.Formatter):
    """`2026-11-21T03:00:00Z WARNING workers.keeper: heartbeat failed detail="..."`, then the trace of an unforeseen error."""

    default_time_format = "%Y-%m-%dT%H:%M:%S%z"
    default_msec_format = ""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = {name: value for name, value in vars(record).items() if name not in ORDINARY}
        told = [
            f"{name}={json.dumps(value, default=str, ensure_ascii=False)}" for name, value in fields.items()
        ]
        return " ".join([super().formatMessage(record), *told])

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info and isinstance(record.exc_info[1], PalimpsestError):
            record = logging.makeLogRecord(
                {**vars(record), "exc_info": None, "detail": record.exc_info[1].detail}
            )
        return super().format(record)


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Set up the log of this process."""
    handler = logging.StreamHandler()
    handler.setFormatter(Line())
    handler.addFilter(_not_said_otherwise)
    logging.basicConfig(level=level, handlers=[handler], force=True)


def _not_said_otherwise(record: logging.LogRecord) -> bool:
    """A wrong configuration ends the process, and `main` says it as its last words."""
    return not (record.exc_info and isinstance(record.exc_info[1], Misconfigured))
