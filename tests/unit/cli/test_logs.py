"""Log lines: one for each event, in either form."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.logs import PROJECT_LOGGERS, JsonFormatter, TextFormatter, event_fields, log_to_stderr
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


@pytest.fixture
def quiet() -> Iterator[None]:
    """The log of this process is as before afterwards."""
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    yield
    root.setLevel(before[0])
    root.handlers[:] = before[1]
    logging.captureWarnings(capture=False)
    for name in PROJECT_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


@given(st.text(), st.dictionaries(NAMES, ANYTHING, max_size=4), st.none() | st.text())
def test_a_json_line_is_one_object_whatever_is_in_it(
    event: str, own: dict[str, Any], error: str | None
) -> None:
    """Any text, any fields and any exception give one line of ASCII that JSON can read, and the event is in it."""
    own = {name: value for name, value in own.items() if name not in vars(make_record(""))}
    said = JsonFormatter().format(make_record(event, error and ValueError(error), **own))
    assert len(said.splitlines()) == 1
    assert said.isascii()
    told = json.loads(said, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert told["event"] == event
    assert set(own) <= set(told)


def test_json_formatter_handles_circular_fields() -> None:
    """A field that holds itself is told in Python's words."""
    circle: list[Any] = []
    circle.append(circle)
    assert json.loads(JsonFormatter().format(make_record("x", circle=circle)))["circle"] == "[[...]]"


def test_json_formatter_handles_wrong_arguments() -> None:
    """An event whose arguments do not fit it is told as it was written."""
    made = make_record("%d of %d")
    made.args = ("one",)
    assert json.loads(JsonFormatter().format(made))["event"] == "%d of %d"


def test_what_a_json_line_holds() -> None:
    """Time, level, logger and event come first, then the event's own fields as JSON."""
    told = json.loads(
        JsonFormatter().format(make_record("job ended", job="edit_1", layers=[1, 2], seconds=0.5))
    )
    assert list(told) == ["time", "level", "logger", "event", "job", "layers", "seconds"]
    assert (told["level"], told["logger"], told["event"]) == ("info", "service.tests", "job ended")
    assert (told["job"], told["layers"], told["seconds"]) == ("edit_1", [1, 2], 0.5)


def test_only_unexpected_errors_log_a_stack_trace() -> None:
    """The trace of an unforeseen error stands in `trace`; an error of the house has its `detail` and no trace."""
    fault = json.loads(JsonFormatter().format(make_record("failed", ValueError("odd"))))
    assert "Traceback" in fault["trace"] and "ValueError: odd" in fault["trace"]
    foreseen = json.loads(JsonFormatter().format(make_record("failed", Unavailable("the queue is down."))))
    assert foreseen["detail"] == "the queue is down."
    assert "trace" not in foreseen


def test_the_text_form() -> None:
    """A line of text is time, level, logger, event and the fields; an error of the house shows no trace."""
    said = TextFormatter().format(
        make_record("job failed", Unavailable('the "queue" is down.'), job="edit_1")
    )
    assert said.endswith(' INFO service.tests: job failed job="edit_1" detail="the \\"queue\\" is down."'), (
        said
    )
    assert "Traceback" in TextFormatter().format(make_record("job failed", ValueError("odd")))


def test_log_lines_carry_the_request_id(quiet: None, capsys: Captured) -> None:
    """What is logged while a request is answered bears its id, unless the line names another."""
    log_to_stderr("json", "info")
    token = request_id.set("req_1")
    logging.getLogger("service.x").info("mine")
    logging.getLogger("service.x").info("another's", extra={"request": "req_2"})
    request_id.reset(token)
    logging.getLogger("service.x").info("nobody's")
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line.get("request") for line in told] == ["req_1", "req_2", None]


@pytest.mark.parametrize(
    ("level", "house", "others"), [("debug", 4, 2), ("info", 3, 2), ("warning", 2, 2), ("error", 1, 1)]
)
def test_log_level_applies_to_project_loggers(
    quiet: None, capsys: Captured, level: Any, house: int, others: int
) -> None:
    """Our own lines are logged from the level on; libraries, which might repeat what users wrote, from warnings on."""
    log_to_stderr("text", level)
    for name, heard in (("workers.x", house), ("somebody.else", others)):
        for number in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(number, "said")
        assert len(capsys.readouterr().err.splitlines()) == heard


def test_a_wrong_configuration_is_not_logged(quiet: None, capsys: Captured) -> None:
    """It is the last word of the command, and is not said twice."""
    log_to_stderr()
    logging.getLogger("workers.x").error("ended", exc_info=Misconfigured("no such model."))
    assert capsys.readouterr().err == ""


def test_fields_are_what_the_caller_gave() -> None:
    """Nothing that every record carries is taken for a field."""
    assert event_fields(make_record("x", job="edit_1")) == {"job": "edit_1"}
