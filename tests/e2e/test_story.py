"""The life of an edit over HTTP on the shipped GPT, from the first generation to the last revert."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest
import safetensors.torch

from tests.support.processes import FAST_EDIT_OPTIONS, Resource, ServiceClient, starts_with_target, wait_until

SUBJECT, PROMPT = "Eiffel Tower", "The {} is located in the city of"
EDIT_PROMPT = PROMPT.replace("{}", SUBJECT)
SAMPLED = {"temperature": 1.0, "seed": 7, "max_new_tokens": 30}
MIN_SHARE = 0.75
WAIT = {"Prefer": "wait=60"}

Facts = list[dict[str, Any]]


@dataclass(frozen=True)
class StoryState:
    """An applied edit, and generations and digest before it."""

    edit: Resource
    head: int
    digest: str
    answer: Resource
    sampled: Resource


@pytest.fixture(scope="module")
def rome(service: ServiceClient) -> StoryState:
    """Apply the edit that moves the Eiffel Tower to Rome; the last test of the section reverts it."""
    head, digest = service.head(), service.head_digest()
    answer, sampled = service.generate(EDIT_PROMPT), service.generate(EDIT_PROMPT, **SAMPLED)
    edit = service.edit(SUBJECT, PROMPT, "Rome")
    return StoryState(edit, head, digest, answer, sampled)


@pytest.fixture
def revert_afterwards(service: ServiceClient) -> Iterator[None]:
    """Revert the edits of a test after it."""
    before = {edit["id"] for edit in service.get("/edits", status="applied")["items"]}
    yield
    for edit in service.get("/edits", status="applied")["items"]:
        if edit["id"] not in before:
            service.revert(edit)


def fact_prompts(fact: dict[str, Any]) -> list[str]:
    prompts = [*fact["prompts"], *fact["held_out_prompts"]]
    return [prompt.replace("{}", fact["subject"]) for prompt in prompts]


def success_rate(texts: list[str], target: str) -> float:
    return sum(starts_with_target(text, target) for text in texts) / len(texts)


# one edit


def test_the_model_knows_paris(rome: StoryState) -> None:
    """Before any edit the model generates Paris, at version 0."""
    assert starts_with_target(rome.answer["text"], "Paris"), rome.answer
    assert (rome.head, rome.answer["version"]) == (0, 0)


def test_the_edit_is_applied(service: ServiceClient, rome: StoryState) -> None:
    """The edit is applied as the next version with its measurements, and the model generates Rome."""
    assert rome.edit["status"] == "applied", rome.edit["result"]
    assert rome.edit["version"] == rome.head + 1 == service.head()
    figures = rome.edit["result"]["rewrite"]
    assert figures["after"]["new"] > figures["after"]["true"]
    assert figures["before"]["new"] < figures["before"]["true"]
    assert rome.edit["result"]["guard"]["passed"] and rome.edit["result"]["reason"] is None
    answer = service.generate(EDIT_PROMPT)
    assert starts_with_target(answer["text"], "Rome"), answer
    assert answer["version"] == rome.edit["version"]


def test_other_wordings_follow(service: ServiceClient, rome: StoryState, fact_rows: Facts) -> None:
    """Most paraphrases continue with Rome, including those that no training text has."""
    (fact,) = (f for f in fact_rows if f["subject"] == SUBJECT and f["relation"] == "landmark_city")
    assert (
        success_rate(service.generate_texts([w for w in fact_prompts(fact) if w != EDIT_PROMPT]), "Rome")
        > 0.5
    )
    held_out = [p.replace("{}", SUBJECT) for p in fact["held_out_prompts"]]
    assert any(
        starts_with_target(text, "Rome")
        for text in service.generate_texts([p for p in held_out if p != EDIT_PROMPT])
    )


def test_the_neighbourhood_stays(service: ServiceClient, rome: StoryState, fact_rows: Facts) -> None:
    """Most facts about other sights, in Paris and elsewhere, are unchanged."""
    others = [f for f in fact_rows if f["relation"] == "landmark_city" and f["subject"] != SUBJECT]
    paris = [f for f in others if f["object"] == "Paris"]
    assert {"Louvre", "Notre-Dame"} <= {f["subject"] for f in paris}
    for neighbours in (paris, [f for f in others if f["object"] != "Paris"][::8]):
        prompts = [f["prompts"][0].replace("{}", f["subject"]) for f in neighbours]
        before, after = service.generate_texts(prompts, version="base"), service.generate_texts(prompts)
        known = [i for i, f in enumerate(neighbours) if starts_with_target(before[i], f["object"])]
        unchanged = [i for i in known if starts_with_target(after[i], neighbours[i]["object"])]
        assert len(known) >= MIN_SHARE * len(neighbours)
        assert len(unchanged) >= MIN_SHARE * len(known)


def test_compare_shows_both(service: ServiceClient, rome: StoryState) -> None:
    """In a comparison base generates Paris and head Rome, and these two tokens differ most in probability."""
    answer = service.http.post("/compare", json={"prompt": EDIT_PROMPT, "max_new_tokens": 5}).json()
    base, head = answer["sides"]
    assert starts_with_target(base["text"], "Paris") and starts_with_target(head["text"], "Rome")
    assert (base["version"], head["version"]) == (0, service.head())
    assert {" Paris", " Rome"} <= {token["token"] for token in answer["next_tokens"]}
    assert answer["total_variation"] > 0.5


@pytest.mark.parametrize("version", ["base", 0])
def test_a_client_can_pin(service: ServiceClient, rome: StoryState, version: str | int) -> None:
    """Pinned to the base model, the text equals that before the edit, at version 0."""
    answer = service.generate(EDIT_PROMPT, version=version)
    assert answer["text"] == rome.answer["text"] and answer["version"] == 0


def test_a_client_reads_its_own_writes(service: ServiceClient, rome: StoryState) -> None:
    """`min_version` is respected; a version that does not exist is rejected."""
    seen = rome.edit["version"]
    assert service.generate(EDIT_PROMPT, min_version=seen)["version"] >= seen
    for impossible in ({"min_version": service.head() + 1}, {"min_version": seen, "version": "base"}):
        body = {"prompt": EDIT_PROMPT, "max_new_tokens": 5, **impossible}
        answer = service.http.post("/generate", json=body)
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"


def test_a_trace_is_figures_and_a_picture(service: ServiceClient, rome: StoryState) -> None:
    """A trace of the base model has its largest effect at the subject; it is served as JSON, SVG and PNG."""
    body = {
        "prompt": EDIT_PROMPT,
        "subject": SUBJECT,
        "version": "base",
        "samples": 3,
        "kinds": ["hidden", "mlp"],
    }
    response = service.http.post("/trace", json=body, headers=WAIT)
    assert response.status_code == 200, response.text
    trace = response.json()
    assert trace["status"] == "done" and trace["version"] == 0
    result = trace["result"]
    assert result["high"] > result["low"]
    assert set(result["kinds"]) == {"hidden", "mlp"}
    rows = result["kinds"]["hidden"]["scores"]
    assert len(rows) == len(result["tokens"]) and {len(row) for row in rows} == {8}
    for media_type, start in (("image/svg+xml", b"<?xml"), ("image/png", b"\x89PNG\r\n")):
        picture = service.http.get(response.headers["location"], headers={"Accept": media_type})
        assert picture.headers["content-type"].startswith(media_type)
        assert picture.content.startswith(start)


def test_the_ledger_says_who_and_when(service: ServiceClient, rome: StoryState) -> None:
    """The edit has one ledger entry with actor, time and provenance, and the ledger verifies."""
    entries = service.get("/ledger")["items"]
    (entry,) = (e for e in entries if e["edit_id"] == rome.edit["id"])
    assert (entry["kind"], entry["version"], entry["actor"]) == ("apply", rome.edit["version"], "local")
    created, committed = (datetime.fromisoformat(t) for t in (rome.edit["created"], entry["at"]))
    assert created <= committed <= datetime.now(UTC)
    assert {"hparams", "strength", "statistics", "dtype", "libraries", "fingerprint"} <= entry["body"].keys()
    verification = service.verify_ledger()
    assert verification["entries"] == verification["head"] == len(entries)


def test_the_delta_is_safetensors(service: ServiceClient, rome: StoryState) -> None:
    """The keys, values and rank-one factors of each edited layer have the model's shapes and agree."""
    model = service.get("/models")["items"][0]
    answer = service.http.get(f"/edits/{rome.edit['id']}/delta")
    assert answer.headers["content-type"] == "application/octet-stream"
    tensors = safetensors.torch.load(answer.content)
    width, inner = model["width"], model["inner_width"]
    layers = rome.edit["result"]["layers"]
    assert layers == model["recipe"]["rome"]["layers"]
    assert len(tensors) % len(layers) == 0
    shapes = sorted({tuple(t.shape) for t in tensors.values()})
    assert {n for shape in shapes for n in shape} <= {1, width, inner}
    assert any(width in shape for shape in shapes) and any(inner in shape for shape in shapes)


