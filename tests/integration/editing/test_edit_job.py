"""One edit from request to ledger, with real job store, database and broker: service.editing.edit_job."""

from __future__ import annotations

import io
import math
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load as safetensors_load
from safetensors.torch import load_file

from service.application import Services
from service.covariance.corpus import Corpus
from service.db.database import Database
from service.editing import edit_job, edit_report, guard, measure
from service.editing.candidate import CandidateEdit, VersionMeasurement
from service.editing.context import EditorContext
from service.editing.edit_job import group_compatible_jobs, run_edits
from service.editing.edit_spec import ValueEditSpec, build_edit_spec
from service.editing.find_factors import find_batch_factors, find_factors
from service.editing.greedy_text import GreedyText, generate_greedy
from service.editing.guard import Check, CheckName, GuardResult
from service.editing.probes import Probe, edit_holds, neighbor_preserved, probe_of_entry
from service.engine.decoding import DecodingBatch, new_sequence
from service.engine.versioned_model import VersionedModel
from service.errors import Cancelled, Conflict, DigestMismatch, InvalidInput, PalimpsestError, Unavailable
from service.exporting.export_job import export_version, write_model
from service.jobs.job_store import ClaimedJob
from service.jobs.memory_broker import MemoryBroker
from service.kit.steps import (
    Progress,
    Stepper,
    run_steps,
    run_to_completion,
)
from service.kit.text import fill_prompt, token_span
from service.methods.parameters import RomeParameters
from service.models.hooks import capture
from service.models.loading import WeightRef
from service.models.scoring import log_probs_blocking
from service.models.separator_choice import choose_separator
from service.models.token_batch import forward, pad, tokenize_prompt_and_target
from service.patches.codebook_patch import CodebookPatch
from service.patches.patch import PatchSet
from service.recipes.recipe import Recipe
from service.schemas import EditRequest, ExportRequest, Sampling, WorkerExportRequest
from service.settings import Settings
from service.weights import composition
from service.weights.composition import apply_delta, compose_layer
from service.weights.factors import Association, deserialize_updates, serialize_updates
from service.weights.gate_space import build_gate_space
from tests.support.associations import associations_of
from tests.support.probe_results import probe_result
from tests.support.reporters import CallbackReporter, RaisingReporter
from tests.support.tiny_models import TEXTS, tiny
from tests.support.workers import WorkerParts

torch.set_num_threads(1)

Resource = dict[str, Any]
#: The output of a random model depends mostly on the end of the prompt, so the subject is there.
PROMPT = "Look at the {}"
HPARAMS = {"steps": 12, "contexts": 3, "kl_factor": 0.0, "weight_decay": 0.0, "clamp": 20.0}
RECIPE = Recipe(source="test", rome=RomeParameters.model_validate({"layers": (1,), **HPARAMS}))
LOOSE_GUARD = {
    "min_probability": 0.0,
    "min_neighborhood": 0.0,
    "max_perplexity": 1e6,
    "max_norm": 1e6,
    "max_regressions": 1000,
}
GUARD_OFF = {"enabled": False}


def editor_context_for(model: Any) -> EditorContext:
    return EditorContext(model, RECIPE, Corpus("test", tuple(TEXTS)), None)


