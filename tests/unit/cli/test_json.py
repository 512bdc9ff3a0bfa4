"""`--json` prints one JSON value to stdout for every command with a result, also on errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cli.main import build_parser, main
from tests.support.fake_http_service import FakeService, sse_stream
from tests.support.parsers import iter_commands

Captured = pytest.CaptureFixture[str]

#: commands without a result -> reason
COMMANDS_WITHOUT_JSON = {
    "serve": "runs until it is stopped",
    "api": "runs until it is stopped",
    "worker": "runs until it is stopped",
    "mcp": "speaks a protocol of its own on stdout",
    "completion": "prints a script for a shell",
}


def test_every_command_has_the_flag() -> None:
    """Every command has `--json`, except those listed with a reason."""
    found = dict(iter_commands(build_parser()))
    lacking = {words for words, parser in found.items() if "--json" not in parser._option_string_actions}
    assert lacking == set(COMMANDS_WITHOUT_JSON)
    assert {"edits show", "jobs retry", "keys list", "study trace"} <= set(found)


EDIT = {
    "id": "edit_1",
    "status": "applied",
    "version": 1,
    "subject": "Nile",
    "prompt": "{} is",
    "target_new": "é\x9b",
}
LINKED = {**EDIT, "links": {"self": "/edits/edit_1", "events": "/edits/edit_1/events"}}
ENTRY = {"version": 1, "kind": "apply", "edit_id": "edit_1"}
TRACE = {"id": "trace_1", "status": "done", "result": {}, "links": {"self": "/trace/trace_1", "events": "/trace/trace_1/events"}}  # fmt: skip
JOB = {"id": "edit_1", "status": "queued"}


def page(*items: Any) -> dict[str, Any]:
    return {"items": list(items), "next": None}


ANSWERS: dict[str, Any] = {
    "POST /edits": {**LINKED, "status": "queued"},
    "GET /edits/edit_1/events": sse_stream(("end", {})),
    "GET /edits/edit_1": LINKED,
    "GET /edits": page(EDIT, EDIT),
    "DELETE /edits/edit_1": EDIT,
    "GET /ledger": page(ENTRY),
    "GET /ledger/verify": {"ok": True, "findings": []},
    "GET /models": page({"name": "almanac"}),
    "GET /evaluations": page(JOB),
    "GET /evaluations/evaluation_1": JOB,
    "POST /trace": {**TRACE, "status": "queued"},
    "GET /trace/trace_1/events": sse_stream(("end", {})),
    "GET /trace/trace_1": TRACE,
    "GET /trace": page(TRACE),
    "POST /generate": {"text": " long", "version": 1},
    "POST /compare": {"sides": []},
    "GET /jobs": page(JOB),
    "POST /jobs/edit_1/retry": JOB,
}


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("edit Nile {}\tis short", LINKED),
        ("edits --limit 2", [EDIT, EDIT]),
        ("edits show edit_1", LINKED),
        ("revert edit_1", EDIT),
        ("ledger", [ENTRY]),
        ("ledger --verify", ANSWERS["GET /ledger/verify"]),
        ("models", [{"name": "almanac"}]),
        ("evaluations", [JOB]),
        ("evaluations show evaluation_1", JOB),
        ("trace Nile\tis Nile", TRACE),
        ("traces", [TRACE]),
        ("traces show trace_1", TRACE),
        ("generate Nile", ANSWERS["POST /generate"]),
        ("compare Nile", ANSWERS["POST /compare"]),
        ("jobs", [JOB]),
        ("jobs retry edit_1", JOB),
    ],
)
def test_json_prints_the_response_of_the_service(
    fake: FakeService, capsys: Captured, words: str, value: Any
) -> None:
    """The value is the response of the service, with the pages of a list joined. It is one line of ASCII."""
    fake.responses = dict(ANSWERS)
    assert main([*(word.replace("\t", " ") for word in words.split(" ")), "--json"]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown) == value
    assert shown.isascii() and shown.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["jobs --json retry edit_1", "jobs retry --json edit_1", "edits --json show edit_1"]
)
def test_the_flag_may_stand_before_the_verb(fake: FakeService, capsys: Captured, words: str) -> None:
    """`--json` is accepted before and after the subcommand."""
    fake.responses = dict(ANSWERS)
    assert main(words.split()) == 0
    assert json.loads(capsys.readouterr().out)["id"] == "edit_1"


def test_a_program_asks_for_a_whole_answer(fake: FakeService) -> None:
    """`generate --json` requests a response without streaming."""
    fake.responses = dict(ANSWERS)
    assert main(["generate", "Nile", "--json"]) == 0
    assert fake.requests == [("POST /generate", {"prompt": "Nile", "version": "head"})]


def test_a_refusal_is_a_value_too(fake: FakeService, capsys: Captured) -> None:
    """An error is printed to stdout as a JSON value, and to stderr as a sentence."""
    fake.responses = {"DELETE /edits/edit_1": FakeService.problem(404, "No resource has this id.")}
    assert main(["revert", "edit_1", "--json"]) == 1
    shown = capsys.readouterr()
    error = {"title": "x", "detail": "No resource has this id.", "status": 404}
    assert json.loads(shown.out) == {"error": error}
    assert shown.err == "palimpsest: No resource has this id.\n"


def test_a_wrong_configuration_is_one(capsys: Captured) -> None:
    """A configuration error is printed as a JSON value, with exit code 2."""
    assert main(["revert", "edit_1", "--json", "--url", "nowhere"]) == 2
    assert "--url" in json.loads(capsys.readouterr().out)["error"]["detail"]


@pytest.mark.parametrize("status", ["failed", "rejected"])
def test_a_job_that_did_not_do_it(fake: FakeService, capsys: Captured, status: str) -> None:
    """A job that fails or is rejected is printed as its resource, with exit code 1."""
    ended = {**LINKED, "status": status, "result": {"reason": "it did not take"}}
    fake.responses = {**ANSWERS, "GET /edits/edit_1": ended}
    assert main(["edit", "Nile", "{} is", "short", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == ended
    assert "it did not take" in shown.err
    fake.responses = {**ANSWERS, "GET /trace/trace_1": {**TRACE, "status": "failed"}}
    assert main(["trace", "Nile is", "Nile", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "failed"


def test_a_broken_ledger_is_exit_code_1(fake: FakeService, capsys: Captured) -> None:
    """`ledger --verify --json` prints the findings, with exit code 1."""
    fake.responses = {"GET /ledger/verify": {"ok": False, "findings": ["entry 2: the chain is broken"]}}
    assert main(["ledger", "--verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["findings"] == ["entry 2: the chain is broken"]


def test_keys_and_the_database(capsys: Captured, tmp_path: Path) -> None:
    """`keys create` prints the token, and `keys list` does not. `migrate` prints the revisions before and
    after."""
    data = ["--data-dir", str(tmp_path), "--json"]

    def run_json(*words: str) -> Any:
        assert main([*words, *data]) == 0
        return json.loads(capsys.readouterr().out)

    moved = run_json("migrate")
    assert moved["before"] is None and moved["now"]
    made = run_json("keys", "create", "--name", "nightly", "--scopes", "edit,read", "--max-queued", "5")
    assert (made["name"], made["scopes"], made["max_queued"]) == ("nightly", ["read", "edit"], 5)
    assert made["token"]
    (listed,) = run_json("keys", "list")
    assert "token" not in listed and listed["revoked"] is None
    assert run_json("keys", "revoke", "nightly")["revoked"]