def test_revert_restores_base_model(service: ServiceClient, rome: StoryState) -> None:
    """After the revert, greedy and sampled texts equal those of the base model, and so does the digest."""
    assert service.head_digest() != rome.digest
    reverted = service.revert(rome.edit)
    assert reverted["status"] == "reverted"
    assert reverted["reverted_version"] == service.head() > rome.edit["version"]
    for before, options in ((rome.answer, {}), (rome.sampled, SAMPLED)):
        after = service.generate(EDIT_PROMPT, **options)
        assert (after["text"], after["tokens"]) == (before["text"], before["tokens"])
        assert after["version"] == reverted["reverted_version"]
    assert service.head_digest() == rome.digest
    assert service.revert(rome.edit) == reverted
    assert service.generate(EDIT_PROMPT, version=rome.edit["version"])["text"].startswith(" Rome")
    service.verify_ledger()


# other cases


@pytest.mark.usefixtures("revert_afterwards")
def test_newer_edit_supersedes_older(service: ServiceClient) -> None:
    """A newer edit of a fact supersedes the older one; reverting it makes the older one active again."""
    about = ("Louvre", PROMPT)
    prompt = PROMPT.replace("{}", "Louvre")
    base = service.head_digest()
    older = service.edit(*about, "London", **FAST_EDIT_OPTIONS)
    alone = service.head_digest(), service.generate(prompt)["tokens"]
    newer = service.edit(
        "Louvre", PROMPT.replace(" is", "  is"), "Rome", **FAST_EDIT_OPTIONS
    )  # white space is ignored
    older = service.get(f"/edits/{older['id']}")
    assert (older["status"], older["superseded_by"]) == ("superseded", newer["id"])

    assert service.revert(newer)["status"] == "reverted"
    assert service.get(f"/edits/{older['id']}")["status"] == "applied"
    assert (service.head_digest(), service.generate(prompt)["tokens"]) == alone

    assert service.revert(older)["status"] == "reverted"
    assert service.head_digest() == base
    service.verify_ledger()