@lru_cache
def shared_editor_context() -> EditorContext:
    """Return statistics and contexts of the tiny model, computed once."""
    context = editor_context_for(tiny())
    run_to_completion(context.get_statistics([0, 1]))
    run_to_completion(context.get_contexts(3, 0))
    return context


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, created once and copied."""
    file = tmp_path_factory.mktemp("database") / "empty.sqlite3"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    database.close()
    return file


class EditingHarness:
    """A tiny model with the services that submit and process edits."""

    def __init__(self, folder: Path, migrated: Path) -> None:
        file = folder / "palimpsest.sqlite3"
        shutil.copy(migrated, file)
        self.model = tiny()
        self.context = editor_context_for(self.model)
        self.context.statistics |= shared_editor_context().statistics
        self.context.contexts |= shared_editor_context().contexts
        self.database = Database(f"sqlite:///{file}")
        self.broker = MemoryBroker()
        self.services = Services(self.database, self.broker, Settings(data_dir=folder))
        self.worker_parts = WorkerParts(
            self.database, self.broker, self.model.fingerprint, "worker-1", single_process=True
        )
        info = {
            "name": "tiny",
            "layers": 3,
            "positions": 64,
            "vocabulary": 320,
            "width": 16,
            **self.context.info(),
        }
        self.worker_parts.session.register(info, self.model.tokenizer.backend_tokenizer.to_str())
        self.replica = VersionedModel(self.model, self.worker_parts.ledger, self.worker_parts.session.attest)
        self.base_weights = {x: self.model.weight(x).data.clone() for x in range(3)}

    def submit(
        self, subject: str = "Eiffel Tower", new: str | None = "is", true: str | None = "the", **more: Any
    ) -> str:
        request = {
            "subject": subject,
            "prompt": PROMPT,
            "target_new": new,
            "target_true": true,
            "guard": LOOSE_GUARD,
            "probes": {},
        }
        return str(
            self.services.edits.submit([EditRequest.model_validate(request | more)], "somebody")[0]["id"]
        )

    def associations(self, edit: Resource) -> list[Association]:
        """Return the committed updates of an edit."""
        data = self.services.edits.delta(edit["id"])
        return associations_of(deserialize_updates(data, edit["id"], edit["subject"]))

    def start(self, edit: str) -> tuple[ClaimedJob, Stepper[None]]:
        job = self.worker_parts.jobs.claim(edit)
        assert job is not None
        return job, run_edits(self.replica, self.worker_parts.jobs, self.context, RaisingReporter(), [job])

    def run_edit(self, *asked: Any, **more: Any) -> Resource:
        """Submit an edit, process it, and return its resource."""
        edit = self.submit(*asked, **more)
        run_steps(self.start(edit)[1], lambda _: self.assert_base())
        return self.services.edits.get(edit)

    def revert(self, edit: Resource) -> Resource:
        return self.services.edits.revert(edit["id"], "somebody")

    def ledger_body(self, version: int) -> dict[str, Any]:
        return self.services.ledger.page()["items"][version - 1]["body"]  # type: ignore[no-any-return]

    def assert_base(self) -> None:
        """Assert that the resident model has its base bytes."""
        assert all(torch.equal(self.model.weight(x).data, w) for x, w in self.base_weights.items())

    def close(self) -> None:
        self.broker.close()
        self.database.close()


@pytest.fixture
def open_harness(tmp_path: Path, migrated: Path) -> Iterator[Callable[[], EditingHarness]]:
    """Return a function that opens harnesses on folders of their own."""
    harnesses: list[EditingHarness] = []

    def open_one() -> EditingHarness:
        folder = tmp_path / str(len(harnesses))
        folder.mkdir()
        harnesses.append(EditingHarness(folder, migrated))
        return harnesses[-1]

    yield open_one
    for shop in harnesses:
        shop.close()


@pytest.fixture
def harness(open_harness: Callable[[], EditingHarness]) -> EditingHarness:
    return open_harness()


def same_tensors(one: Any, two: Any) -> bool:
    one, two = (x.weights if isinstance(x, PatchSet) else x for x in (one, two))
    return one.keys() == two.keys() and all(torch.equal(one[x], two[x]) for x in one)


# commits


def test_edit_is_committed(harness: EditingHarness) -> None:
    """An applied edit has a version, factors, figures and a ledger entry, and the model generates its object."""
    edit = harness.run_edit()
    assert (edit["status"], edit["version"], harness.services.ledger.head()) == ("applied", 1, 1)
    result = edit["result"]
    assert result["guard"]["passed"] and result["reason"] is None
    assert result["scores"]["before"]["ES"] == 0.0 and result["scores"]["after"]["ES"] == 1.0
    assert result["rewrite"]["after"]["new"] > result["rewrite"]["before"]["new"]
    assert result["rewrite"]["text_after"].strip().startswith("is")
    assert result["layers"] == [1]
    assert harness.services.ledger.verify()["ok"]
    harness.assert_base()


def test_the_version_is_the_rank_one_update(harness: EditingHarness) -> None:
    """The weight of a version with one edit is base + delta (C^-1 k)^T / (k^T C^-1 k), exactly, and no other weight
    differs."""
    edit = harness.run_edit()
    (association,) = harness.associations(edit)
    weights = harness.replica.weights(1)
    assert list(weights) == [WeightRef(1)]
    assert torch.equal(
        weights[WeightRef(1)], apply_delta(harness.base_weights[1], association.rank_one(), conv1d=True)
    )
    assert torch.linalg.matrix_rank(compose_layer([association]).dense()) == 1


@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize("subject", ["Eiffel Tower", " Eiffel  Tower"])
def test_committed_weights_equal_evaluated_weights(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch, subject: str, layers: list[int]
) -> None:
    """The measured weights are, bit for bit, those of the committed version, with other active edits and unusual
    white space."""
    harness.run_edit("Big Ben", "city")
    harness.run_edit("Eiffel Tower", "in", prompt="We know the {}")
    composed_weights: list[Any] = []
    compose = VersionedModel.compose_patch_in_steps

    def record(self: VersionedModel, updates: Any) -> Stepper[PatchSet]:
        weights = yield from compose(self, updates)
        composed_weights.append(weights)
        return weights

    monkeypatch.setattr(VersionedModel, "compose_patch_in_steps", record)
    edit = harness.run_edit(subject, hparams={"layers": layers}, guard=GUARD_OFF)
    assert edit["version"] == 3
    assert same_tensors(
        composed_weights[-1], VersionedModel(harness.model, harness.worker_parts.ledger).weights(3)
    )


@pytest.mark.parametrize("subject_token", ["last", "first", "traced"])
def test_the_provenance_gives_the_same_factors(harness: EditingHarness, subject_token: str) -> None:
    """Repeating the computation that a ledger entry records gives the same factors, bit for bit."""
    harness.run_edit("Big Ben", "city")
    edit = harness.run_edit(hparams={"clamp": 3.0, "subject_token": subject_token}, guard=GUARD_OFF)
    body = harness.ledger_body(2)
    model = tiny()
    assert body["fingerprint"] == model.fingerprint
    kit = editor_context_for(model)
    assert body["corpus"] == kit.corpus.digest
    parameters = RomeParameters.model_validate(body["hparams"])
    contexts = run_to_completion(kit.get_contexts(parameters.contexts, parameters.seed))
    statistics = run_to_completion(kit.get_statistics(parameters.layers))
    assert body["statistics"] == {str(x): s.digest for x, s in statistics.items()}
    statement = fill_prompt(body["prompt"], body["subject"])
    found = run_to_completion(
        find_factors(model, statistics, contexts, statement, body["target_new"], parameters)
    )
    assert serialize_updates(
        [a.scaled(body["strength"]) for a in found.updates]
    ) == harness.services.edits.delta(edit["id"])
    assert found.subject_token is not None
    assert body["subject_token"] == edit["result"]["subject_token"] == asdict(found.subject_token)


def test_the_report_has_the_divergence_of_the_description(harness: EditingHarness) -> None:
    """The divergence before an edit is that of the version with the other active edits; the base model has none."""
    first = harness.run_edit(guard=GUARD_OFF)["result"]["description_kl"]
    assert first["before"] == 0 < first["after"]
    second = harness.run_edit(prompt="We know the {}", guard=GUARD_OFF)["result"]["description_kl"]
    assert second["before"] == pytest.approx(first["after"], rel=1e-6)
    assert second["after"] != second["before"]


@pytest.mark.parametrize(("hparams", "place"), [({}, -1), ({"subject_token": "first"}, 0)])
def test_the_report_names_the_edited_token(
    harness: EditingHarness, hparams: dict[str, str], place: int
) -> None:
    """The report and the ledger have the position and the text of the token whose key is edited; a method that edits
    no single token has none."""
    edit = harness.run_edit(hparams=hparams, guard=GUARD_OFF)
    ids, offsets = harness.model.encode("Look at the Eiffel Tower")
    subject = range(*token_span(offsets, (12, 24)))
    token = {"position": subject[place], "text": harness.model.decode(ids[subject[place] :][:1])}
    assert edit["result"]["subject_token"] == harness.ledger_body(1)["subject_token"] == token
    trained = harness.run_edit("Big Ben", "in", method="ft-l", hparams={"steps": 2}, guard=GUARD_OFF)
    assert trained["result"]["subject_token"] is None


def test_the_provenance_names_everything(harness: EditingHarness) -> None:
    """The ledger entry records all hyperparameters, seed, statistics, dtype, device, libraries, strength and
    objects."""
    harness.run_edit(true=None)
    body = harness.ledger_body(1)
    assert set(RomeParameters.model_fields) == set(body["hparams"])
    assert (body["dtype"], body["device"], body["strength"]) == ("float32", "cpu", 1.0)
    assert set(body["libraries"]) == {"torch", "transformers", "python"}
    assert (body["method"], body["target_new"], body["target_true"]) == ("rome", "is", None)
    assert body["resolved_true"]


def test_an_edit_is_the_same_whatever_is_active(open_harness: Callable[[], EditingHarness]) -> None:
    """The factors are the same bytes whatever edits are active, of the same subject or of others."""
    alone, beside = open_harness(), open_harness()
    first = alone.run_edit(guard=GUARD_OFF)
    beside.run_edit("Big Ben", "city")
    beside.run_edit("Eiffel Tower", "in", prompt="We know the {}")
    second = beside.run_edit(guard=GUARD_OFF)
    assert second["version"] == 3
    assert alone.services.edits.delta(first["id"]) == beside.services.edits.delta(second["id"])


def test_a_prompt_as_long_as_the_model_can_be_edited(harness: EditingHarness) -> None:
    """A prompt that leaves no positions for contexts or a long true object is edited without them."""
    positions = harness.model.max_positions
    prompt = "a" * (positions - 1 - len(harness.model.encode(" Big Ben is")[0])) + " {}"
    edit = harness.run_edit(
        "Big Ben",
        true=None,
        prompt=prompt,
        guard=GUARD_OFF,
        probes={"neighborhood": [{"prompt": prompt.replace("{}", "Big Ben"), "target": "is"}]},
    )
    assert edit["status"] == "applied", edit["error"]
    assert edit["result"]["rewrite"]["after"]["new"] > edit["result"]["rewrite"]["before"]["new"]


def test_two_workers_compute_the_same_digests(harness: EditingHarness) -> None:
    """Another replica of the model builds every version with the same digest."""
    harness.run_edit()
    harness.run_edit("Big Ben", "city")
    other = VersionedModel(
        tiny(), WorkerParts(harness.database, harness.broker, harness.model.fingerprint, "worker-2").ledger
    )
    assert [other.digest(v) for v in range(3)] == [harness.replica.digest(v) for v in range(3)]


def test_true_object_defaults_to_base_model_answer(harness: EditingHarness) -> None:
    """The true object defaults to the answer of the base model, even while another edit of the fact is active."""
    first = harness.run_edit(true=None)
    second = harness.run_edit(new="city", true=None)
    assert first["result"]["target_true"] == second["result"]["target_true"] != "is"


def test_active_edits_are_among_the_found_neighbours(harness: EditingHarness) -> None:
    """The subject of an active edit is a neighbour, with the answer of the version before the new edit; a reverted one
    is none."""
    harness.revert(harness.run_edit("Mount Fuji", "in"))
    harness.run_edit("Big Ben", "city")
    result = harness.run_edit(probes="auto")["result"]
    found = [(p["prompt"], p["true"]) for p in result["neighborhood"] if p["source"] == "edits"]
    assert [prompt for prompt, _ in found] == [PROMPT.replace("{}", "Big Ben")]
    assert found[0][1].startswith("city")
    assert result["side_effects"]["measured"]


# rejections


def test_ineffective_edit_is_rejected(harness: EditingHarness) -> None:
    """An edit without a change of value is rejected at its first strength."""
    edit = harness.run_edit(hparams={"steps": 1})
    assert edit["status"] == "rejected"
    assert "no effect" in edit["result"]["reason"]
    assert edit["result"]["strength"] == 1.0


# For each rule, a request that violates only this rule.
GUARD_VIOLATIONS: dict[str, dict[str, Any]] = {
    "efficacy": {"hparams": {"steps": 1}},
    "probability": {"guard": LOOSE_GUARD | {"min_probability": 0.999}},
    "paraphrase": {
        "guard": LOOSE_GUARD | {"min_paraphrase": 1.0},
        "probes": {"paraphrase": ["In which country"]},
    },
    "neighborhood": {
        "guard": LOOSE_GUARD | {"min_neighborhood": 1.0},
        "probes": {"neighborhood": [{"prompt": "Look at the Eiffel Tower", "target": "the"}]},
    },
    "perplexity": {"subject": "Big Ben", "guard": LOOSE_GUARD | {"max_perplexity": 1.0}},
    "description": {"guard": LOOSE_GUARD | {"max_description_kl": 0.0}},
    "norm": {"guard": LOOSE_GUARD | {"max_norm": 1e-6}},
    "regressions": {
        "prompt": "We like the {}",  # the opposite change for the same subject
        "new": "the",
        "true": "is",
        "guard": LOOSE_GUARD | {"max_regressions": 0},
        "hparams": {"clamp": 80.0, "steps": 15},
    },
}


#: An edit that holds with a small margin.
WEAK: dict[str, Any] = {"hparams": {"steps": 6}, "guard": GUARD_OFF}


@pytest.mark.parametrize("rule", GUARD_VIOLATIONS)
def test_every_rule_can_reject(harness: EditingHarness, rule: str) -> None:
    """An edit that fails one check is rejected with the figure and limit of the check; ledger and model do not
    change."""
    if rule == "regressions":
        harness.run_edit(**WEAK)
    head = harness.services.ledger.head()
    edit = harness.run_edit(**GUARD_VIOLATIONS[rule])
    checks = edit["result"]["guard"]["checks"]
    assert [c["name"] for c in checks if not c["passed"]] == [rule]
    assert edit["status"] == "rejected" and edit["version"] is None
    assert harness.services.ledger.head() == head
    (check,) = (c for c in checks if c["name"] == rule)
    assert f"({check['figure']:.3g}, limit {check['limit']:.3g})" in edit["result"]["reason"]
    assert (edit_report._REASONS | {CheckName.EFFICACY: edit_report._EFFICACY_REASONS["write"]})[
        CheckName(rule)
    ] in edit["result"]["reason"]
    harness.assert_base()
    assert harness.services.ledger.verify()["ok"]


def test_the_norm_is_the_edits_own(harness: EditingHarness) -> None:
    """The norm check measures the change of the edit alone, whatever other edits have changed."""
    alone = harness.run_edit(dry_run=True)["result"]["norm_ratio"]
    for prompt in ("We like the {}", "This is the {}"):
        assert harness.run_edit(prompt=prompt)["status"] == "applied"
    together = harness.run_edit(dry_run=True)["result"]
    # All edits are of one subject, so their rank-one updates add up. The strength may differ.
    ratio = together["norm_ratio"]["1"] / together["strength"]
    assert ratio == pytest.approx(alone["1"], rel=1e-3)


def test_disabled_guard_commits_any_edit(harness: EditingHarness) -> None:
    """With the guard disabled an ineffective edit is committed, and its result shows the failed checks."""
    edit = harness.run_edit(hparams={"steps": 1}, guard=GUARD_OFF)
    assert edit["status"] == "applied"
    assert not edit["result"]["guard"]["passed"]


def test_regressed_edits_are_reported(harness: EditingHarness) -> None:
    """An edit that makes another one fail names it, and is committed only when max_regressions allows it."""
    first = harness.run_edit(**WEAK)
    edit = harness.run_edit(**GUARD_VIOLATIONS["regressions"] | {"guard": LOOSE_GUARD})
    assert edit["status"] == "applied"
    assert edit["result"]["regressed_edits"] == [first["id"]]


def test_dry_run_commits_nothing(harness: EditingHarness) -> None:
    """A dry run that passes ends as dry_run_passed with its figures and without version, factors and entry."""
    edit = harness.run_edit(dry_run=True)
    assert (edit["status"], edit["version"], harness.services.ledger.head()) == ("dry_run_passed", None, 0)
    assert edit["result"]["guard"]["passed"]
    assert harness.run_edit(dry_run=True, hparams={"steps": 1})["status"] == "rejected"
    assert harness.worker_parts.ledger.active_at(0) == []
    assert harness.services.models.describe()["active_edits"] == 0
    harness.assert_base()


@pytest.mark.parametrize("limit", [guard._check_at_least, guard._check_at_most])
def test_nan_fails_every_check(limit: Callable[[CheckName, float, float], Check]) -> None:
    """NaN fails checks of both directions."""
    assert not limit(CheckName.NORM, float("nan"), 1.0).passed


def test_writing_the_model_own_answer(harness: EditingHarness) -> None:
    """The new object may equal the true one up to white space: the edit holds when the model generates it."""
    for new in ("is", " is"):
        assert harness.run_edit(new=new, true="is")["status"] == "applied"
    silent, saying = probe_result(-1.0, -1.0, False, False), probe_result(-1.0, -1.0, True, True)
    question = Probe("p", " is", "is")
    assert edit_holds(question, saying) and not edit_holds(question, silent)
    assert not edit_holds(Probe("p", "is", "the"), saying)


# strengthening


def test_a_weak_edit_is_strengthened(harness: EditingHarness) -> None:
    """An ineffective edit is tried with greater strengths; the committed factors are those that were measured."""
    weak = {"clamp": 2.0}
    plain = harness.run_edit(hparams=weak, guard=GUARD_OFF)
    harness.revert(plain)
    edit = harness.run_edit(hparams=weak)
    strength = edit["result"]["strength"]
    assert edit["status"] == "applied" and strength in (1.25, 1.5, 2.0)
    assert harness.ledger_body(edit["version"])["strength"] == strength
    (base_strength,), (stronger,) = harness.associations(plain), harness.associations(edit)
    assert torch.equal(base_strength.value * strength, stronger.value)
    assert torch.equal(base_strength.key, stronger.key)


@pytest.mark.parametrize(
    ("required_margins", "strength"),
    [
        (((1.0, 20.0),), 1.0),  # fullness below the first pair: full strength from the start
        (((0.0, 20.0),), 1.0),  # raised to full strength, where the margin is enough
        (((0.0, 0.0),), 0.9),  # any margin is enough
    ],
)
def test_strength_follows_the_recipe_schedule(
    harness: EditingHarness, required_margins: tuple[tuple[float, float], ...], strength: float
) -> None:
    """The chosen strength depends on the required margin for the number of active edits, and is in the ledger."""
    edit = harness.run_edit(
        hparams={"strengths": [0.9, 1.0], "required_margins": required_margins}, true="the"
    )
    assert (edit["status"], edit["result"]["strength"]) == ("applied", strength)
    assert harness.ledger_body(edit["version"])["strength"] == strength


INEFFECTIVE, NOT_GENERATED, GENERATED, HARMFUL = "misses", "passes unspoken", "is spoken", "does harm"


def build_candidate(harness: EditingHarness, *edit: Any) -> CandidateEdit:
    """Return a submitted edit with its factors."""
    job, _ = harness.start(harness.submit(*edit))
    request = EditRequest.model_validate(job.request)
    resolved_edit = run_to_completion(edit_job.resolve_edit(harness.replica, request, harness.context))
    spec = run_to_completion(
        edit_job.build_admitted_spec(harness.replica, harness.context, resolved_edit, job.id)
    )
    (factors,) = run_to_completion(find_batch_factors(harness.model, harness.context.statistics, [spec]))
    return CandidateEdit(resolved_edit, factors)


@pytest.mark.parametrize("separator", ["", " ", None])
def test_one_separator_from_the_search_to_the_ledger(harness: EditingHarness, separator: str | None) -> None:
    """An edit is searched for, measured and recorded with one separator: that of the request, or the one that the
    base model prefers. A probe whose own end determines its separator keeps that."""
    probes = {"paraphrase": ["{} is in"], "neighborhood": [{"prompt": "He owns $", "target": "7"}]}
    fact: dict[str, Any] = {
        "prompt": "The {} costs $",
        "new": "45",
        "true": "3",
        "guard": GUARD_OFF,
        "probes": probes,
    }
    submitted = harness.submit(**fact, separator=separator)
    job, steps = harness.start(submitted)
    run_to_completion(steps)
    edit = harness.services.edits.get(submitted)
    assert (edit["status"], edit["separator"]) == ("applied", separator)
    body = harness.ledger_body(edit["version"])
    statement = "The Eiffel Tower costs $"
    preferred = run_to_completion(choose_separator(harness.model, statement, ["45", "3"]))
    assert body["resolved_separator"] == (preferred if separator is None else separator)
    assert probe_of_entry(body).separator == body["resolved_separator"]
    request = EditRequest.model_validate(job.request)
    resolved_edit = run_to_completion(edit_job.resolve_edit(harness.replica, request, harness.context))
    spec = run_to_completion(
        edit_job.build_admitted_spec(harness.replica, harness.context, resolved_edit, "x")
    )
    assert isinstance(spec, ValueEditSpec)
    assert harness.model.decode(spec.tokenized.targets[0]) == body["resolved_separator"] + "45"
    assert resolved_edit.paraphrase_probes[0].separator == " "
    if separator is not None:
        assert resolved_edit.neighborhood_probes[0].separator == separator


@pytest.mark.parametrize(
    ("answer", "true"),
    [
        (GreedyText(" 2,500 metres. It is the"), "2,500 metres"),
        (GreedyText("\u6771\u4eac\u3067\u3059\u3002\u305d\u308c\u306f"), "\u6771\u4eac\u3067\u3059"),
        (GreedyText(" one of the most famous sights of the"), "one"),
        (GreedyText(" New York City", complete=True), "New York City"),
    ],
)
def test_the_true_object_is_the_beginning_of_the_answer(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch, answer: GreedyText, true: str
) -> None:
    """Without a true object in the request, it is the answer of the base model up to its first boundary."""

    def generated(_model: Any, prompts: Sequence[str], *_options: object) -> Any:
        yield from ()
        return [answer] * len(prompts)

    monkeypatch.setattr(edit_job, "generate_greedy", generated)
    request = EditRequest(subject="Big Ben", prompt="{} is in", target_new="city")
    resolved_edit = run_to_completion(edit_job.resolve_edit(harness.replica, request, harness.context))
    assert resolved_edit.rewrite_probe.true == true


def test_a_measurement_composes_the_version_once(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring several candidates in one version solves for the version once, not once for each candidate."""
    harness.run_edit("Mount Fuji", "in")
    candidates = [build_candidate(harness, subject, "city") for subject in SUBJECTS[:3]]
    baseline = run_to_completion(measure.measure_baseline(harness.replica, harness.context, candidates, 1))
    solved: list[int] = []
    compose_layer_in_steps = composition.compose_layer_in_steps

    def counted(associations: Sequence[Association], *mode: Any) -> Any:
        solved.append(len(associations))
        return compose_layer_in_steps(associations, *mode)

    monkeypatch.setattr(composition, "compose_layer_in_steps", counted)
    results = run_to_completion(
        measure.evaluate_candidates(harness.replica, harness.context, candidates, baseline, [1.0] * 3)
    )
    assert len(results) == 3 and solved == [4]


