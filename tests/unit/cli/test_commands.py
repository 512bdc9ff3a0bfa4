"""The client commands, tested against a fake service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.edit import edit_fields
from cli.edit_output import fact_text, object_text
from cli.main import build_parser, main
from service.errors import Conflict
from tests.support.fake_http_service import FakeService, sse_stream

Captured = pytest.CaptureFixture[str]
LINKS = {"self": "/trace/trace_1", "events": "/trace/trace_1/events"}
TRACE_RESULT = {
    "prompt": "The Nile is",
    "tokens": ["The", " Nile", " is"],
    "subject": {"text": "Nile", "tokens": [1, 2]},
    "answer": {"text": "long"},
    "high": 0.9,
    "low": 0.1,
    "kinds": {
        "hidden": {
            "scores": [[0.1, 0.1], [0.8, 0.3], [0.1, 0.9]],
            "best": {"token": 2, "layer": 1, "score": 0.9},
        }
    },
}


def token_events(text: str = " Rome\x1b[31m.") -> str:
    return sse_stream(
        ("token", {"index": 0, "text": text[:3], "version": 1}),
        ("token", {"index": 0, "text": text[3:], "version": 1}),
        ("end", {"version": 1, "choices": [{"text": text, "tokens": [5, 6], "finish_reason": "stop"}]}),
    )


def test_generate_streams_to_stdout(fake: FakeService, capsys: Captured) -> None:
    """The prompt and the continuation are written to stdout, and the version to stderr. Control characters
    are removed."""
    fake.responses = {"POST /generate": token_events()}
    assert main(["generate", "The tower is in", "--version", "3", "--seed", "4", "--stop", "\n"]) == 0
    shown = capsys.readouterr()
    assert shown.out == "The tower is in Rome[31m.\n"
    assert "version 1, 2 tokens, stop" in shown.err
    asked = {"prompt": "The tower is in", "stream": True, "version": 3, "seed": 4, "stop": ["\n"]}
    assert fake.requests == [("POST /generate", asked)]


def test_an_answer_that_begins_anew_is_shown_anew(fake: FakeService, capsys: Captured) -> None:
    """After a `reset` event the prompt and the text are printed again on a new line."""
    said = [("token", {"index": 0, "text": " Rom", "version": 0}), ("reset", {})]
    end = ("end", {"choices": [{"text": " Rome", "tokens": [1], "finish_reason": "stop"}], "version": 0})
    fake.responses = {
        "POST /generate": sse_stream(*said, ("token", {"index": 0, "text": " Rome", "version": 0}), end)
    }
    assert main(["generate", "It is in"]) == 0
    assert capsys.readouterr().out == "It is in Rom\nIt is in Rome\n"


def test_a_generation_that_fails_says_why(fake: FakeService, capsys: Captured) -> None:
    """An error event, or a stream without an `end` event, exits with 1 and the reason."""
    fake.responses = {
        "POST /generate": sse_stream(("error", {"title": "Out", "detail": "Too many at once."}))
    }
    assert main(["generate", "x"]) == 1
    assert "Too many at once." in capsys.readouterr().err
    fake.responses = {"POST /generate": sse_stream(("token", {"index": 0, "text": "y", "version": 0}))}
    assert main(["generate", "x"]) == 1
    assert "closed the stream before its end" in capsys.readouterr().err


def test_compare_shows_both_sides(fake: FakeService, capsys: Captured) -> None:
    """The output has both texts and the tokens whose probability changed."""
    fake.responses = {
        "POST /compare": {
            "prompt": "p",
            "sides": [{"version": 0, "text": " Paris"}, {"version": 2, "text": " Rome"}],
            "next_tokens": [{"token": " Rome", "id": 1, "p": [0.01, 0.95]}],
            "total_variation": 0.94,
        }
    }
    assert main(["compare", "It is in", "--versions", "base", "2"]) == 0
    shown = capsys.readouterr().out
    for text in ("version 0: It is in Paris", "version 2: It is in Rome", "0.010", "0.950", "0.940"):
        assert text in shown
    assert fake.requests[0][1] == {"prompt": "It is in", "versions": ["base", 2]}


def test_trace_draws_and_saves(fake: FakeService, capsys: Captured, tmp_path: Path) -> None:
    """`trace` prints the heat map, and saves the image in the format of the file extension."""
    done = {"id": "trace_1", "status": "done", "result": TRACE_RESULT, "links": LINKS}
    fake.responses = {
        "POST /trace": done | {"status": "queued", "result": None},
        "GET /trace/trace_1/events": sse_stream(
            ("progress", {"phase": "x", "done": 1, "total": 2}), ("end", done)
        ),
        "GET /trace/trace_1": [done, b"<svg/>"],
    }
    picture = tmp_path / "nile.svg"
    asked = ["trace", "The Nile is", "Nile", "--kinds", "hidden,mlp", "--save", str(picture)]
    assert main(asked) == 0
    shown = capsys.readouterr().out
    assert "Nile*" in shown
    assert "strongest state      0.900 at is, layer 1; in the subject 0.800 at Nile*, layer 0" in shown
    assert picture.read_bytes() == b"<svg/>"
    assert fake.headers[-1]["Accept"] == "image/svg+xml"
    assert fake.requests[0][1]["kinds"] == ["hidden", "mlp"]


def test_a_picture_of_an_unknown_form_is_refused_first(fake: FakeService, capsys: Captured) -> None:
    """An unsupported file extension is rejected before a request is sent."""
    assert main(["trace", "x {}", "y", "--save", "z.gif"]) == 1
    assert ".svg or .png" in capsys.readouterr().err
    assert fake.requests == []


def test_a_revert_in_the_ledger_names_its_fact(fake: FakeService, capsys: Captured) -> None:
    """A revert entry is printed with its prompt and without an object."""
    body = {"subject": "Eiffel Tower", "prompt": "The {} is in", "applied_version": 1}
    entry = {
        "version": 2,
        "kind": "revert",
        "edit_id": "edit_1",
        "actor": "local",
        "at": "2026-11-25T01:00",
        "body": body,
    }
    fake.responses = {"GET /ledger": {"items": [entry], "next": None}}
    assert main(["ledger"]) == 0
    shown = capsys.readouterr().out
    assert "The Eiffel Tower is in" in shown and "None" not in shown and "→" not in shown


def test_ledger_reads_every_page(fake: FakeService, capsys: Captured) -> None:
    """`ledger` prints the entries of all pages."""
    entry = {
        "version": 1, "kind": "apply", "edit_id": "edit_1", "actor": "local", "at": "2026-01-01T00:00:00Z",
        "body": {"subject": "Nile", "prompt": "{} is", "target_new": "[bold]short"},
    }  # fmt: skip
    pages = [
        {"items": [entry], "next": "c"},
        {"items": [entry | {"version": 2, "kind": "revert"}], "next": None},
    ]
    fake.responses = {"GET /ledger": list(pages)}
    assert main(["ledger"]) == 0
    shown = capsys.readouterr().out
    assert "apply" in shown
    assert "revert" in shown
    assert "Nile is → [bold]short" in shown  # text of edits is not parsed as markup
    assert "2026-01-01 00:00" in shown and "(UTC)" in shown
    assert fake.requests[1] == ("GET /ledger", {"cursor": "c", "limit": "200"})


def test_verify_fails_when_something_is_wrong(fake: FakeService, capsys: Captured) -> None:
    """`ledger --verify` exits with 0 for a valid ledger, and with 1 and the findings otherwise."""
    fake.responses = {
        "GET /ledger/verify": {"ok": True, "findings": [], "entries": 2, "head": 2, "replicas": []}
    }
    assert main(["ledger", "--verify"]) == 0
    fake.responses = {
        "GET /ledger/verify": {"ok": False, "findings": ["entry 2: the chain is broken"], "head": 2}
    }
    assert main(["ledger", "--verify"]) == 1
    assert "entry 2: the chain is broken" in capsys.readouterr().err


def test_edits_are_listed(fake: FakeService, capsys: Captured) -> None:
    """`edits` prints a line for each edit, and sends its filters to the service."""
    item = {
        "id": "edit_1", "status": "applied", "version": 3, "subject": "Nile", "prompt": "{} is", "target_new": "short"
    }  # fmt: skip
    fake.responses = {"GET /edits": {"items": [item], "next": None}}
    assert main(["edits", "--status", "applied"]) == 0
    assert "edit_1" in capsys.readouterr().out
    assert fake.requests == [("GET /edits", {"status": "applied", "limit": "20"})]


def test_no_more_edits_are_listed_than_asked(fake: FakeService, capsys: Captured) -> None:
    """`--limit` limits the number of listed edits over all pages."""
    item = {"id": "edit_1", "status": "applied", "subject": "s", "prompt": "{}", "target_new": "t"}
    fake.responses = {"GET /edits": {"items": [item, item], "next": "more"}}
    assert main(["edits", "--limit", "3"]) == 0
    assert capsys.readouterr().out.count("edit_1") == 3
    assert len(fake.requests) == 2


def edit_with_result(status: str, **more: Any) -> dict[str, Any]:
    both = {
        "new": "Rome",
        "true": "Paris",
        "before": {"new": 0.01, "true": 0.9},
        "after": {"new": 0.8, "true": None},
    }
    result = {
        "rewrite": {"prompt": "Tower in", "text_before": " Paris", "text_after": " Rome", **both},
        "paraphrase": [{"prompt": "See it in", **both}],
        "neighborhood": [{"prompt": "Louvre in", **both}],
        "reason": None,
    }
    links = {"self": "/edits/edit_1", "events": "/edits/edit_1/events"}
    return {**EDIT_FIELDS, "id": "edit_1", "status": status, "links": links, "result": result, **more}


EDIT = ["edit", "Tower", "{} in", "Rome"]
EDIT_FIELDS = {"subject": "Tower", "prompt": "{} in"}


def answer_edit_with(fake: FakeService, ended: dict[str, Any]) -> None:
    """Let the fake service accept an edit that ends with this resource."""
    fake.responses = {
        "POST /edits": edit_with_result("queued", result=None),
        "GET /edits/edit_1/events": sse_stream(
            ("progress", {"phase": "value", "done": 1, "total": 2}), ("end", ended)
        ),
        "GET /edits/edit_1": ended,
    }


def test_edit_shows_what_changed(fake: FakeService, capsys: Captured) -> None:
    """The output has the probabilities of the objects on the prompt and on each probe, and the command that
    reverts the edit."""
    answer_edit_with(fake, edit_with_result("applied", version=7))
    more = [
        "--true",
        "Paris",
        "--paraphrase",
        "See it in",
        "--hparam",
        "layers=[1]",
        "--hparam",
        "compat=meng2022",
        "--form",
        "weights",
    ]
    assert main([*EDIT, *more]) == 0
    shown = capsys.readouterr().out
    assert "Applied as version 7. Revert it with: palimpsest revert edit_1" in shown
    bars = ["0.010  ▏", "0.900  ████████████▋"]
    assert [line.split()[0] for line in shown.splitlines() if any(bar in line for bar in bars)] == [
        "Rome",
        "Paris",
        "Rome",
        "Paris",
    ]
    for prompt in ("rewrite: Tower in", "paraphrase: See it in", "neighborhood: Louvre in"):
        assert prompt in shown
    assert fake.requests[0][1] == {
        "subject": "Tower",
        "prompt": "{} in",
        "target_new": "Rome",
        "target_true": "Paris",
        "dry_run": False,
        "hparams": {"layers": [1], "compat": "meng2022"},
        "form": "weights",
        "probes": {"paraphrase": ["See it in"], "neighborhood": "auto"},
    }


def test_edit_says_what_else_changed(fake: FakeService, capsys: Captured) -> None:
    """Probes that the service found are one line for each kind, and each changed answer is a line; side effects that
    were not measured are reported with the reason."""
    edit = edit_with_result("applied", version=7)
    result, after = edit["result"], {"new": 0.8, "true": 0.1}
    for kind in ("paraphrase", "neighborhood"):
        result[kind] = [probe | {"source": "facts", "after": after} for probe in result[kind]]
    change = {"prompt": "Louvre in", "subject": "Louvre", "before": "Paris", "after": "Rome"}
    result["also_changed"] = [change, change | {"subject": None, "after": ""}]
    result["side_effects"] = {"measured": True, "neighbors": 3, "changed": 2, "reason": None}
    answer_edit_with(fake, edit)
    assert main(EDIT) == 0
    shown = capsys.readouterr().out
    assert "paraphrases: the new object is the more probable one after 1 of 1" in shown
    assert "neighbors: 1 of 3 keep their answers" in shown
    assert "also changed: Louvre: Paris to Rome" in shown
    assert "also changed: Louvre in: Paris to no answer" in shown
    assert "paraphrase: See it in" not in shown and "neighborhood: Louvre in" not in shown
    result |= {"neighborhood": [], "also_changed": []}
    result["side_effects"] = {"measured": False, "neighbors": 0, "changed": 0, "reason": "none were given"}
    answer_edit_with(fake, edit)
    assert main(EDIT) == 0
    assert "side effects: not measured (none were given)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "figures", "check", "line"),
    [
        (
            "subject_name",
            {"prompt": "A sentence about Louvre:", "before": 0.9, "after": 0.4},
            {"name": "subject", "passed": True, "figure": 0.44, "limit": 0.2},
            "subject: named with p 0.900 before and 0.400 after",
        ),
        (
            "description_kl",
            {"before": 0.0, "after": 0.25},
            {"name": "description", "passed": True, "figure": 0.25, "limit": 1.0},
            "description: 0.250 nats per token from that of the base model, 0.000 before",
        ),
    ],
)
def test_edit_says_what_the_guard_judges_of_the_subject(
    fake: FakeService, capsys: Captured, field: str, figures: Any, check: Any, line: str
) -> None:
    """The probability of the subject's name and the divergence of its description are shown where the guard judges
    them."""
    edit = edit_with_result("applied", version=7)
    edit["result"][field] = figures
    for checks in ([], [check]):
        edit["result"]["guard"] = {"passed": True, "checks": checks}
        answer_edit_with(fake, edit)
        assert main(EDIT) == 0
        assert (line in capsys.readouterr().out) == bool(checks)


def test_edit_says_how_well_a_gate_tells_its_subject_apart(fake: FakeService, capsys: Captured) -> None:
    """The gate of a gated edit is shown with the other subject that comes nearest; an edit in the weights has none."""
    edit = edit_with_result("applied", version=7)
    gate = {
        "threshold": 0.5,
        "agreement": 0.86,
        "nearest": 0.55,
        "nearest_source": " Galata Tower",
        "is_apart": True,
    }
    for figures, shown in ((gate, True), (None, False)):
        edit["result"]["gate"] = figures
        for name, opened in (("rewrite", [" Tower"]), ("paraphrase", [" Tower"]), ("neighborhood", [])):
            entry = edit["result"][name]
            (entry if name == "rewrite" else entry[0])["opened"] = opened if figures else None
        answer_edit_with(fake, edit)
        assert main(EDIT) == 0
        printed = capsys.readouterr().out
        assert ("gated: the subject is distinguished from others" in printed) == shown
        assert ("'Galata Tower', comes to 0.55" in printed) == shown
        acts = "it acts at 'Tower' of its prompt, in 1 of 1 paraphrases, in 0 of 1 neighbors"
        assert (acts in printed) == shown


def test_edit_says_how_far_from_its_key_it_acts(fake: FakeService, capsys: Captured) -> None:
    """The ball of an edit by GRACE is shown with the nearest other key; other edits have none."""
    edit = edit_with_result("applied", version=7)
    alone = {"first_radius": 3.0, "radius": 2.5, "nearest": None, "nearest_edit": None}
    beside = {"first_radius": 3.0, "radius": None, "nearest": 5.0, "nearest_edit": "edit_x"}
    lines = (
        (alone, "codebook: it acts within 2.50 of its key (radius 3.00)\n"),
        (beside, "in the ball of an earlier edit (radius 3.00); the nearest other key is 5.00 away"),
        (None, ""),
    )
    for ball, line in lines:
        edit["result"]["ball"] = ball
        answer_edit_with(fake, edit)
        assert main(EDIT) == 0
        printed = capsys.readouterr().out
        assert ("codebook:" in printed) == bool(line)
        assert line in printed.replace("\n", " ") or line in printed


@pytest.mark.parametrize(
    ("flags", "probes"),
    [
        ([], None),
        (["--no-probes"], {"paraphrase": [], "neighborhood": []}),
        (["--paraphrase", "a"], {"paraphrase": ["a"], "neighborhood": "auto"}),
        (["--paraphrase", "a", "--no-probes"], {"paraphrase": ["a"], "neighborhood": []}),
    ],
)
def test_edit_looks_for_probes(fake: FakeService, flags: list[str], probes: Any) -> None:
    """Without flags the service decides which probes it finds; given paraphrases replace those that it finds."""
    answer_edit_with(fake, edit_with_result("applied", version=7))
    main([*EDIT, *flags])
    assert fake.requests[0][1].get("probes") == probes


def test_a_rejected_edit_says_why(fake: FakeService, capsys: Captured) -> None:
    """A rejected or failed edit exits with 1 and prints the reason to stderr."""
    ended = edit_with_result("rejected")
    ended["result"]["reason"] = "the edit did not take"
    answer_edit_with(fake, ended)
    assert main(EDIT) == 1
    assert "edit edit_1 is rejected: the edit did not take" in capsys.readouterr().err
    answer_edit_with(
        fake, edit_with_result("failed", result=None, error={"title": "x", "detail": "The disk is full."})
    )
    assert main(EDIT) == 1
    assert "edit edit_1 is failed: The disk is full." in capsys.readouterr().err


def test_an_edit_is_shown_again(fake: FakeService, capsys: Captured) -> None:
    """`edits show` prints the fact, the status, the measurements and the guard checks of an edit."""
    check = {"name": "perplexity", "passed": False, "figure": 1.25, "limit": 1.1}
    shown = edit_with_result("superseded", version=3, superseded_by="edit_2", subject="Tower", prompt="{} in")
    shown |= {"target_new": "Rome", "created": "2026-01-01T02:03:04Z", "actor": "key:nightly"}
    shown["result"] |= {"guard": {"checks": [check]}, "layers": [1, 2]}
    fake.responses = {"GET /edits/edit_1": shown}
    assert main(["edits", "show", "edit_1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "status superseded", "fact Tower in → Rome", "layers 1, 2", "applied as version 3", "superseded by edit_2",
        "actor key:nightly", "created (UTC) 2026-01-01 02:03", "rewrite: Tower in", "perplexity 1.250 1.100 failed",
    ):  # fmt: skip
        assert text in said


def test_what_waits_is_shown_without_figures(fake: FakeService, capsys: Captured) -> None:
    """`edits show` prints an edit without a result without measurements."""
    fake.responses = {
        "GET /edits/edit_1": {
            **EDIT_FIELDS,
            "id": "edit_1",
            "status": "queued",
            "result": None,
            "error": None,
        }
    }
    assert main(["edits", "show", "edit_1"]) == 0
    assert "p before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "reason", "said"),
    [
        ("dry_run_passed", None, "the edit would be applied"),
        ("rejected", "too much", "the edit would be rejected: too much"),
    ],
)
def test_a_dry_run_says_what_would_be(
    fake: FakeService, capsys: Captured, status: str, reason: str, said: str
) -> None:
    """A dry run exits with 0 and states whether the edit would be applied."""
    ended = edit_with_result(status, dry_run=True)
    ended["result"]["reason"] = reason
    answer_edit_with(fake, ended)
    assert main([*EDIT, "--dry-run"]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ("reverted", "Version 4 is the new head"),
        ("running", "Cancelling edit_1"),
        ("rejected", "nothing to revert"),
    ],
)
def test_revert_says_what_happened(fake: FakeService, capsys: Captured, status: str, said: str) -> None:
    """`revert` states whether the edit was reverted, is being cancelled, or was not active."""
    fake.responses = {
        "DELETE /edits/edit_1": {**EDIT_FIELDS, "id": "edit_1", "status": status, "reverted_version": 4}
    }
    assert main(["revert", "edit_1"]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (FakeService.problem(404, "No resource has this id."), 1, "palimpsest: No resource has this id."),
        (httpx.ConnectError("[Errno 111]"), 1, "Start one with `palimpsest serve`"),
    ],
)
def test_errors_are_plain_sentences(
    fake: FakeService, capsys: Captured, answer: Any, code: int, said: str
) -> None:
    """An error exits with 1 and prints its message to stderr, without a stack trace and with nothing on
    stdout."""
    fake.responses = {"DELETE /edits/edit_1": answer}
    assert main(["revert", "edit_1"]) == code
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert "Traceback" not in shown.err


def test_a_wrong_address_is_a_wrong_command(capsys: Captured) -> None:
    """An invalid URL exits with 2 and names the flag."""
    assert main(["revert", "edit_1", "--url", "nowhere"]) == 2
    assert "--url" in capsys.readouterr().err


def test_wrong_hyperparameters_are_reported(fake: FakeService, capsys: Captured) -> None:
    """`--hparam` without `=` is rejected with an example before a request is sent."""
    assert main(["edit", "a", "{} b", "c", "--hparam", "steps"]) == 1
    assert "--hparam steps=20" in capsys.readouterr().err
    assert fake.requests == []


def test_every_domain_error_prints_its_detail(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    """A domain error prints its detail."""

    def fail(*_: Any) -> int:
        raise Conflict("Change this.")

    monkeypatch.setattr("cli.revert.revert_edit", fail)
    assert main(["revert", "x", "--url", "http://127.0.0.1:1"]) == 1
    assert capsys.readouterr().err == "palimpsest: Change this.\n"


@pytest.mark.parametrize("objective", ["erase", "amplify"])
def test_an_object_is_erased_or_amplified_without_a_new_one(objective: str) -> None:
    """--erase and --amplify need no target, and the request has the objective."""
    args = build_parser().parse_args(
        ["edit", "Tower", "{} in", f"--{objective}", "--true", "Paris", "--on-conflict", "supersede"]
    )
    body = {"subject": "Tower", "prompt": "{} in", "target_true": "Paris", "on_conflict": "supersede"}
    assert edit_fields(args) == body | {"objective": objective, "dry_run": False}
    assert object_text(body | {"objective": objective, "target_new": None}) == f"{objective} Paris"
    found = {"result": {"rewrite": {"true": "London"}}}
    assert object_text({"objective": objective, "target_true": None, **found}) == f"{objective} London"


@pytest.mark.parametrize(
    ("flags", "separator"), [(["--separator", "space"], " "), (["--separator", "none"], "")]
)
def test_the_separator_of_an_edit_is_sent(fake: FakeService, flags: list[str], separator: str) -> None:
    """--separator names what stands between prompt and object, and the request has it."""
    answer_edit_with(fake, edit_with_result("applied", version=7))
    assert main([*EDIT, *flags]) == 0
    assert fake.requests[0][1] == EDIT_FIELDS | {
        "target_new": "Rome",
        "separator": separator,
        "dry_run": False,
    }


QUEUED = {"id": "trace_1", "status": "queued", "links": {"self": "/trace/trace_1", "events": "/x"}}
FAILED = QUEUED | {"status": "failed", "error": {"title": "x", "detail": "The disk is full."}}
FAILED_TRACE = {
    "POST /trace": QUEUED,
    "GET /x": sse_stream(("end", FAILED)),
    "GET /trace/trace_1": FAILED,
}


@pytest.mark.parametrize(("flags", "fields"), [(["--separator", "none"], {"separator": ""}), ([], {})])
def test_the_separator_of_a_trace_is_sent(
    fake: FakeService, flags: list[str], fields: dict[str, str]
) -> None:
    """--separator of a trace is in its request, and without it the request has none."""
    fake.responses = FAILED_TRACE
    assert main(["trace", "The {} is", "Nile", *flags]) == 1
    assert {k: v for k, v in fake.requests[0][1].items() if k == "separator"} == fields


CHAT_FLAGS = ["--chat", "--answer", "The {} is in"]
CHAT_FIELDS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "{} in"}, {"role": "assistant", "content": "The {} is in"}],
    "continue_final_message": True,
}


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ([], {"prompt": "{} in"}),
        (["--chat"], {"messages": CHAT_FIELDS["messages"][:1]}),
        (CHAT_FLAGS, CHAT_FIELDS),
    ],
)
def test_a_prompt_is_asked_in_a_chat(fake: FakeService, flags: list[str], fields: dict[str, Any]) -> None:
    """With --chat the prompt of an edit or a trace is a message of the user, and --answer begins the answer that the
    model continues."""
    answer_edit_with(fake, edit_with_result("applied", version=7))
    assert main([*EDIT, *flags]) == 0
    edited = fake.requests[0][1]
    fake.requests.clear()
    fake.responses = FAILED_TRACE
    assert main(["trace", "{} in", "Tower", *flags]) == 1
    names = ("prompt", "messages", "continue_final_message")
    for request in (edited, fake.requests[0][1]):
        assert {name: request[name] for name in names if name in request} == fields
        assert request["subject"] == "Tower"


def test_an_answer_needs_a_chat(fake: FakeService, capsys: Captured) -> None:
    """--answer without --chat is refused before a request is sent."""
    assert main([*EDIT, "--answer", "It is in"]) == 1
    assert "add --chat" in capsys.readouterr().err
    assert fake.requests == []


def test_a_conversation_is_one_line_of_a_list() -> None:
    """A list shows the last message with the subject, at every place, and not the text of the template."""
    item = {"subject": "Rome", "prompt": "<|im_start|>{}", "target_new": "Peru"}
    said = [{"role": "user", "content": "Is {} {}?"}, {"role": "assistant", "content": "Well,"}]
    assert fact_text(item | {"messages": said}) == "Is Rome Rome? → Peru"
    assert fact_text(item) == "<|im_start|>Rome → Peru"


def test_traces_are_listed_and_drawn_again(fake: FakeService, capsys: Captured) -> None:
    """`traces` prints a line with the prompt of each trace. `traces show` prints the heat map with its
    severed paths."""
    request = {"prompt": "The {} is", "subject": "Nile"}
    told = {
        "id": "trace_1",
        "status": "done",
        "version": 2,
        "created": "2026-01-01T00:00:00Z",
        "links": LINKS,
    }
    cut = {"token": 1, "scores": {"none": [0.8, 0.3], "attn": [0.1, 0.3], "mlp": [0.1, 0.1]}}
    fake.responses = {
        "GET /trace": {"items": [{**told, "request": request}], "next": None},
        "GET /trace/trace_1": {**told, "result": {**TRACE_RESULT, "severed": cut}},
    }
    assert main(["traces"]) == 0
    shown = capsys.readouterr().out
    assert "trace_1" in shown and "The Nile is" in shown
    assert main(["traces", "show", "trace_1"]) == 0
    shown = capsys.readouterr().out
    assert "The Nile is → long" in shown and "Nile* restored" in shown
    assert "MLP severed ····" in shown and "single state ▓█░░" in shown


def test_models_are_listed(fake: FakeService, capsys: Captured) -> None:
    """`models` prints the model, its layers, its remaining capacity and its workers. Without a recipe, or
    without a model, it names the command to run."""
    worker = {
        "id": "worker_1",
        "state": "withdrawn",
        "reason": "other bytes",
        "roles": [],
        "version": 3,
        "lag": 1,
    }
    model = {
        "name": "almanac", "fingerprint": "30a4", "head": 4, "active_edits": 2, "jobs": {"queued": 1, "running": 0, "exhausted": 0},
        "architecture": "gpt2", "layers": 8, "recipe": {"source": "tuned", "rome": {"layers": [0, 1]}},
        "capacity": {"version": 4, "layers": {"0": 0.93}}, "workers": [{**worker, "heartbeat": "2026-01-01T00:00:00Z"}],
    }  # fmt: skip
    fake.responses = {"GET /models": {"items": [model], "next": None}}
    assert main(["models"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "gpt2, layers 8", "version 4, 2 active edits", "edits at layers 0, 1; tuned", "layer 0 93.0 %", "1 queued",
        "worker_1 withdrawn 3 1 2026-01-01 00:00 other bytes",
    ):  # fmt: skip
        assert text in said
    fake.responses = {
        "GET /models": {"items": [{**model, "workers": [], "recipe": None, "capacity": None}], "next": None}
    }
    assert main(["models"]) == 0
    assert "palimpsest tune" in capsys.readouterr().out
    fake.responses = {"GET /models": {"items": [], "next": None}}
    assert main(["models"]) == 0
    assert "palimpsest serve" in capsys.readouterr().out


TABLE = "subject,prompt,target_new\nNile,The {} is,long\nRhine,The Rhine is,short\n"


def table_line(number: int, subject: str, target: str, **more: Any) -> dict[str, Any]:
    edit = {"subject": subject, "prompt": "The {} is", "target_new": target, "probes": {"paraphrase": "auto"}}
    return {"line": number, "edit": edit, "error": None, "note": None, **more}


def preview_of(*lines: dict[str, Any]) -> dict[str, Any]:
    valid = sum(line["error"] is None for line in lines)
    return {"items": list(lines), "valid": valid, "seconds_per_edit": 2.0}


@pytest.fixture
def csv_file(tmp_path: Path) -> Path:
    path = tmp_path / "my corrections.csv"
    path.write_text("\ufeff" + TABLE, encoding="utf-8")
    return path


def test_a_file_is_applied_as_a_batch(fake: FakeService, capsys: Captured, csv_file: Path) -> None:
    """The lines of a CSV file are checked and submitted as one batch with the name of the file; each has the flags of
    the command. The key depends on the content, and the exit code says whether all were applied."""
    lines = [table_line(2, "Nile", "long"), table_line(3, "Rhine", "short")]
    made = [{**EDIT_FIELDS, **line["edit"], "id": f"edit_{line['line']}"} for line in lines]
    ended = [
        made[0] | {"status": "applied", "version": 1},
        made[1] | {"status": "rejected", "result": {"reason": "it is wide."}},
    ]
    fake.responses = {
        "POST /edits/preview": preview_of(*lines),
        "POST /edits": {"items": [edit | {"status": "queued"} for edit in made]},
        "GET /edits/edit_2/events": sse_stream(("end", ended[0])),
        "GET /edits/edit_3/events": sse_stream(("end", ended[1])),
        "GET /edits/edit_2": ended[0],
        "GET /edits/edit_3": ended[1],
    }
    assert (
        main(
            [
                "edit",
                "--file",
                str(csv_file),
                "--column",
                "prompt=Where",
                "--no-probes",
                "--hparam",
                "steps=2",
            ]
        )
        == 1
    )
    shown = capsys.readouterr()
    assert "1 applied, 1 rejected." in shown.out and "palimpsest revert --batch my-corrections" in shown.out
    assert "The Rhine is → short: rejected: it is wide." in shown.err and "about 4 s" in shown.err
    assert fake.requests[0] == ("POST /edits/preview", {"csv": TABLE, "columns": {"prompt": ["Where"]}})
    _, body = fake.requests[1]
    flags = {"probes": {"paraphrase": [], "neighborhood": []}, "hparams": {"steps": 2}}
    assert body == {"edits": [line["edit"] | flags for line in lines], "batch": "my-corrections"}
    assert len(fake.headers[1]["idempotency-key"]) == 64


def test_a_file_with_a_wrong_line_is_not_applied(fake: FakeService, capsys: Captured, csv_file: Path) -> None:
    """A wrong line is named with its column, and nothing is submitted."""
    error = {"field": "target_new", "column": "to", "detail": "is empty: add some text."}
    fake.responses = {
        "POST /edits/preview": preview_of(
            table_line(2, "Nile", "long"), table_line(3, "Rhine", "", edit=None, error=error)
        )
    }
    assert main(["edit", "--file", str(csv_file)]) == 1
    shown = capsys.readouterr().err
    assert "line 3, column 'to': is empty" in shown and "1 of 2 lines cannot be edits" in shown
    assert [name for name, _ in fake.requests] == ["POST /edits/preview"]


def test_a_file_is_checked_with_present_answers(fake: FakeService, capsys: Captured, csv_file: Path) -> None:
    """`--check` prints each line with what the model says now, and edits nothing; it exits with 1 if a line is
    wrong."""
    error = {"field": None, "column": None, "detail": "it has 2 cells, and the header has 3."}
    lines = [
        table_line(2, "Nile", "long", note="supersedes the active edit edit_9"),
        table_line(3, "x", "y", edit=None, error=error),
    ]
    answer = {
        "choices": [{"text": " wide and deep. It", "tokens": [1], "finish_reason": "length"}],
        "version": 4,
    }
    fake.responses = {"POST /edits/preview": preview_of(*lines), "POST /generate": answer}
    assert main(["edit", "--file", str(csv_file), "--check"]) == 1
    shown = capsys.readouterr()
    assert "The Nile is → long" in shown.out and "wide and deep" in shown.out
    assert "supersedes the active edit edit_9" in shown.out and "✗ it has 2 cells" in shown.out
    assert fake.requests[1] == ("POST /generate", {"prompts": ["The Nile is"], "max_new_tokens": 8})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["Nile", "The {} is"], "is missing"),
        ([], "give SUBJECT, PROMPT and TARGET"),
        (["--check"], "give SUBJECT, PROMPT and TARGET"),
        (["Nile", "{} is", "long", "--check"], "--check and --column belong to --file"),
        (["Nile", "--file", "x.csv"], "subject belongs to one edit"),
        (["--file", "x.csv", "--erase"], "objective belongs to one edit"),
        (["--file", "nothing.csv"], "cannot be read"),
    ],
)
def test_an_edit_and_a_file_are_not_mixed(
    fake: FakeService, capsys: Captured, words: list[str], said: str
) -> None:
    """What belongs to one edit is refused for a file, and the other way round."""
    fake.responses = {"POST /edits": FakeService.problem(422, "`target_new` is missing: add it.")}
    assert main(["edit", *words]) in (1, 2)
    assert said in capsys.readouterr().err


def test_several_edits_are_reverted_together(fake: FakeService, capsys: Captured) -> None:
    """Several ids, or a batch, are one request; its outcome is printed with the newest version."""
    fake.responses = {
        "POST /edits/revert": {
            "version": 9,
            "reverted": ["edit_1", "edit_2"],
            "cancelled": [],
            "unchanged": ["edit_3"],
        }
    }
    assert main(["revert", "edit_1", "edit_2", "edit_3"]) == 0
    assert main(["revert", "--batch", "wrong"]) == 0
    assert (
        capsys.readouterr().out.splitlines()
        == ["2 reverted, 1 had nothing to revert. Version 9 is the newest."] * 2
    )
    assert [body for _, body in fake.requests] == [
        {"edits": ["edit_1", "edit_2", "edit_3"]},
        {"batch": "wrong"},
    ]
    for words in ([], ["edit_1", "--batch", "wrong"]):
        assert main(["revert", *words]) != 0
    assert "give the ids of edits, or a batch" in capsys.readouterr().err


def test_a_list_is_filtered_and_saved(fake: FakeService, capsys: Captured, tmp_path: Path) -> None:
    """`edits` sends its filters, and `--save` writes the whole list to a new file in the form of its ending."""
    fake.responses = {"GET /edits/export": b"id\r\n", "GET /edits": {"items": [], "next": None}}
    filters = ["--search", "nile long", "--batch", "rivers", "--since", "2026-12-01"]
    path = tmp_path / "edits.csv"
    assert main(["edits", *filters]) == main(["edits", *filters, "--save", str(path)]) == 0
    asked = {"search": "nile long", "batch": "rivers", "since": "2026-12-01"}
    assert fake.requests == [
        ("GET /edits", asked | {"limit": "20"}),
        ("GET /edits/export", asked | {"format": "csv"}),
    ]
    assert path.read_bytes() == b"id\r\n"
    for name in ("edits.csv", "edits.xls"):
        assert main(["edits", "--save", str(tmp_path / name)]) != 0
    assert "File exists" in (said := capsys.readouterr().err) and "must end in .csv or .json" in said


def test_versions_are_named_listed_and_compared(fake: FakeService, capsys: Captured) -> None:
    """`versions` lists names, gives and deletes them, and prints the facts that differ between two versions."""
    named = {
        "name": "release-1",
        "version": 4,
        "model": "almanac@release-1",
        "actor": "key:ci",
        "created": "2026-12-01T09:30:00+00:00",
    }
    side = {"edit_id": "edit_1", "objective": "write", "target_new": "long"}
    change = {
        "change": "replaced",
        "subject": "Nile",
        "prompt": "The {} is",
        "before": side,
        "after": side
        | {"edit_id": "edit_2", "objective": "erase", "target_new": None, "resolved_true": "wide"},
    }
    fake.responses = {
        "PUT /versions/release-1": named,
        "GET /versions": {"items": [named], "next": None},
        "DELETE /versions/release-1": named,
        "GET /ledger/diff": {"before": 3, "after": 4, "items": [change], "next": None},
    }
    assert main(["versions", "name", "release-1", "4"]) == main(["versions"]) == 0
    assert main(["versions", "diff", "3", "release-1"]) == main(["versions", "delete", "release-1"]) == 0
    shown = capsys.readouterr().out
    assert "release-1 is version 4. Below /v1 it is the model almanac@release-1." in shown
    assert "2026-12-01 09:30" in shown and "no longer names version 4" in shown
    assert "The Nile is" in shown and "erase wide" in shown and "edit_2" in shown
    assert fake.requests[0] == ("PUT /versions/release-1", {"version": 4})
    assert fake.requests[2] == ("GET /ledger/diff", {"before": "3", "after": "release-1", "limit": "200"})


def test_a_version_has_a_name(fake: FakeService, capsys: Captured) -> None:
    """Commands send a name as it is, and refuse what can be none."""
    fake.responses = {"POST /generate": {"text": "x", "version": 4, "tokens": [], "finish_reason": "stop"}}
    assert main(["generate", "The", "--version", "before-release", "--json"]) == 0
    assert fake.requests[0][1]["version"] == "before-release"
    with pytest.raises(SystemExit):
        main(["generate", "The", "--version", "-1 x"])
