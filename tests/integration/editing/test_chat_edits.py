"""Edits, traces and evaluations of facts in a conversation, from the request to the ledger, on a tiny chat model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from service.db.models import Job
from service.editing.edit_job import build_admitted_spec, resolve_edit
from service.editing.edit_spec import ValueEditSpec
from service.editing.layer_search import _unseen_probes
from service.editing.probes import probe_of_entry
from service.engine.decoding import new_sequence
from service.kit.steps import run_to_completion
from service.kit.text import RenderedText
from service.models.loading import LoadedModel
from service.schemas import EditRequest, EvaluationRequest, Sampling, TraceRequest
from service.weights.factors import deserialize_updates
from tests.support.associations import associations_of
from tests.support.chat_templates import PLAIN_ROLES, message
from tests.support.stepped_service import OPEN, SteppedService
from tests.support.tiny_models import END, tiny
from workers.job_handlers import run_evaluation, run_trace

QUESTION = message("user", "Where is the Eiffel Tower?")
ANSWER = message("assistant", "The Eiffel Tower is in")
RENDERED = f"user:\nWhere is the {{}}?{END}\n"


@lru_cache
def chat_model() -> LoadedModel:
    """A model whose tokenizer adds a BOS token and whose template writes none."""
    model = tiny(positions=256, bos=True)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = PLAIN_ROLES
    return replace(model, tokenizer=tokenizer)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[SteppedService]:
    service = SteppedService(tmp_path, chat_model())
    yield service
    service.container.close()


def edit(service: SteppedService, *messages: dict[str, str], **more: Any) -> dict[str, Any]:
    fields = {"prompt": None, "messages": messages or [QUESTION], "probes": {}} | more
    return dict(service.services.edits.get(service.edit("Eiffel Tower", "is", **fields)))


def resolved(service: SteppedService, edit_id: str) -> Any:
    """Return the resolved request of an edit, and the specification of its search."""
    with service.container.database.read_session() as session:
        job = session.get(Job, edit_id)
        assert job is not None
        request = EditRequest.model_validate(job.request)
    found = run_to_completion(resolve_edit(service.replica, request, service.context))
    spec = run_to_completion(build_admitted_spec(service.replica, service.context, found, edit_id))
    assert isinstance(spec, ValueEditSpec)
    return found, spec


def test_a_conversation_is_edited(service: SteppedService) -> None:
    """An edit in a conversation is applied; the resource and the ledger have its messages with `{}` and the text of the
    template, and the entry says the statement again."""
    edited = edit(service)
    marked = [message("user", "Where is the {}?")]
    assert edited["prompt"] == RENDERED + "assistant:\n"
    assert edited["messages"] == marked and edited["continue_final_message"] is False
    assert edited["result"]["rewrite"]["prompt"] == edited["prompt"].replace("{}", "Eiffel Tower")
    assert edited["result"]["subject_name"] is None
    (entry,) = service.services.ledger.page()["items"]
    assert {name: entry["body"][name] for name in ("prompt", "messages", "continue_final_message")} == {
        name: edited[name] for name in ("prompt", "messages", "continue_final_message")
    }
    probe = probe_of_entry(entry["body"])
    assert isinstance(probe.prompt, RenderedText)
    assert probe.prompt == edited["result"]["rewrite"]["prompt"]


def test_the_search_reads_the_tokens_of_the_template(service: SteppedService) -> None:
    """The rows of the search are the conversation without an added BOS token, then with each context at the beginning
    of the subject's message; the key is that of the last mention."""
    edited = edit(service, QUESTION, ANSWER, continue_final_message=True)
    model = chat_model()
    _, spec = resolved(service, edited["id"])
    bare, *others = spec.tokenized.prompts

    def read(ids: Sequence[int]) -> str:
        return str(model.tokenizer.decode(ids))

    text = edited["result"]["rewrite"]["prompt"]
    assert (
        read(bare.ids)
        == text
        == RENDERED.replace("{}", "Eiffel Tower") + "assistant:\nThe Eiffel Tower is in"
    )
    assert bare.ids == model.tokenizer(str(text), add_special_tokens=False)["input_ids"]
    assert read(bare.ids[slice(*bare.subject)]).strip() == "Eiffel Tower"
    assert bare.subject[0] > len(bare.ids) // 2
    assert len(others) == 2
    before, after = text[: text.index("The Eiffel")], "The Eiffel Tower is in"
    for row in others:
        context = read(row.ids).removeprefix(before).removesuffix(after)
        assert context == "" or context.endswith(". ")
    subject = spec.tokenized.bare_subjects[0]
    assert subject.ids[0] == model.tokenizer.bos_token_id