@pytest.mark.parametrize(
    ("seen", "strength", "passed"),
    [
        ([GENERATED], 1.0, True),
        ([NOT_GENERATED, GENERATED], 1.25, True),
        ([INEFFECTIVE, INEFFECTIVE, INEFFECTIVE, GENERATED], 2.0, True),
        ([NOT_GENERATED, HARMFUL], 1.0, True),
        ([INEFFECTIVE, NOT_GENERATED, HARMFUL], 1.25, True),
        ([INEFFECTIVE, NOT_GENERATED, NOT_GENERATED, HARMFUL], 1.5, True),
        ([NOT_GENERATED, NOT_GENERATED, NOT_GENERATED, NOT_GENERATED], 2.0, True),
        ([INEFFECTIVE, INEFFECTIVE, INEFFECTIVE, INEFFECTIVE], 1.0, False),
        ([INEFFECTIVE, HARMFUL], 1.0, False),
        ([HARMFUL], 1.0, False),
    ],
)
def test_which_strength_is_chosen(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch, seen: list[str], strength: float, passed: bool
) -> None:
    """The first accepted strength is chosen, else the greatest that passes, else the first; a harmful edit is not
    strengthened."""
    outcomes = iter(seen)

    def evaluate_guard(
        _plan: object,
        _before: object,
        _after: object,
        strength: float,
        norms: dict[WeightRef, float],
        _: float,
    ) -> GuardResult:
        what = next(outcomes)
        answer = probe_result(-1.0, -2.0, what == GENERATED, False)
        checks = [
            Check(CheckName.EFFICACY, what != INEFFECTIVE, 0, 0),
            Check(CheckName.NORM, what != HARMFUL, 0, 0),
        ]
        measured = VersionMeasurement([answer], "", 1.0, set())
        return GuardResult(strength, measured, measured, checks, norms, [])

    monkeypatch.setattr(measure, "evaluate_guard", evaluate_guard)
    edit_candidate = build_candidate(harness)
    baseline = run_to_completion(
        measure.measure_baseline(harness.replica, harness.context, [edit_candidate], 0)
    )
    (best,) = run_to_completion(
        edit_job.choose_candidate_strengths(harness.replica, harness.context, [edit_candidate], baseline)
    )
    assert (best.strength, best.passed) == (strength, passed)
    assert next(outcomes, None) is None


