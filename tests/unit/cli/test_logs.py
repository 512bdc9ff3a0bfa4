"""Log lines as text and as JSON: cli.logs."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.logs import PROJECT_LOGGERS, LogFormat, event_fields, log_to_stderr, stderr_handler
from service.errors import Misconfigured, Unavailable
from service.kit.ids import request_id

Captured = pytest.CaptureFixture[str]

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.just(object()),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.text()), inner)
        | st.frozensets(st.text())
    ),
    max_leaves=8,
)
NAMES = st.text(min_size=1) | st.sampled_from(["time", "level", "logger", "event", "trace", "detail"])


def make_record(event: str, error: BaseException | None = None, /, **own: Any) -> logging.LogRecord:
    raised = None
    if error is not None:
        try:
            raise error
        except BaseException:
            raised = sys.exc_info()
    made = logging.LogRecord("service.tests", logging.INFO, __file__, 1, event, (), raised)
    vars(made).update(own)
    return made


def format_record(record: logging.LogRecord, log_format: LogFormat = "json") -> str:
    """Return the line that the handler writes."""
    handler = stderr_handler(log_format)
    assert handler.filter(record)
    return handler.format(record)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Restore the logging configuration after the test."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.captureWarnings(capture=False)
    for name in PROJECT_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


@given(st.text(), st.dictionaries(NAMES, ANYTHING, max_size=4), st.none() | st.text())
def test_a_json_line_is_valid_for_any_record(event: str, own: dict[str, Any], error: str | None) -> None:
    """Any text, any fields and any exception give one line of ASCII that is valid JSON and contains the event."""
    own = {name: value for name, value in own.items() if name not in vars(make_record(""))}
    said = format_record(make_record(event, ValueError(error) if error else None, **own))
    assert len(said.splitlines()) == 1
    assert said.isascii()
    told = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["event"] == event
    assert set(own) <= set(told)


def test_json_formatter_handles_circular_fields() -> None:
    """A circular field is logged as its repr."""
    circle: list[Any] = []
    circle.append(circle)
    assert json.loads(format_record(make_record("x", circle=circle)))["circle"] == "[[...]]"


def test_json_formatter_handles_wrong_arguments() -> None:
    """An event whose arguments do not fit is logged without them."""
    made = make_record("%d of %d")
    made.args = ("one",)
    assert json.loads(format_record(made))["event"] == "%d of %d"


def test_the_fields_of_a_json_line() -> None:
    """A line has time, level, logger and event, then the fields of the event."""
    told = json.loads(format_record(make_record("job ended", job="edit_1", layers=[1, 2], seconds=0.5)))
    assert list(told) == ["time", "level", "logger", "event", "job", "layers", "seconds"]
    assert (told["level"], told["logger"], told["event"]) == ("info", "service.tests", "job ended")
    assert (told["job"], told["layers"], told["seconds"]) == ("edit_1", [1, 2], 0.5)


def test_only_unexpected_errors_log_a_stack_trace() -> None:
    """An unexpected error has a `trace`; a domain error has `error` and `detail` instead."""
    fault = json.loads(format_record(make_record("failed", ValueError("odd"))))
    assert "Traceback" in fault["trace"] and "ValueError: odd" in fault["trace"]
    foreseen = json.loads(format_record(make_record("failed", Unavailable("the queue is down."))))
    assert foreseen["detail"] == "the queue is down."
    assert "trace" not in foreseen


def test_the_text_form() -> None:
    """A line of text has time, level, logger, event and the fields; a domain error has no traceback."""
    said = format_record(make_record("job failed", Unavailable('the "queue" is down.'), job="edit_1"), "text")
    fields = 'job="edit_1" error="unavailable" detail="the \\"queue\\" is down."'
    assert said.endswith(f" INFO service.tests: job failed {fields}"), said
    assert "Traceback" in format_record(make_record("job failed", ValueError("odd")), "text")


def test_log_lines_carry_the_request_id(quiet: None, capsys: Captured) -> None:
    """Lines that are logged during a request carry its id, unless they name another."""
    log_to_stderr("json", "info")
    token = request_id.set("req_1")
    logging.getLogger("service.x").info("mine")
    logging.getLogger("service.x").info("another's", extra={"request": "req_2"})
    request_id.reset(token)
    logging.getLogger("service.x").info("nobody's")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("request") for line in told] == ["req_1", "req_2", None]


@pytest.mark.parametrize(
    ("level", "project", "others"), [("debug", 4, 2), ("info", 3, 2), ("warning", 2, 2), ("error", 1, 1)]
)
def test_log_level_applies_to_project_loggers(
    quiet: None, capsys: Captured, level: Any, project: int, others: int
) -> None:
    """The level applies to the loggers of the project; libraries log warnings and errors only."""
    log_to_stderr("text", level)
    for name, heard in (("workers.x", project), ("somebody.else", others)):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(number, "said")
        assert len(capsys.readouterr().err.splitlines()) == heard


def test_a_wrong_configuration_is_not_logged(quiet: None, capsys: Captured) -> None:
    """`main` prints a configuration error, so it is not logged."""
    log_to_stderr()
    logging.getLogger("workers.x").error("ended", exc_info=Misconfigured("no such model."))
    assert capsys.readouterr().err == ""


def test_fields_are_what_the_caller_gave() -> None:
    """Standard attributes of a record are not fields of the event."""
    assert event_fields(make_record("x", job="edit_1")) == {"job": "edit_1"}