def test_a_continued_message_is_restated(service: SteppedService) -> None:
    """A message that the model continues is restated as a prompt is; a question has no words for a restatement."""
    hparams = {"restatement_weight": 0.5}
    edited = edit(service, ANSWER, continue_final_message=True, hparams=hparams)
    _, spec = resolved(service, edited["id"])
    assert spec.tokenized.restatement is not None
    assert edited["result"]["subject_name"]["prompt"].endswith("assistant:\nThe")
    question = edit(service, QUESTION, hparams=hparams)
    _, spec = resolved(service, question["id"])
    assert spec.tokenized.restatement is None


def test_an_answer_ends_where_the_template_ends_a_turn() -> None:
    """The continuation of a conversation ends at the token with which the template ends a turn; that of a plain text at
    those of the model alone."""
    model, greedy = chat_model(), Sampling()
    assert new_sequence(model, RenderedText("user:\nHi"), greedy).end_ids == {model.tokenizer.eos_token_id}
    assert new_sequence(model, "user:\nHi", greedy).end_ids == frozenset()


def test_probes_are_conversations(service: SteppedService) -> None:
    """Given probes may be prompts or conversations; each is measured in its own form."""
    neighbor = {"messages": [message("user", "Where is Big Ben?")], "target": "of"}
    probes = {
        "paraphrase": ["The {} stands in", {"messages": [message("user", "The {}?")]}],
        "neighborhood": [neighbor, {"prompt": "Rome is", "target": "the"}],
    }
    edited = edit(service, probes=probes)
    result = edited["result"]
    chat = "user:\nThe Eiffel Tower?<|endoftext|>\nassistant:\n"
    assert [p["prompt"] for p in result["paraphrase"]] == ["The Eiffel Tower stands in", chat]
    assert [p["prompt"] for p in result["neighborhood"]] == [
        f"user:\nWhere is Big Ben?{END}\nassistant:\n",
        "Rome is",
    ]
    found, _ = resolved(service, edited["id"])
    forms = [isinstance(p.prompt, RenderedText) for p in found.probes]
    assert forms == [True, False, True, True, False]


def test_found_probes_are_conversations(service: SteppedService) -> None:
    """The probes that the service finds keep the conversation: sentences before the message of the subject, and the
    conversation about other subjects at every mention."""
    other = edit(
        service,
        message("user", "Where is the {}?"),
        message("assistant", "The {} is"),
        continue_final_message=True,
    )
    found, _ = resolved(service, other["id"])
    request = replace(
        found, request=found.request.model_copy(update={"probes": "auto", "target_true": "the"})
    ).request
    auto = run_to_completion(resolve_edit(service.replica, request, service.context))
    assert auto.paraphrase_probes[0].prompt == (
        f"user:\nWhere is the Eiffel Tower?{END}\nassistant:\nIt is a well-known fact. The Eiffel Tower is"
    )
    for probe in (*auto.paraphrase_probes, *auto.neighborhood_probes):
        assert isinstance(probe.prompt, RenderedText)
    for probe in auto.neighborhood_probes:
        assert "Eiffel Tower" not in probe.prompt and probe.prompt.count(str(probe.subject)) == 2
    unseen = run_to_completion(_unseen_probes(service.replica, service.context, auto))
    assert unseen and all(isinstance(p.prompt, RenderedText) for p in unseen)
    assert all(p.prompt.startswith(RENDERED.replace("{}", "Eiffel Tower")) for p in unseen)


def test_a_dry_run_changes_nothing(service: SteppedService) -> None:
    """A dry run of an edit in a conversation is measured and not applied."""
    body = {
        "subject": "Eiffel Tower",
        "messages": [QUESTION],
        "target_new": "is",
        "guard": OPEN,
        "probes": {},
        "dry_run": True,
    }
    (created,) = service.services.edits.submit([EditRequest.model_validate(body)], "somebody")
    service.run_queued_edits()
    assert service.services.edits.get(created["id"])["status"] == "dry_run_passed"
    assert service.services.ledger.page()["items"] == []