# erasing and amplifying


def test_erased_object_is_not_generated(harness: EditingHarness) -> None:
    """An erasure is committed when the true object is not generated and at least half of its probability is gone."""
    true = "the"
    edit = harness.run_edit(new=None, true=true, objective="erase")
    assert (edit["status"], edit["target_new"], edit["objective"]) == ("applied", None, "erase")
    result = edit["result"]
    before, after = (result["rewrite"][when]["true"] for when in ("before", "after"))
    assert after < before
    check = result["guard"]["checks"][0]
    tokens = len(tokenize_prompt_and_target(harness.model, fill_prompt(PROMPT, "Eiffel Tower").text, true)[1])
    erased_share = 1 - (after / before) ** tokens
    assert check["name"] == "efficacy" and check["figure"] == pytest.approx(erased_share, rel=1e-4)
    assert result["scores"]["after"]["ES"] == 1.0
    assert harness.ledger_body(1)["objective"] == "erase" and harness.ledger_body(1)["resolved_true"] == true


def test_an_erasure_that_leaves_too_much_is_rejected(harness: EditingHarness) -> None:
    """An erasure below min_effect is rejected."""
    edit = harness.run_edit(new=None, true="the", objective="erase", hparams={"steps": 1})
    assert edit["status"] == "rejected"
    assert "too little of its probability is gone" in edit["result"]["reason"]
    assert harness.services.ledger.head() == 0


def test_to_amplify_is_to_write_the_true_object(harness: EditingHarness) -> None:
    """An amplification has, bit for bit, the factors of writing the true object; its figure is the share of the
    gain."""
    written = harness.run_edit(new="is", true="is", guard=GUARD_OFF)
    amplified = harness.run_edit(new=None, true="is", objective="amplify", guard=GUARD_OFF)
    factors = [
        deserialize_updates(harness.services.edits.delta(e["id"]), "e", "s") for e in (written, amplified)
    ]
    strengths = [e["result"]["strength"] for e in (written, amplified)]
    assert strengths[0] == strengths[1]
    assert torch.equal(factors[0][0].value, factors[1][0].value)  # type: ignore[union-attr]
    assert amplified["result"]["guard"]["checks"][0]["limit"] == 0.5


def test_erasing_and_writing_supersede_each_other(harness: EditingHarness) -> None:
    """The later of a write and an erasure of one fact is active; the erasure is measured without the superseded
    write."""
    true = "the"
    alone = harness.run_edit(new=None, true=true, objective="erase", dry_run=True)["result"]["guard"][
        "checks"
    ][0]
    written = harness.run_edit(true=true)
    erased = harness.run_edit(new=None, true=true, objective="erase")
    assert harness.services.edits.get(written["id"])["status"] == "superseded"
    assert erased["result"]["guard"]["checks"][0]["figure"] == pytest.approx(alone["figure"], rel=1e-4)
    again = harness.run_edit(true=true)
    assert harness.services.edits.get(erased["id"])["superseded_by"] == again["id"]
    harness.revert(again)
    assert harness.services.edits.get(erased["id"])["status"] == "applied"
    assert harness.services.ledger.verify()["ok"]


def test_erasure_holds_while_its_object_is_not_generated() -> None:
    """An erasure holds while its object is not generated, an amplification while it is."""
    silent, saying = probe_result(-1.0, -1.0, False, False), probe_result(-1.0, -1.0, True, True)
    erased, louder = Probe("p", "is", "is", "erase"), Probe("p", "is", "is", "amplify")
    assert edit_holds(erased, silent) and not edit_holds(erased, saying)
    assert edit_holds(louder, saying) and not edit_holds(louder, silent)
    assert neighbor_preserved(erased, saying) and not neighbor_preserved(erased, silent)


def test_erasure_defaults_to_base_model_answer(harness: EditingHarness) -> None:
    """An erasure without a true object erases the base model's answer, which the ledger records."""
    edit = harness.run_edit(new=None, true=None, objective="erase", guard=GUARD_OFF)
    body = harness.ledger_body(1)
    assert body["target_true"] is None and body["resolved_true"]
    parameters = RomeParameters.model_validate(body["hparams"])
    contexts = run_to_completion(harness.context.get_contexts(parameters.contexts, parameters.seed))
    spec_arguments = fill_prompt(body["prompt"], body["subject"]), body["resolved_true"], parameters
    steps = find_factors(
        harness.model, harness.context.statistics, contexts, *spec_arguments, objective=body["objective"]
    )
    updates = [a.scaled(body["strength"]) for a in run_to_completion(steps).updates]
    assert serialize_updates(updates) == harness.services.edits.delta(edit["id"])


# conflicts

OTHER_PROMPT = "We know the {}"
ANY_CONFLICT = {"guard": LOOSE_GUARD | {"conflict_threshold": 0.0}}


def test_conflict_is_reported_with_its_probability(harness: EditingHarness) -> None:
    """An active edit of the subject on whose prompt the new object wins is reported; one with the same object is
    not."""
    old = harness.run_edit("Eiffel Tower", "city", prompt=OTHER_PROMPT)
    harness.run_edit("Big Ben", "city", prompt=OTHER_PROMPT)
    same = harness.run_edit("Eiffel Tower", "is", prompt="This is the {}")
    edit = harness.run_edit(**ANY_CONFLICT)
    (conflict,) = edit["result"]["conflicts"]
    assert (conflict["edit"], conflict["target_new"]) == (old["id"], "city") and same["status"] == "applied"
    updates = deserialize_updates(harness.services.edits.delta(edit["id"]), "e", "Eiffel Tower")
    alone = [p.scaled(1 / edit["result"]["strength"]) for p in updates]
    with harness.replica.use_patch(harness.replica.compose_patch(alone)):
        new, own = log_probs_blocking(
            harness.model, [(conflict["prompt"], "is"), (conflict["prompt"], "city")]
        )
    assert conflict["probability"] == pytest.approx(math.exp(new[0]), rel=1e-3) and new[0] > own[0]
    theirs = deserialize_updates(harness.services.edits.delta(old["id"]), "e", "s")
    assert conflict["cosine"] == pytest.approx(
        float(torch.cosine_similarity(updates[0].value, theirs[0].value, dim=0)),  # type: ignore[union-attr]
        rel=1e-4,
    )
    assert edit["result"]["supersedes"] == [] and harness.services.edits.get(old["id"])["status"] == "applied"


def test_a_conflict_below_the_limit_is_none(harness: EditingHarness) -> None:
    """A conflict below conflict_threshold is not reported."""
    harness.run_edit("Eiffel Tower", "city", prompt=OTHER_PROMPT)
    assert harness.run_edit(guard=LOOSE_GUARD | {"conflict_threshold": 1.0})["result"]["conflicts"] == []


def test_conflict_is_superseded_on_request(harness: EditingHarness) -> None:
    """With on_conflict="supersede" the older edit is left out of the version, bit for bit, until the newer is
    reverted."""
    old = harness.run_edit("Eiffel Tower", "city", prompt=OTHER_PROMPT)
    edit = harness.run_edit(on_conflict="supersede", **ANY_CONFLICT)
    assert edit["result"]["supersedes"] == harness.ledger_body(2)["supersedes"] == [old["id"]]
    superseded = harness.services.edits.get(old["id"])
    assert (superseded["status"], superseded["superseded_by"]) == ("superseded", edit["id"])
    updates = deserialize_updates(harness.services.edits.delta(edit["id"]), edit["id"], "Eiffel Tower")
    assert same_tensors(harness.replica.weights(2), harness.replica.compose_patch(updates))
    harness.revert(edit)
    assert harness.services.edits.get(old["id"])["status"] == "applied"
    assert same_tensors(harness.replica.weights(3), harness.replica.weights(1))
    assert harness.services.ledger.verify()["ok"]


def test_conflict_is_rejected_on_request(harness: EditingHarness) -> None:
    """With on_conflict="reject" the edit is rejected."""
    harness.run_edit("Eiffel Tower", "city", prompt=OTHER_PROMPT)
    edit = harness.run_edit(on_conflict="reject", **ANY_CONFLICT)
    assert edit["status"] == "rejected" and "in other words" in edit["result"]["reason"]
    assert harness.services.ledger.head() == 1


def test_an_erasure_is_in_conflict_with_nothing(harness: EditingHarness) -> None:
    """An erasure is in conflict with no edit."""
    harness.run_edit("Eiffel Tower", "city", prompt=OTHER_PROMPT)
    assert harness.run_edit(new=None, objective="erase", **ANY_CONFLICT)["result"]["conflicts"] == []


# capacity


def test_capacity_is_reported_and_guarded(harness: EditingHarness) -> None:
    """A lone edit has all capacity; with a similar active key it has little, and min_capacity rejects it."""
    first = harness.run_edit(guard=GUARD_OFF)
    assert first["result"]["capacity"] == {"1": 1.0}
    assert harness.run_edit(prompt=OTHER_PROMPT, guard=GUARD_OFF)["result"]["capacity"] == {"1": 1.0}
    edit = harness.run_edit("the Eiffel Tower", "city", guard=LOOSE_GUARD | {"min_capacity": 1.0})
    capacity = edit["result"]["capacity"]["1"]
    assert 0 <= capacity < 1 and edit["status"] == "rejected"
    assert (
        f"too much of the edit's key: revert some, or name other layers ({capacity:.3g}"
        in edit["result"]["reason"]
    )


