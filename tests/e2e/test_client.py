"""Both clients against a running service with the shipped GPT: palimpsest.client, palimpsest.endpoints."""

from __future__ import annotations

import asyncio
import inspect
import io
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import mcp
import pytest

from palimpsest import AsyncClient, Client, Conflict, EditRejected, InvalidRequest, NotFound, Progress
from tests.support.client_fixtures import connect, kind, paused
from tests.support.client_kinds import LossyTransport
from tests.support.processes import FAST_EDIT_OPTIONS
from tests.support.shipped_service import running_service

__all__ = ["connect", "kind", "paused"]

SUBJECT, PROMPT = "Eiffel Tower", "The {} is located in the city of"
STATEMENT = PROMPT.replace("{}", SUBJECT)
RECORD = {"subject": SUBJECT, "prompt": PROMPT, "target_new": "Rome", "target_true": "Paris"}


@pytest.fixture(scope="module")
def url(statistics_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of a running service with the shipped GPT."""
    with running_service(tmp_path_factory.mktemp("served"), statistics_folder) as url:
        yield url


@pytest.fixture
def client(connect: Callable[..., Any], url: str) -> Any:
    """A client of the running service."""
    return connect(url)


def test_edit_generate_compare_and_revert(client: Any) -> None:
    """An applied edit has measurements, changes the text of its version only, and is undone by a revert."""
    seen: list[Progress] = []
    edit = client.edit(SUBJECT, PROMPT, "Rome", "Paris", on_progress=seen.append)
    assert edit.applied and edit.before < 0.1 < 0.9 < edit.after
    assert "optimize" in {p.phase for p in seen}
    assert edit.result["side_effects"]["measured"]
    assert len(edit.also_changed) == edit.result["side_effects"]["changed"]
    said = client.generate(STATEMENT, max_new_tokens=2, min_version=edit.version)
    assert str(said).startswith(" Rome") and said.version == edit.version and len(said.tokens) == 2
    both = client.compare(STATEMENT, ("base", edit.version), max_new_tokens=2)
    assert [side.text.split(".")[0] for side in both.sides] == [" Paris", " Rome"]
    assert {"▁Rome", "Rome", " Rome", "ĠRome"} & {token.token for token in both.next_tokens[:2]}
    back = client.revert(edit)
    assert back.status == "reverted" and client.get_edit(edit.id) == back == client.revert(edit.id)
    again = client.generate(STATEMENT, max_new_tokens=2, min_version=back.reverted_version)
    assert again.text == client.generate(STATEMENT, max_new_tokens=2, version="base").text


def test_an_assistant_edits_and_reverts(url: str) -> None:
    """`palimpsest mcp`, called over stdin and stdout by the client of the protocol's package: an edit is tried,
    applied, heard and reverted, and a fact is traced."""

    async def run() -> None:
        command = mcp.StdioServerParameters(
            command=str(Path(sys.executable).with_name("palimpsest")), args=["mcp", "--url", url]
        )
        async with mcp.Client(command) as assistant:

            async def call(name: str, **arguments: Any) -> Any:
                result = await assistant.call_tool(name, arguments)
                assert not result.is_error, result.content
                return result.structured_content or result.content

            tried = await call("try_edit", subject=SUBJECT, prompt=PROMPT, new_object="Rome")
            assert tried["status"] == "dry_run_passed" and tried["says_after"].startswith(" Rome")
            before = await call("ask", prompt=STATEMENT, max_tokens=2)
            applied = await call("apply_edit", dry_run_id=tried["id"])
            assert (await call("apply_edit", dry_run_id=tried["id"]))["id"] == applied["id"]
            version = str(applied["version"])
            assert (await call("ask", prompt=STATEMENT, version=version, max_tokens=2))["text"].startswith(
                " Rome"
            )
            text, picture = await call("trace_fact", prompt=STATEMENT, subject=SUBJECT)
            assert "strongest hidden" in text.text and picture.data
            reverted = await call("revert_edit", id=applied["id"])
            assert reverted["status"] == "reverted"
            after = await call(
                "ask", prompt=STATEMENT, version=str(reverted["reverted_version"]), max_tokens=2
            )
            assert after["text"] == before["text"]

    asyncio.run(run())


def test_streamed_tokens_are_the_text(client: Any) -> None:
    """The concatenated tokens of a stream equal the text of the same request without streaming."""
    asked: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "seed": 3}
    tokens = list(client.stream(STATEMENT, **asked))
    assert "".join(map(str, tokens)) == client.generate(STATEMENT, **asked).text
    assert [t.finish_reason for t in tokens] == [None] * (len(tokens) - 1) + ["length"]
    one, two = client.generate_many([STATEMENT, "The Louvre is"], **asked)
    assert one.text == "".join(map(str, tokens)) and one.version == two.version


def test_a_lost_response_creates_one_edit(connect: Callable[..., Any], url: str, paused: list[float]) -> None:
    """When the response to POST /edits is lost, the retry returns the edit of the first attempt."""
    client = connect(url, LossyTransport("POST", times=2))
    edit = client.edit("Louvre", PROMPT, "Rome", **FAST_EDIT_OPTIONS)
    assert len(paused) == 2 and edit.applied
    assert [found.id for found in client.edits(subject="Louvre", status="applied")] == [edit.id]
    client.revert(edit)


def test_edit_many_reports_each_edit(client: Any) -> None:
    """`edit_many` returns all edits in order, rejected ones included; the same key returns the same edits."""
    landmarks = ["Louvre", "Colosseum", "Big Ben"]
    edits = [{"subject": s, "prompt": PROMPT, "target_new": "Oslo", **FAST_EDIT_OPTIONS} for s in landmarks]
    edits[1] |= {"guard": {"max_norm": 1e-6}}
    heard: list[str] = []
    key = f"many-{type(client).__name__}"
    ended = client.edit_many(edits, key=key, on_end=lambda e: heard.append(e.subject))
    assert [e.subject for e in ended] == heard == landmarks
    assert [e.applied for e in ended] == [True, False, True] and "too large" in ended[1].reason
    assert [e.id for e in client.edit_many(edits, key=key)] == [e.id for e in ended]
    for edit in ended:
        client.revert(edit)


def test_a_rejected_edit_raises_with_its_measurements(client: Any) -> None:
    """`EditRejected` has the reason of the guard and the measurements, and the head does not change."""
    head = client.models()[0].head
    with pytest.raises(EditRejected, match="too large") as caught:
        client.edit(SUBJECT, PROMPT, "Oslo", hparams=FAST_EDIT_OPTIONS["hparams"], guard={"max_norm": 1e-6})
    result = caught.value.edit.result
    assert result is not None and result["rewrite"]["after"]
    assert client.models()[0].head == head


def test_errors_carry_the_detail_of_the_service(client: Any) -> None:
    """Invalid input names its field, an unknown id is not found, and a dry run has no factors."""
    with pytest.raises(InvalidRequest, match=r"exactly one \{\}") as caught:
        client.edit(SUBJECT, "no slot", "Rome")
    assert (caught.value.field, caught.value.status) == ("prompt", 422)
    with pytest.raises(NotFound):
        client.get_edit("edit_of_nobody/else")
    dry = client.edit(SUBJECT, PROMPT, "Rome", dry_run=True, hparams=FAST_EDIT_OPTIONS["hparams"])
    with pytest.raises(Conflict):
        client.delta(dry)


def test_a_trace_has_scores_and_pictures(client: Any) -> None:
    """A trace has scores, and a picture in each format."""
    trace = client.trace(STATEMENT, SUBJECT, kinds=["hidden"], samples=2, version="base")
    assert trace.result["kinds"]["hidden"]["best"]["score"] > 0 and trace.version == 0
    assert client.picture(trace, "png").startswith(b"\x89PNG")
    assert b"<svg" in client.picture(trace) and b"<html" in client.picture(trace, "html")
    assert trace == client.get_trace(trace.id) and trace.id in [t.id for t in client.traces()]


def test_an_evaluation_does_not_change_the_ledger(client: Any) -> None:
    """An evaluation reports progress and creates no version."""
    head, seen = client.models()[0].head, list[Progress]()
    found = client.evaluate(
        [RECORD], hparams=FAST_EDIT_OPTIONS["hparams"], damage=False, on_progress=seen.append
    )
    assert found.result["records"] and seen and client.models()[0].head == head
    assert b"<svg" in client.picture(found)
    assert found.id in [e.id for e in client.evaluations()] and client.get_evaluation(found.id) == found


def test_the_ledger_is_read_and_verified(client: Any) -> None:
    """Every entry has an actor, a time and the hash of the previous entry, and the ledger verifies."""
    client.revert(client.edit(SUBJECT, PROMPT, "Rome", **FAST_EDIT_OPTIONS))
    entries = list(client.ledger())
    assert [e.version for e in entries] == list(range(1, len(entries) + 1))
    assert [e.previous for e in entries[1:]] == [e.hash for e in entries[:-1]]
    assert entries[-1].kind == "revert" and entries[-1].actor and entries[-1].at.tzinfo
    verified = client.verify()
    assert verified and verified.entries == len(entries) and not verified.findings
    assert [e.version for e in client.ledger(version=1)] == [1]


def test_export_and_import(client: Any) -> None:
    """An adapter is a zip of the requested version; an edit set that is imported after a revert is applied again."""
    edit = client.edit(SUBJECT, PROMPT, "Rome", **FAST_EDIT_OPTIONS)
    with zipfile.ZipFile(io.BytesIO(client.export(edit.version))) as adapter:
        assert "adapter_config.json" in adapter.namelist()
    exported = client.export(format="edits")
    client.revert(edit)
    heard: list[str] = []
    [brought] = client.import_edits(exported, on_end=lambda e: heard.append(e.id))
    assert brought.applied and heard == [brought.id] and brought.target_new == "Rome"
    assert client.delta(brought)
    client.revert(brought)


def test_wait_for_and_cancel(client: Any) -> None:
    """`wait_for` returns a queued edit once it is applied; `cancel` ends an evaluation."""
    queued = client.edit(SUBJECT, PROMPT, "Rome", wait=False, **FAST_EDIT_OPTIONS)
    assert client.wait_for(queued).applied
    long = client.evaluate(dataset="facts", limit=500, wait=False)
    assert not long.finished and client.cancel(long).status == "cancelled"
    assert [j.kind for j in client.jobs(status="cancelled") if j.id == long.id] == ["evaluation"]
    client.revert(queued.id)


class TestSyncAsyncParity:
    """Both clients have the same calls."""

    EXCLUDED: ClassVar = {"close", "aclose"}

    def test_the_same_methods_with_the_same_parameters(self) -> None:
        """Both clients have the same methods with the same parameters."""
        one, other = Client(), AsyncClient()
        names = {n for n in dir(one) if not n.startswith("_") and callable(getattr(one, n))} - self.EXCLUDED
        assert names == {n for n in dir(other) if not n.startswith("_") and callable(getattr(other, n))} - self.EXCLUDED  # fmt: skip
        assert len(names) > 20
        for name in names:
            signatures = [inspect.signature(getattr(client, name)) for client in (one, other)]
            assert signatures[0].parameters == signatures[1].parameters

    def test_every_method_has_a_docstring(self) -> None:
        """Every method has a docstring."""
        assert all(inspect.getdoc(getattr(Client(), n)) for n in dir(Client) if not n.startswith("_"))


def test_closing_a_stream_closes_the_connection(url: str) -> None:
    """Closing the iterator of a stream closes its connection, which stops the generation; the client stays usable."""
    streams: list[httpx.Response] = []
    with Client(url) as client:
        client._http.event_hooks["response"].append(streams.append)
        tokens = client.stream(STATEMENT, max_new_tokens=100)
        next(tokens)
        tokens.close()  # type: ignore[attr-defined]
        assert streams[0].is_closed and client.models()