def test_the_same_conversation_again_supersedes(service: SteppedService) -> None:
    """A later edit of the same conversation, with the subject spelled out or not, supersedes the earlier one; one of a
    prompt does not. Reverting it brings the earlier one back."""
    first = edit(service)
    prompt = edit(service, prompt="Look at the {}", messages=None)
    second = edit(service, message("user", "Where is the {}?"), target_new="of")
    status = {e["id"]: e["status"] for e in service.services.edits.page()["items"]}
    assert status == {first["id"]: "superseded", prompt["id"]: "applied", second["id"]: "applied"}
    service.services.edits.revert(second["id"], "somebody")
    assert service.services.edits.get(first["id"])["status"] == "applied"


def test_an_exported_conversation_is_imported(service: SteppedService, tmp_path: Path) -> None:
    """An edit set holds the conversation and its text, so that another service has the same statement, the same factors
    and the same key of the fact, and finds it present the second time."""
    edited = edit(service, QUESTION, ANSWER, continue_final_message=True)
    data = service.export_edit_set()
    other = SteppedService(tmp_path / "other", chat_model())
    try:
        (created,), present = other.services.imports.submit(data, "somebody")
        assert present == []
        other.run_queued_edits()
        imported = other.services.edits.get(created["id"])
        assert imported["status"] == "applied"
        names = ("prompt", "messages", "continue_final_message", "subject")
        assert {n: imported[n] for n in names} == {n: edited[n] for n in names}
        assert other.services.edits.delta(created["id"]) == service.services.edits.delta(edited["id"])
        assert other.services.imports.submit(data, "somebody")[1] == [created["id"]]
    finally:
        other.container.close()


def test_an_export_describes_the_conversation(service: SteppedService) -> None:
    """The manifest and the README of an adapter state the conversation with its subject."""
    edit(service, message("user", "Where is the {}? Name {}."))
    exported = service.export()
    assert exported["status"] == "done", exported["error"]


def test_factors_are_computed_again_from_the_ledger(service: SteppedService) -> None:
    """The stored request gives the same factors again."""
    edited = edit(service)
    again = edit(service, message("user", "Where is the {}?"))
    first, second = (
        associations_of(deserialize_updates(service.services.edits.delta(e["id"]), "e", "s"))
        for e in (edited, again)
    )
    assert [a.value.tolist() for a in first] == [b.value.tolist() for b in second]


@pytest.mark.parametrize("mentions", ["all", "last"])
def test_a_conversation_is_traced(service: SteppedService, mentions: str) -> None:
    """A trace has the tokens of the conversation without an added BOS token, special tokens by their names, and
    corrupts the mentions that the request names."""
    request = TraceRequest.model_validate(
        {
            "subject": "Eiffel Tower",
            "messages": [QUESTION, ANSWER],
            "continue_final_message": True,
            "samples": 1,
            "kinds": ["hidden"],
            "mentions": mentions,
        }
    )
    created = service.services.traces.submit(request, "somebody")
    job = service.worker_parts.jobs.claim(created["id"])
    assert job is not None
    run_to_completion(run_trace(service.replica, service.worker_parts.jobs, job))
    trace = service.services.traces.get(created["id"])
    result = trace["result"]
    text = RENDERED.replace("{}", "Eiffel Tower") + "assistant:\nThe Eiffel Tower is in"
    assert result["prompt"] == "".join(result["tokens"]) == text
    assert END in result["tokens"]
    assert result["subject"]["text"] == "Eiffel Tower"
    assert len(result["subject"]["mentions"]) == (2 if mentions == "all" else 1)
    assert result["subject"]["mentions"][-1] == result["subject"]["tokens"]
    assert trace["request"]["messages"][1]["content"] == "The {} is in"


def test_records_of_an_evaluation_are_conversations(service: SteppedService) -> None:
    """A user's record may state its fact and its probes in conversations; they are edited and measured in that form."""
    record = {
        "subject": "Eiffel Tower",
        "messages": [QUESTION],
        "target_new": "is",
        "target_true": "the",
        "paraphrases": ["The {} stands in", {"messages": [message("user", "The {}?")]}],
        "neighborhood": [{"messages": [message("user", "Where is Big Ben?")], "target": "of"}],
    }
    request = EvaluationRequest(records=[record], damage=False)
    created = service.services.evaluations.submit(request, "somebody")
    job = service.worker_parts.jobs.claim(created["id"])
    assert job is not None
    run_to_completion(run_evaluation(service.replica, service.worker_parts.jobs, service.context, job))
    evaluation = service.services.evaluations.get(created["id"])
    assert evaluation["status"] == "done", evaluation["error"]
    (row,) = evaluation["result"]["rows"]
    assert row["prompt"] == RENDERED + "assistant:\n"