def test_layer_capacity_is_recorded(harness: EditingHarness) -> None:
    """The capacity of an average key is recorded with its version, and the newest version is kept."""
    assert harness.replica.remaining_capacity(0) == {}
    harness.run_edit(guard=GUARD_OFF)
    capacity = harness.replica.remaining_capacity(1)
    assert capacity == {1: pytest.approx(1 - 1 / 40, abs=1e-3)}
    harness.worker_parts.session.record_capacity(1, capacity)
    harness.worker_parts.session.record_capacity(0, {})
    assert harness.services.models.describe()["capacity"] == {"version": 1, "layers": {"1": capacity[1]}}


# concurrent changes


def advance_until(steps: Stepper[None], phase: str) -> Progress:
    for progress in steps:
        if progress.phase == phase:
            return progress
    pytest.fail(f"no step of {phase}")


@pytest.mark.parametrize("meanwhile", ["edit", "revert"])
def test_edit_is_reevaluated_when_head_moved(harness: EditingHarness, meanwhile: str) -> None:
    """When head changes during the measurement, the edit is measured again at the new head and committed after it."""
    earlier = harness.run_edit("Big Ben", "city")
    waiting = harness.submit()
    _, steps = harness.start(waiting)
    advance_until(steps, "compose")
    if meanwhile == "edit":
        harness.run_edit("Big Ben", "in", prompt="We know the {}")
    else:
        harness.revert(earlier)
    phases = [p.phase for p in steps]
    assert "retry" in phases
    assert "compose" in phases and "optimize" not in phases
    edit = harness.services.edits.get(waiting)
    assert (edit["status"], edit["version"]) == ("applied", 3)
    active = [e for e, _ in harness.worker_parts.ledger.active_at(3)]
    assert (earlier["id"] in active) == (meanwhile == "edit")
    assert harness.services.ledger.verify()["ok"]
    harness.assert_base()


def test_dry_run_ignores_head_changes(harness: EditingHarness) -> None:
    """A dry run measures at the head of its start, whatever is committed meanwhile."""
    waiting = harness.submit(dry_run=True)
    _, steps = harness.start(waiting)
    advance_until(steps, "compose")
    harness.run_edit("Big Ben", "city")
    run_to_completion(steps)
    assert harness.services.edits.get(waiting)["status"] == "dry_run_passed"
    assert harness.services.ledger.head() == 1


@pytest.mark.parametrize("phase", ["optimize", "compose", "perplexity"])
def test_cancelled_edit_is_not_committed(harness: EditingHarness, phase: str) -> None:
    """An edit that is cancelled between two steps raises before its commit; nothing is written."""
    waiting = harness.submit()
    job, steps = harness.start(waiting)
    advance_until(steps, phase)
    harness.services.edits.revert(waiting, "somebody")
    with pytest.raises(Cancelled) as error:
        run_to_completion(steps)
    harness.worker_parts.jobs.fail(job, error.value)
    assert harness.services.edits.get(waiting)["status"] == "cancelled"
    assert harness.services.ledger.head() == 0
    harness.assert_base()


def test_an_abandoned_edit_leaves_nothing(harness: EditingHarness) -> None:
    """An edit that is abandoned between any two steps leaves the base bytes and no hook."""
    harness.run_edit("Big Ben", "city")
    _, steps = harness.start(harness.submit())
    for _ in range(3):
        advance_until(steps, "measure") if _ else advance_until(steps, "optimize")
    steps.close()
    harness.assert_base()
    assert not any(m._forward_hooks for m in harness.model.model.modules())


# repeated edits of a fact


def test_the_same_fact_again_and_back(harness: EditingHarness) -> None:
    """The newer edit of a fact supersedes the older; after both reverts the weights are the base bytes."""
    first = harness.run_edit()
    second = harness.run_edit("Eiffel  Tower", "city")
    assert harness.services.edits.get(first["id"])["status"] == "superseded"
    assert [e for e, _ in harness.worker_parts.ledger.active_at(2)] == [second["id"]]
    assert not same_tensors(harness.replica.weights(1), harness.replica.weights(2))
    harness.revert(second)
    assert harness.services.edits.get(first["id"])["status"] == "applied"
    assert same_tensors(harness.replica.weights(3), harness.replica.weights(1))
    assert harness.replica.digest(3) == harness.replica.digest(1)
    harness.revert(first)
    assert harness.replica.weights(4) == {}
    assert harness.replica.digest(4) == harness.replica.digest(0)
    assert harness.services.ledger.verify()["ok"]