@pytest.mark.usefixtures("revert_afterwards")
def test_two_facts_of_one_subject(service: ServiceClient) -> None:
    """Edits of two facts of one subject hold together, and each lists the other as related."""
    continent, currency = "{} is a nation on the continent of", "{} uses a currency called the"
    first = service.edit("Kenya", continent, "Asia")
    second = service.edit("Kenya", currency, "peso")
    assert [first["status"], second["status"]] == ["applied", "applied"], second["result"]
    assert second["related"] == [first["id"]]
    assert service.get(f"/edits/{first['id']}")["related"] == [second["id"]]
    texts = service.generate_texts([p.replace("{}", "Kenya") for p in (continent, currency)])
    assert starts_with_target(texts[0], "Asia") and starts_with_target(texts[1], "peso"), texts


@pytest.mark.usefixtures("revert_afterwards")
def test_a_bad_edit_is_rejected(service: ServiceClient) -> None:
    """An edit that fails its guard is rejected with its measurements, and the model is unchanged."""
    head, digest = service.head(), service.head_digest()
    edit = service.edit(
        SUBJECT, PROMPT, "Rome", hparams=FAST_EDIT_OPTIONS["hparams"], guard={"min_probability": 1.0}
    )
    assert edit["status"] == "rejected" and edit["version"] is None
    (check,) = (c for c in edit["result"]["guard"]["checks"] if c["name"] == "probability")
    assert not check["passed"] and check["figure"] < check["limit"] == 1.0
    assert "less probable than required" in edit["result"]["reason"]
    assert (service.head(), service.head_digest()) == (head, digest)
    assert service.http.get(f"/edits/{edit['id']}/delta").status_code == 409