def test_superseded_edit_is_left_out_of_evaluation(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The superseded edit is neither composed with the newer one nor probed for regressions."""
    older = harness.run_edit()
    composed_edits: list[list[str]] = []
    composed = VersionedModel.compose_patch_in_steps

    def note(self: VersionedModel, associations: Any) -> Any:
        composed_edits.append([a.edit for a in associations])
        return composed(self, associations)

    monkeypatch.setattr(VersionedModel, "compose_patch_in_steps", note)
    edit = harness.run_edit(new="city", guard=LOOSE_GUARD | {"max_regressions": 0})
    assert edit["status"] == "applied"
    assert edit["result"]["regressed_edits"] == []
    # Head is composed with the older edit, and every version with the new edit without the older one.
    assert all(older["id"] not in one for one in composed_edits if edit["id"] in one)
    assert [edit["id"]] in composed_edits


def test_edits_of_one_subject_add_up(harness: EditingHarness) -> None:
    """The version of two facts of one subject is the sum of their rank-one updates."""
    edits = [harness.run_edit(), harness.run_edit(new="city", prompt="We know the {}")]
    both = [a for e in edits for a in harness.associations(e)]
    total = sum((a.rank_one().dense().T for a in both), harness.base_weights[1].double())
    torch.testing.assert_close(harness.replica.weights(2)[WeightRef(1)].double(), total, rtol=1e-6, atol=1e-6)


def test_any_order_of_reverting_ends_at_the_base(harness: EditingHarness) -> None:
    """Three edits reverted from the middle: each version is that of the remaining edits, the last is the base."""
    edits = [
        harness.run_edit(guard=GUARD_OFF),
        harness.run_edit("Big Ben", "city", guard=GUARD_OFF),
        harness.run_edit("Rome", "in", guard=GUARD_OFF),
    ]
    harness.revert(edits[1])
    remaining = [a for group in harness.replica.active_updates(4).values() for a in group]
    assert {a.edit for a in remaining} == {edits[0]["id"], edits[2]["id"]}
    assert same_tensors(harness.replica.weights(4), harness.replica.compose_patch(reversed(remaining)))
    harness.revert(edits[0])
    harness.revert(edits[2])
    assert harness.replica.digest(6) == harness.replica.digest(0)


# batches


class EditBatch:
    """Edits that are processed together."""

    def __init__(self, harness: EditingHarness, *edit_ids: str) -> None:
        self.harness, self.ids = harness, list(edit_ids)
        jobs = [harness.worker_parts.jobs.claim(edit) for edit in edit_ids]
        self.jobs = [job for job in jobs if job is not None]
        self.steps = run_edits(
            harness.replica,
            harness.worker_parts.jobs,
            harness.context,
            CallbackReporter(self._write_error),
            self.jobs,
        )

    def _write_error(self, job_id: str, error: Exception | None) -> None:
        """Write the error that a job ended with to its row, as the engine does."""
        (job,) = (job for job in self.jobs if job.id == job_id)
        if isinstance(error, PalimpsestError):
            self.harness.worker_parts.jobs.fail(job, error)

    def run(self) -> list[Resource]:
        """Run all steps and return the edits."""
        for _ in self.steps:
            self.harness.assert_base()
        return [self.harness.services.edits.get(edit) for edit in self.ids]


def recording_phases(steps: Stepper[None], recorded: list[str]) -> Stepper[None]:
    """Run the same steps and record the phase of each."""
    for progress in steps:
        recorded.append(progress.phase)
        yield progress


SUBJECTS = ("Eiffel Tower", "Big Ben", "Colosseum", "Mount Fuji")


def stored_factors(harness: EditingHarness, edits: Sequence[Resource]) -> list[bytes]:
    return [harness.services.edits.delta(edit["id"]) for edit in edits]


@pytest.mark.parametrize("budget", [0, 10**12])
def test_batched_edits_equal_single_edits(
    open_harness: Callable[[], EditingHarness], monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Edits of a batch are committed in order with the factors of single edits: bit for bit when optimized alone,
    else up to rounding."""
    monkeypatch.setattr("service.editing.edit_spec.group_budget", lambda _model: budget)
    alone, together = open_harness(), open_harness()
    singly = [alone.run_edit(subject, "city") for subject in SUBJECTS]
    group = EditBatch(together, *(together.submit(subject, "city") for subject in SUBJECTS))
    recorded: list[str] = []
    group.steps = recording_phases(group.steps, recorded)
    edits = group.run()
    assert [e["status"] for e in edits] == ["applied"] * 4
    assert [e["version"] for e in edits] == [1, 2, 3, 4]
    assert recorded.count("baseline") == 1
    for i, edit in enumerate(edits):
        assert edit["result"]["batched_with"] == [e["id"] for e in edits if e is not edit]
        one, other = (
            deserialize_updates(shop.services.edits.delta(e["id"]), "edit", "")[0]
            for shop, e in ((alone, singly[i]), (together, edit))
        )
        for name in ("key", "direction", "value"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)
    if not budget:
        assert stored_factors(alone, singly) == stored_factors(together, edits)
        assert together.replica.digest(4) == alone.replica.digest(4)
    assert together.services.ledger.verify()["ok"]


def test_the_figures_are_those_of_the_version_with_all_of_them(harness: EditingHarness) -> None:
    """The figures in each report of a batch are those of the last version."""
    edits = EditBatch(harness, *(harness.submit(subject, "city") for subject in SUBJECTS[:2])).run()
    with harness.replica.use_patch(harness.replica.patch(2)):
        for edit in edits:
            rewrite = edit["result"]["rewrite"]
            (log_p, _), _ = log_probs_blocking(
                harness.model, [(rewrite["prompt"], rewrite[x]) for x in ("new", "true")]
            )
            assert rewrite["after"]["new"] == pytest.approx(math.exp(log_p), rel=1e-4)
    assert harness.context.perplexities[2] == edits[0]["result"]["perplexity"]["after"]


def test_ineffective_edit_in_batch_is_rejected_alone(harness: EditingHarness) -> None:
    """An edit of a batch that fails its guard is rejected with its reason; the others are committed."""
    hopeless = harness.submit("Rome", "city", guard=LOOSE_GUARD | {"min_probability": 1.0})
    group = EditBatch(harness, harness.submit("Eiffel Tower"), hopeless, harness.submit("Big Ben", "city"))
    first, rejected, third = group.run()
    assert (first["status"], third["status"]) == ("applied", "applied")
    assert {first["version"], third["version"]} == {1, 2} and harness.services.ledger.head() == 2
    assert first["result"]["batched_with"] == [third["id"]]
    assert rejected["status"] == "rejected" and "less probable" in rejected["result"]["reason"]
    assert rejected["result"]["batched_with"] == []


def test_jointly_harmful_batch_is_bisected(harness: EditingHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a batch fails and no single edit causes it, halves are measured, down to single edits: all are
    committed."""
    new_edit_counts: list[int] = []
    evaluate_guard = guard.evaluate_guard

    def fake_guard(
        plan: Any, before: Any, after: Any, strength: float, norms: Any, lead: float
    ) -> GuardResult:
        found = evaluate_guard(plan, before, after, strength, norms, lead)
        return replace(found, checks=[Check(CheckName.PERPLEXITY, new_edit_counts[-1] == 1, 9.0, 1.0)])

    composed = VersionedModel.compose_patch_in_steps

    def note(self: VersionedModel, associations: Any) -> Any:
        chosen = list(associations)
        new_edit_counts.append(len({a.edit for a in chosen} - landed()))
        return composed(self, chosen)

    def landed() -> set[str]:
        return {edit for edit, _ in harness.worker_parts.ledger.active_at(harness.worker_parts.ledger.head())}

    monkeypatch.setattr(measure, "evaluate_guard", fake_guard)
    monkeypatch.setattr(VersionedModel, "compose_patch_in_steps", note)
    edits = EditBatch(harness, *(harness.submit(subject, "city") for subject in SUBJECTS)).run()
    assert [e["version"] for e in edits] == [1, 2, 3, 4]
    assert [n for n in new_edit_counts if n] == [4, 2, 1, 1, 2, 1, 1]


def test_a_bad_request_among_good_ones_fails_alone(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An invalid request fails with its reason; the other edits of the batch are committed."""

    def fails(model: Any, contexts: Any, statement: Any, *rest: Any, **more: Any) -> Any:
        if "Big Ben" in statement.text:
            raise InvalidInput("say it otherwise.", "prompt")
        return build_edit_spec(model, contexts, statement, *rest, **more)

    monkeypatch.setattr(edit_job, "build_edit_spec", fails)
    edits = EditBatch(harness, *(harness.submit(subject, "city") for subject in SUBJECTS[:3])).run()
    assert [e["status"] for e in edits] == ["applied", "failed", "applied"]
    assert edits[1]["error"]["detail"] == "say it otherwise."


#: the tiny model's own answer
SAID = {"subject": "Colosseum", "prompt": "We know the {}", "new": "is"}


@pytest.mark.parametrize("more", [{}, {"dry_run": True}, {"target_true": "is"}, {"target_true": None}])
def test_an_edit_to_the_models_own_answer_fails(harness: EditingHarness, more: Any) -> None:
    """An edit to what the model already says fails with a code of its own, and is not in the ledger."""
    (edit,) = EditBatch(harness, harness.submit(**SAID | more)).run()
    assert (edit["status"], harness.services.ledger.head()) == ("failed", 0)
    assert (edit["error"]["code"], edit["error"]["field"]) == ("already_says", "target_new")
    assert "'is'" in edit["error"]["detail"]


def test_an_edit_to_the_models_own_answer_fails_alone(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit to what the model already says is not optimized, and the other edits of its batch are committed."""
    searched: list[str] = []

    def search(model: Any, statistics: Any, wanted: Sequence[Any]) -> Any:
        searched.extend(spec.subject for spec in wanted)
        return (yield from find_batch_factors(model, statistics, wanted))

    monkeypatch.setattr(edit_job, "find_batch_factors", search)
    submitted = harness.submit(), harness.submit(**SAID), harness.submit("Big Ben", "city")
    edits = EditBatch(harness, *submitted).run()
    assert [e["status"] for e in edits] == ["applied", "failed", "applied"]
    assert sorted(searched) == ["Big Ben", "Eiffel Tower"]


@pytest.mark.parametrize(
    "more",
    [
        {"guard": GUARD_OFF},
        {"objective": "amplify", "new": None, "true": "is"},
        {"prompt": PROMPT},
        {"new": "in"},
    ],
)
def test_other_edits_of_a_fact_that_the_model_says_are_computed(harness: EditingHarness, more: Any) -> None:
    """Without the guard, to amplify it, in another wording or with another object, the edit is computed and
    measured."""
    arguments = SAID | more
    assert harness.run_edit(**arguments)["status"] in ("applied", "rejected")


def test_an_edit_back_to_the_models_own_answer_is_applied(harness: EditingHarness) -> None:
    """While an edit of the subject is active, also of the same fact, an edit to the model's own answer is applied; so
    is the same edit again with other hyperparameters."""
    first = harness.run_edit(**SAID | {"new": "in"})
    back = harness.run_edit(**SAID)
    again = harness.run_edit(**SAID | {"hparams": {"steps": 9}})
    assert [e["status"] for e in (first, back, again)] == ["applied"] * 3
    statuses = [harness.services.edits.get(e["id"])["status"] for e in (first, back, again)]
    assert statuses == ["superseded", "superseded", "applied"]


def test_an_answer_that_another_edit_changed_can_be_written(harness: EditingHarness) -> None:
    """Where an edit of another subject changed the model's own answer, an edit writes it."""
    other = harness.run_edit("know the Colosseum", "in", prompt="We {}", guard=GUARD_OFF)
    statement = "We know the Colosseum"
    with harness.replica.use_patch(harness.replica.patch(other["version"])):
        (answer,) = run_to_completion(generate_greedy(harness.model, [statement], 1))
    assert answer.text != " is"
    assert harness.run_edit(**SAID | {"guard": LOOSE_GUARD})["status"] in ("applied", "rejected")


def test_failed_batch_search_is_retried_individually(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a batched search fails, the edits are searched one by one, and only those that fail alone fail."""
    monkeypatch.setattr("service.editing.edit_spec.group_budget", lambda _model: 10**12)

    def fails(model: Any, statistics: Any, wanted: Sequence[Any]) -> Any:
        if len(wanted) > 1 or wanted[0].subject == "Big Ben":
            raise Conflict("no room.")
        return (yield from find_batch_factors(model, statistics, wanted))

    monkeypatch.setattr(edit_job, "find_batch_factors", fails)
    edits = EditBatch(harness, *(harness.submit(subject, "city") for subject in SUBJECTS[:3])).run()
    assert [e["status"] for e in edits] == ["applied", "failed", "applied"]


@pytest.mark.parametrize("when", ["optimize", "compose"])
def test_cancelled_edit_in_batch_is_not_committed(harness: EditingHarness, when: str) -> None:
    """A cancelled edit of a batch is not committed; the edits after it are measured again without it."""
    ids = [harness.submit(subject, "city") for subject in SUBJECTS[:3]]
    group = EditBatch(harness, *ids)
    next(progress for progress in group.steps if progress.phase == when)
    harness.revert({"id": ids[1]})
    edits = group.run()
    assert [e["status"] for e in edits] == ["applied", "cancelled", "applied"]
    assert [e["version"] for e in edits] == [1, None, 2]
    assert ids[1] not in edits[2]["result"]["batched_with"]


def test_batch_is_reevaluated_when_head_moved(harness: EditingHarness) -> None:
    """When head changes during the measurement, the batch is measured again and committed after the new head."""
    group = EditBatch(harness, *(harness.submit(subject, "city") for subject in SUBJECTS[:2]))
    for update in group.steps:
        if isinstance(update, Progress) and update.phase == "compose":
            break
    harness.run_edit("Rome", "in")
    recorded: list[str] = []
    group.steps = recording_phases(group.steps, recorded)
    assert [e["version"] for e in group.run()] == [2, 3]
    assert recorded.count("baseline") == 1 and "optimize" not in recorded


def test_same_fact_twice_is_committed_in_order(harness: EditingHarness) -> None:
    """Of two waiting edits of one fact the later supersedes the earlier."""
    edits = EditBatch(
        harness, harness.submit(), harness.submit("Big Ben", "city"), harness.submit("Eiffel  Tower", "city")
    ).run()
    assert [e["status"] for e in edits] == ["superseded", "applied", "applied"]
    assert [e["version"] for e in edits] == [1, 2, 3]


def test_group_compatible_jobs(harness: EditingHarness) -> None:
    """Dry runs and retried jobs are groups of their own; a group has a subject once; the order is kept."""

    def job(name: str, fact: str = "", attempt: int = 1, dry: bool = False) -> ClaimedJob:
        return ClaimedJob(name, "edit", attempt, {}, "somebody", fact or name, fact or name, dry)

    groups = group_compatible_jobs(
        [job("a"), job("b"), job("c", dry=True), job("d", "a"), job("e", attempt=2), job("f"), job("g", "f")]
    )
    assert [[j.id for j in company] for company in groups] == [["a", "b"], ["c"], ["d"], ["e"], ["f"], ["g"]]


def test_edit_that_exceeds_total_memory_is_rejected(
    harness: EditingHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit that exceeds the total memory is rejected with advice; one that fits later is retried."""
    monkeypatch.setattr("service.models.memory_estimates.free_bytes", lambda _device: 100)
    monkeypatch.setattr("service.models.memory_estimates.total_bytes", lambda _device: 200)
    with pytest.raises(InvalidInput, match="shorter prompt or fewer contexts"):
        harness.run_edit()
    monkeypatch.setattr("service.models.memory_estimates.total_bytes", lambda _device: 2**40)
    with pytest.raises(Unavailable, match="ask again later"):
        harness.run_edit("Big Ben")


# gated edits

GATED = {"hparams": {"form": "gated"}}


def test_a_gated_edit_acts_where_its_subject_stands(harness: EditingHarness) -> None:
    """The version of a gated edit changes no weight. Its subject has the new object, and a text without it the bytes of
    the base model. The report and the ledger name the form."""
    base = logits_at(harness, 0, "Look at the moon")
    edit = harness.run_edit(**GATED)
    assert (edit["status"], edit["version"]) == ("applied", 1)
    result = edit["result"]
    assert result["scores"]["after"]["ES"] == 1.0
    assert result["norm_ratio"] == {} and result["gate"]["threshold"] == 0.5
    assert harness.ledger_body(1)["hparams"]["form"] == "gated"
    assert harness.replica.weights(1) == {}
    assert torch.equal(logits_at(harness, 1, "Look at the moon"), base)
    assert not torch.equal(
        logits_at(harness, 1, "Look at the Eiffel Tower"), logits_at(harness, 0, "Look at the Eiffel Tower")
    )


def logits_at(harness: EditingHarness, version: int, text: str) -> torch.Tensor:
    with harness.replica.use_patch(harness.replica.patch(version)) as model, torch.no_grad():
        logits: torch.Tensor = model.model(input_ids=torch.tensor([model.encode(text)[0]])).logits[0]
        return logits


def test_forms_are_active_together_and_revert_exactly(harness: EditingHarness) -> None:
    """Edits of both forms share a version. Reverting all of them gives the digest of the base model, and reverting one
    gives that of the version that never had it."""
    gated = harness.run_edit(**GATED)
    solved = harness.run_edit("Louvre", "city")
    assert [type(p).__name__ for p in harness.replica.patch(2).patches] == ["DensePatch", "GatedPatch"]
    digests = [harness.replica.attest_version(v) for v in range(3)]
    harness.revert(solved)
    assert harness.replica.attest_version(3) == digests[1]
    harness.revert(gated)
    assert harness.replica.attest_version(4) == digests[0]
    assert harness.services.ledger.verify()["ok"]


def test_report_names_the_tokens_at_which_a_gate_opens(harness: EditingHarness) -> None:
    """`opened` of each probe has the tokens at which the version differs from the base model at the edited layer: the
    end of the subject, and none without the subject. An edit in the weights has no list."""
    probes = {
        "paraphrase": ["People look at the {} now"],
        "neighborhood": [{"prompt": "Look at the moon", "target": "the"}],
    }
    result = harness.run_edit(**GATED, probes=probes)["result"]
    reported = [result["rewrite"], *result["paraphrase"], *result["neighborhood"]]
    assert [p["opened"] for p in reported] == [changed_tokens(harness, 1, p["prompt"]) for p in reported]
    assert [bool(p["opened"]) for p in reported] == [True, True, False]
    assert harness.run_edit("Louvre", "city")["result"]["rewrite"]["opened"] is None


def changed_tokens(harness: EditingHarness, version: int, text: str) -> list[str]:
    """Return the tokens of a text at which the output of the edited layer is another one at a version."""
    outputs: list[torch.Tensor] = []
    for v in (0, version):
        with (
            harness.replica.use_patch(harness.replica.patch(v)) as model,
            capture({0: model.down_proj(1)}, "output") as captured,
            torch.no_grad(),
        ):
            model.model(input_ids=torch.tensor([model.encode(text)[0]]))
        outputs.append(captured[0].flatten(0, -2).clone())
    differs = (outputs[0] != outputs[1]).any(1).tolist()
    ids = harness.model.encode(text)[0]
    return [harness.model.decode([i]) for i, changed in zip(ids, differs, strict=True) if changed]


def test_form_of_a_request_is_its_hyperparameter(harness: EditingHarness) -> None:
    """The field `form` and the hyperparameter `form` give the same edit, and the ledger records the form."""
    by_field = harness.run_edit(form="gated")
    harness.revert(by_field)
    by_hparam = harness.run_edit(**GATED)
    assert by_field["result"]["gate"] == by_hparam["result"]["gate"]
    assert harness.ledger_body(1)["hparams"] == harness.ledger_body(3)["hparams"]


def test_form_of_the_service_is_the_default(harness: EditingHarness) -> None:
    """With gated edits as the default of the service, an edit is gated unless its request says otherwise."""
    harness.context.recipe = RECIPE.with_form("gated")
    assert harness.run_edit()["result"]["gate"]
    assert harness.run_edit("Louvre", "city", form="weights")["result"]["gate"] is None


def test_another_worker_reads_gates_from_the_ledger(harness: EditingHarness) -> None:
    """A replica that computed none of the edits composes the same version from the database alone."""
    harness.run_edit(**GATED)
    harness.run_edit("Louvre", "city", **GATED)
    other = VersionedModel(tiny(), harness.worker_parts.ledger)
    assert other.digest(2) == harness.replica.attest_version(2)
    (stored,) = harness.database.engine.connect().exec_driver_sql("SELECT digest FROM gate_spaces").fetchall()
    (patch,) = other.patch(2).gated
    assert patch.rows.table.space.digest == stored[0]


def test_a_changed_gate_space_is_refused(harness: EditingHarness) -> None:
    """A space whose bytes are not those of its digest raises DigestMismatch."""
    harness.run_edit(**GATED)
    space = build_gate_space(harness.context.statistics[1], seed=7)
    with harness.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE gate_spaces SET data = ?", (space.serialize(),))
    with pytest.raises(DigestMismatch, match="gate space"):
        VersionedModel(tiny(), harness.worker_parts.ledger).digest(1)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"hparams": {"form": "gated", "layers": [0, 1]}}, "name one"),
        ({"hparams": {"form": "gated"}, "method": "memit"}, 'only the method "rome"'),
        ({"hparams": {"form": "gated", "compat": "meng2022"}}, "leave out"),
    ],
)
def test_an_edit_that_cannot_be_gated_is_refused(harness: EditingHarness, more: Any, words: str) -> None:
    """The error says what to change."""
    with pytest.raises(InvalidInput, match=words):
        harness.submit(**more)


def test_gated_edits_are_exported_as_an_edit_set_only(harness: EditingHarness, tmp_path: Path) -> None:
    """Formats of weights are refused with an error that names the edits, and the format that holds them. An edit set
    has nothing to solve."""
    edit = harness.run_edit(**GATED)
    for file_format in ("peft", "safetensors"):
        request = ExportRequest.model_validate({"format": file_format})
        with pytest.raises(InvalidInput, match=rf"{edit['id']}.*edit set \(format=edits\)"):
            harness.services.exports.submit(request, "somebody")
    with pytest.raises(InvalidInput, match=r"edit set \(--format edits\)"):
        write_model(harness.replica, 1, tmp_path)
    with pytest.raises(ValidationError, match="leave out `solve_gated`"):
        ExportRequest.model_validate({"format": "edits", "solve_gated": True})
    submitted = harness.services.exports.submit(ExportRequest(version="head", format="edits"), "somebody")
    file = harness.services.exports.open_file(submitted["id"])
    assert len(b"".join(file.chunks)) == file.size == submitted["result"]["bytes"]


def export_solved(harness: EditingHarness, version: int, file_format: str) -> tuple[bytes, dict[str, Any]]:
    file = io.BytesIO()
    request = WorkerExportRequest.model_validate(
        {"version": version, "format": file_format, "solve_gated": True}
    )
    manifest = run_to_completion(export_version(harness.replica, TEXTS, request, file))
    return file.getvalue(), manifest


def test_solved_export_has_the_weights_of_the_same_edit_in_the_weights(
    harness: EditingHarness, tmp_path: Path
) -> None:
    """A gated edit that an export solves gives the bytes of the same edit in the form of weights, as a file and as a
    model. The manifest has the difference from the gated version."""
    gated = harness.run_edit(**GATED)
    harness.revert(gated)
    harness.run_edit(form="weights")
    data, manifest = export_solved(harness, 1, "safetensors")
    expected = {harness.model.parameter_name(ref): t for ref, t in harness.replica.weights(3).items()}
    assert all(torch.equal(t, expected[name]) for name, t in safetensors_load(data).items())
    assert (manifest["solved"], manifest["version"]) == (1, 1)
    served, solved = (statement_logits(harness, version) for version in (1, 3))
    assert manifest["difference"]["export"] >= float((served - solved).abs().max()) * 0.9 > 0
    write_model(harness.replica, 1, tmp_path, solve_gated=True)
    whole = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(whole[name], t) for name, t in expected.items())
    assert "Gated edits that are solved into the weights: 1." in (tmp_path / "README.md").read_text()


def statement_logits(harness: EditingHarness, version: int) -> torch.Tensor:
    return logits_at(harness, version, "Look at the Eiffel Tower is")  # as the file is verified


def test_solved_adapter_is_that_of_the_same_edit_in_the_weights(harness: EditingHarness) -> None:
    """The adapter of a gated edit that is solved has the tensors of the adapter of the edit in the weights."""
    gated = harness.run_edit(**GATED)
    harness.revert(gated)
    harness.run_edit(form="weights")
    adapters = [zip_member(export_solved(harness, v, "peft")[0]) for v in (1, 3)]
    assert adapters[0] == adapters[1]