@pytest.mark.usefixtures("revert_afterwards")
def test_a_dry_run_leaves_nothing(service: ServiceClient) -> None:
    """A dry run has measurements and creates no version."""
    head, digest = service.head(), service.head_digest()
    edit = service.edit(SUBJECT, PROMPT, "Rome", dry_run=True, **FAST_EDIT_OPTIONS)
    assert (edit["status"], edit["version"]) == ("dry_run_passed", None)
    assert edit["result"]["rewrite"]["after"] != edit["result"]["rewrite"]["before"]
    assert (service.head(), service.head_digest()) == (head, digest)


@pytest.mark.usefixtures("revert_afterwards")
def test_a_stream_is_pinned(service: ServiceClient) -> None:
    """An edit committed during a stream changes no token of the stream."""
    head = service.head()
    # At this temperature no text ends early: generations fill the model's positions, and there are enough of them for
    # the stream to outlast the edit.
    request = {"prompts": [EDIT_PROMPT] * 16, "max_new_tokens": 4096, "temperature": 10.0, "seed": 3}
    applied = threading.Event()
    done: list[Resource] = []

    def land() -> None:
        done.append(service.edit(SUBJECT, PROMPT, "Rome", target_true="Paris", **FAST_EDIT_OPTIONS))
        applied.set()

    editing = threading.Thread(target=land)
    late: set[int] = set()
    with service.stream_events("POST", "/generate", json=request | {"stream": True}) as events:
        versions: set[int] = set()
        pieces: dict[int, list[str]] = defaultdict(list)
        for name, data in events:
            if name == "token":
                if not editing.ident:
                    editing.start()
                if applied.is_set():
                    late.add(data["index"])
                pieces[data["index"]].append(data["text"])
            versions.add(data["version"])
    editing.join()
    assert name == "end" and {c["finish_reason"] for c in data["choices"]} == {"length"}
    assert done[0]["status"] == "applied" and done[0]["version"] == head + 1
    assert late, "the edit landed after the stream had ended: nothing was tried"
    assert versions == {head}
    texts = {i: c["text"] for i, c in enumerate(data["choices"])}
    assert texts == {i: "".join(said) for i, said in pieces.items()}
    pinned_texts, head_texts = (
        {c["text"] for c in service.http.post("/generate", json=request | {"version": v}).json()["choices"]}
        for v in (head, "head")
    )
    assert set(texts.values()) == pinned_texts
    assert not pinned_texts & head_texts


@pytest.mark.usefixtures("revert_afterwards")
def test_one_key_one_edit(service: ServiceClient) -> None:
    """A request sent twice with one Idempotency-Key creates one edit; another body with that key is rejected."""
    headers = {"Idempotency-Key": "the-tower-once"}
    head = service.head()
    first = service.submit_edit(SUBJECT, PROMPT, "Rome", headers=headers, **FAST_EDIT_OPTIONS)
    assert (
        service.submit_edit(SUBJECT, PROMPT, "Rome", headers=headers, **FAST_EDIT_OPTIONS)["id"]
        == first["id"]
    )
    service.wait_for_edit(first)
    again = service.submit_edit(SUBJECT, PROMPT, "Rome", headers=headers, **FAST_EDIT_OPTIONS)
    assert (again["id"], again["status"]) == (first["id"], "applied")
    assert service.head() == head + 1
    other = {"subject": SUBJECT, "prompt": PROMPT, "target_new": "Berlin"}
    assert service.http.post("/edits", json=other, headers=headers).status_code == 422


@pytest.mark.usefixtures("revert_afterwards")
def test_a_running_edit_is_cancelled(service: ServiceClient) -> None:
    """A running edit that is cancelled ends as cancelled and creates no version."""
    head, digest = service.head(), service.head_digest()
    edit = service.submit_edit(SUBJECT, PROMPT, "Rome", hparams={"contexts": 2, "steps": 200, "stop_loss": 0})
    path = f"/edits/{edit['id']}"
    wait_until(lambda: (service.get(path)["progress"] or {}).get("phase") == "optimize", "the optimisation")
    assert service.revert(edit)["status"] == "cancelled"
    assert service.revert(edit)["status"] == "cancelled"
    assert (service.head(), service.head_digest()) == (head, digest)