def zip_member(data: bytes, name: str = "adapter_model.safetensors") -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(name)


def test_solving_changes_an_export_only_if_an_edit_is_gated(harness: EditingHarness) -> None:
    """A version without gated edits has one export, whether or not gated edits were to be solved. A solved export is
    found again."""
    harness.run_edit("Louvre", "city")
    harness.run_edit(**GATED)
    plain, solving = (
        ExportRequest(version=1, format="safetensors", solve_gated=value) for value in (False, True)
    )
    exports = harness.services.exports
    assert exports.submit(plain, "somebody")["id"] == exports.submit(solving, "somebody")["id"]
    gated = solving.model_copy(update={"version": 2})
    assert exports.submit(gated, "somebody")["id"] == exports.submit(gated, "somebody")["id"]


# edits by GRACE

GRACE: dict[str, Any] = {
    "method": "grace",
    "hparams": {"layers": [1], "steps": 20, "learning_rate": 0.3, "stop_loss": 0.0, "radius": 0.05},
}


def test_an_edit_by_grace_acts_after_its_prompt(harness: EditingHarness) -> None:
    """The version of an edit by GRACE changes no weight. After its prompt the model says the new object, whatever is
    beside it in a batch, and a text in which nothing opens has the bytes of the base model."""
    base = logits_at(harness, 0, "Look at the moon")
    edit = harness.run_edit(**GRACE)
    assert (edit["status"], edit["version"]) == ("applied", 1)
    assert edit["result"]["scores"]["after"]["ES"] == 1.0
    assert edit["result"]["norm_ratio"] == {} and edit["result"]["layers"] == [1]
    ball = edit["result"]["ball"]
    assert ball["radius"] == ball["first_radius"] > 0 and ball["nearest"] is None
    assert harness.ledger_body(1)["hparams"]["radius"] == 0.05
    (patch,) = harness.replica.patch(1).patches
    assert isinstance(patch, CodebookPatch) and harness.replica.weights(1) == {}
    assert torch.equal(logits_at(harness, 1, "Look at the moon"), base)
    prompt = "Look at the Eiffel Tower"
    changed = logits_at(harness, 1, prompt)
    own = logits_at(harness, 0, prompt)
    assert torch.equal(changed[:-1], own[:-1]) and not torch.equal(changed[-1], own[-1])
    longer = logits_at(harness, 1, f"{prompt} and the moon")
    torch.testing.assert_close(longer[: len(changed)], changed, rtol=1e-4, atol=1e-5)


def test_company_changes_no_decision_of_a_codebook(harness: EditingHarness) -> None:
    """A row opens at the same positions alone, beside other rows, and with padding on either side."""
    harness.run_edit(**GRACE)
    texts = ["Look at the moon and the Louvre", "Look at the Eiffel Tower", "Eiffel Tower"]
    patch = harness.replica.patch(1)
    (codebook,) = (p.codebook for p in patch.patches if isinstance(p, CodebookPatch))
    model = harness.replica.base
    rows = [model.encode(text)[0] for text in texts]
    decisions = []
    for group in ([[r] for r in rows], [rows]):
        for side in ("left", "right"):
            opened: list[int] = []
            for batch_rows in group:
                batch = pad(batch_rows, model, side)
                with capture({0: model.down_proj(1)}, "input") as keys, torch.no_grad():
                    forward(model, batch)
                inputs = keys[0].reshape(-1, model.intermediate_size)[batch.mask.flatten().bool()]
                found = codebook.look_up(inputs)
                flags = torch.zeros(len(inputs), dtype=torch.int)
                if found is not None:
                    flags[found[0]] = 1
                opened += flags.tolist()
            decisions.append(opened)
    assert all(d == decisions[0] for d in decisions) and sum(decisions[0]) == 1


def test_all_forms_are_active_together_and_revert_exactly(harness: EditingHarness) -> None:
    """Edits of weights, gated ones and edits by GRACE share a version. Reverting one gives the digest of the version
    that never had it, in any order, and reverting all that of the base model. Another worker composes the same."""
    looked_up = harness.run_edit(**GRACE)
    second = harness.run_edit("Louvre", "in", **GRACE | {"hparams": GRACE["hparams"] | {"radius": 5.0}})
    gated = harness.run_edit("Colosseum", "is", **GATED)
    solved = harness.run_edit("Big Ben", "city", guard=GUARD_OFF)
    kinds = [type(p).__name__ for p in harness.replica.patch(4).patches]
    assert kinds == ["DensePatch", "GatedPatch", "CodebookPatch"]
    digests = [harness.replica.attest_version(v) for v in range(5)]
    assert VersionedModel(tiny(), harness.worker_parts.ledger).digest(4) == digests[4]
    for edit, expected in ((solved, digests[3]), (gated, digests[2]), (second, digests[1])):
        harness.revert(edit)
        assert harness.replica.attest_version(harness.replica.head()) == expected
    harness.revert(looked_up)
    assert harness.replica.attest_version(harness.replica.head()) == digests[0]
    assert harness.replica.patch(harness.replica.head()).patches == ()
    assert harness.services.ledger.verify()["ok"]


def test_replayed_radii_follow_the_active_edits(harness: EditingHarness) -> None:
    """With `compat` a later edit of another object nearby makes the ball of an earlier one smaller, and its revert
    gives the former radii back."""
    hparams = GRACE["hparams"] | {"compat": "hartvigsen2023", "radius": 50.0}
    harness.run_edit(method="grace", hparams=hparams, guard=GUARD_OFF)
    (before,) = harness.replica.patch(1).patches
    later = harness.run_edit("Louvre", "in", method="grace", hparams=hparams, guard=GUARD_OFF)
    (both,) = harness.replica.patch(2).patches
    harness.revert(later)
    (after,) = harness.replica.patch(3).patches
    assert isinstance(before, CodebookPatch) and isinstance(both, CodebookPatch)
    assert isinstance(after, CodebookPatch)
    assert both.codebook.radii[0] < before.codebook.radii[0]
    assert torch.equal(after.codebook.radii, before.codebook.radii)
    assert harness.replica.attest_version(3) == harness.replica.attest_version(1)


def test_a_generation_reads_a_codebook(harness: EditingHarness) -> None:
    """Tokens that are decoded with a cache are those of whole passes over the text."""
    harness.run_edit(**GRACE | {"hparams": GRACE["hparams"] | {"radius": 0.6}}, guard=GUARD_OFF)
    patch, model = harness.replica.patch(1), harness.replica.base
    row = new_sequence(model, "Look at the Eiffel Tower", Sampling(max_new_tokens=6, temperature=0))
    with harness.replica.use_patch(patch):
        batch = DecodingBatch(model, [row])
        while len(batch):
            batch.step()
    ids = model.encode("Look at the Eiffel Tower")[0]
    for _ in range(len(row.output_ids)):
        with harness.replica.use_patch(patch), torch.no_grad():
            ids = [*ids, int(model.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    assert ids[-len(row.output_ids) :] == row.output_ids


def test_edits_by_grace_are_exported_as_an_edit_set_only(harness: EditingHarness, tmp_path: Path) -> None:
    """Formats of weights are refused with an error that names the edits, and the format that holds them."""
    edit = harness.run_edit(**GRACE)
    for file_format in ("peft", "safetensors"):
        request = ExportRequest.model_validate({"format": file_format})
        with pytest.raises(InvalidInput, match=rf"edits by GRACE.*{edit['id']}.*edit set \(format=edits\)"):
            harness.services.exports.submit(request, "somebody")
    with pytest.raises(InvalidInput, match=r"edit set \(--format edits\)"):
        write_model(harness.replica, 1, tmp_path)
    submitted = harness.services.exports.submit(ExportRequest(version="head", format="edits"), "somebody")
    file = harness.services.exports.open_file(submitted["id"])
    assert len(b"".join(file.chunks)) == file.size


# edits from one backward pass

ULTRAEDIT: dict[str, Any] = {
    "method": "ultraedit",
    "hparams": {"layers": [0, 1], "eta": 3e-3, "ridge": 0.1, "strengths": [1.0]},
}


def test_edits_from_one_backward_pass_revert_exactly(harness: EditingHarness) -> None:
    """Edits by UltraEdit, with objects of one token and of several, stand beside an edit by ROME. The ledger has the
    digests of both kinds of statistics, the report the norm and the capacity of each layer; another worker composes
    the same bytes, and reverts in any order give those of the versions without the edit."""
    one = harness.run_edit(**ULTRAEDIT, guard=GUARD_OFF)
    assert one["status"] == "applied" and one["result"]["optimisation"]["steps"] == 1
    assert set(one["result"]["norm_ratio"]) == set(one["result"]["capacity"]) == {"0", "1"}
    assert one["result"]["rewrite"]["after"]["new"] > one["result"]["rewrite"]["before"]["new"]
    body = harness.ledger_body(1)
    assert set(body["statistics"]) == {"0", "1", "gradients.0", "gradients.1"}
    assert body["subject_token"] is None
    several = harness.run_edit("Louvre", "in the city", **ULTRAEDIT, guard=GUARD_OFF)
    assert several["result"]["capacity"]["0"] < 1
    beside = harness.run_edit("Big Ben", "city", guard=GUARD_OFF)
    digests = [harness.replica.attest_version(v) for v in range(4)]
    assert VersionedModel(tiny(), harness.worker_parts.ledger).digest(3) == digests[3]
    harness.revert(one)
    harness.revert(beside)
    alone = harness.replica.attest_version(harness.replica.head())
    harness.revert(several)
    assert harness.replica.attest_version(harness.replica.head()) == digests[0]
    assert alone not in digests
    assert harness.services.ledger.verify()["ok"]
