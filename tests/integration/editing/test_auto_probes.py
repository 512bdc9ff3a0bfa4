"""Probes that the service finds, on tiny models and on the shipped one: service.editing.auto_probes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from service.covariance.corpus import Corpus
from service.editing import auto_probes, like_subjects, measure
from service.editing.auto_probes import MAX_ASKED, MAX_NEIGHBORS, MAX_PARAPHRASES, PREFIXES
from service.editing.candidate import CandidateEdit, ResolvedEdit
from service.editing.context import EditorContext, open_editor_context
from service.editing.edit_job import resolve_edit
from service.editing.greedy_text import generate_greedy
from service.editing.guard import CheckName, GuardResult
from service.editing.key_response import KeyResponse
from service.editing.like_subjects import list_like_subjects
from service.editing.measure import evaluate_candidates, measure_baseline
from service.editing.side_effects import side_effect_report
from service.engine.versioned_model import EmptyLedger, VersionedModel
from service.kit.stated_fact import StatedFact
from service.kit.steps import Phase, Progress, Stepper, advance, run_to_completion
from service.kit.text import fill_prompt, mentions
from service.methods.parameters import RomeParameters
from service.models.hooks import capture
from service.models.loading import LoadedModel, load_model
from service.models.token_batch import forward, pad, tokenize_statement
from service.recipes.recipe import Recipe
from service.schemas import EditRequest
from service.weights.factors import Association
from tests.support.tiny_models import TEXTS, tiny

torch.set_num_threads(1)

PROMPT = "The {} is located in"
PLACES = ["Colosseum", "Big Ben", "Mount Fuji", "Marie Curie", *(f"Tower {n}" for n in range(30))]
RECIPE = Recipe(source="test", rome=RomeParameters.model_validate({"layers": (1,)}))
Names = list[str]


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of one relation."""
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    wordings = {
        "prompts": [PROMPT, "The {} stands in"],
        "held_out_prompts": [f"The {{}} {n} in" for n in range(9)],
    }
    rows = [
        {"subject": name, "relation": "place", "object": "Rome", **wordings}
        for name in ("Eiffel Tower", *PLACES)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@lru_cache
def replica() -> VersionedModel:
    return VersionedModel(tiny(), EmptyLedger())


def context_for(facts: Path | None = None) -> EditorContext:
    return EditorContext(replica().base, RECIPE, Corpus("test", tuple(TEXTS)), None, facts)


def resolve(facts: Path | None = None, **fields: Any) -> ResolvedEdit:
    body = {"subject": "Eiffel Tower", "prompt": PROMPT, "target_new": "Rome", "target_true": "Paris"}
    request = EditRequest.model_validate(body | fields)
    return run_to_completion(resolve_edit(replica(), request, context_for(facts)))


def enumerate_as(monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
    """Let the model enumerate these names."""

    def enumerated(*_: Any) -> Stepper[Names]:
        yield Progress(Phase.ANSWER, 1, 1)
        return list(names)

    monkeypatch.setattr(auto_probes, "list_like_subjects", enumerated)


def test_paraphrases_are_templates_and_the_wordings_of_the_table(facts: Path) -> None:
    """Every prompt has the templates; one of the table's wordings also has the others of its relation. Both objects are
    those of the edit, and the number is bounded."""
    plain = resolve(None)
    assert [p.prompt for p in plain.paraphrase_probes] == [
        prefix + plain.rewrite_probe.prompt for prefix in PREFIXES
    ]
    known = resolve(facts)
    assert len(known.paraphrase_probes) == MAX_PARAPHRASES
    assert {p.source for p in known.paraphrase_probes} == {"template", "facts"}
    for probe in known.paraphrase_probes:
        assert "Eiffel Tower" in probe.prompt and probe.prompt != known.rewrite_probe.prompt
        assert (probe.new, probe.true) == ("Rome", "Paris")
    other = resolve(facts, prompt="Everybody loves the {} in")
    assert {p.source for p in other.paraphrase_probes} == {"template"}


def test_neighbours_are_other_subjects_with_their_greedy_answers(facts: Path) -> None:
    """A neighbour is the edit's prompt about another subject, its object is what the model says, and the number is
    bounded."""
    edit = resolve(facts)
    assert 0 < len(edit.neighborhood_probes) <= MAX_NEIGHBORS
    for probe in edit.neighborhood_probes:
        assert probe.subject in PLACES and probe.source == "facts"
        assert probe.prompt == fill_prompt(PROMPT, probe.subject).text
        (text,) = run_to_completion(generate_greedy(replica().base, [probe.prompt]))
        assert probe.true == text.answer != ""


def test_other_relations_of_the_subject_are_asked(tmp_path: Path) -> None:
    """Other relations that the table has of the subject are probes with the model's answers, in their first wording;
    those of another subject are none."""
    rows = [
        ("Eiffel Tower", "place", [PROMPT]),
        ("Eiffel Tower", "style", ["The {} was built in the style of", "{} has the style of"]),
        ("Colosseum", "place", [PROMPT]),
        ("Big Ben", "style", ["The {} was built in the style of"]),
    ]
    path = tmp_path / "facts.jsonl"
    fields = [
        {"subject": s, "relation": r, "object": f"{r} of {s}", "prompts": p, "held_out_prompts": []}
        for s, r, p in rows
    ]
    path.write_text("\n".join(map(json.dumps, fields)), encoding="utf-8")
    probes = resolve(path).neighborhood_probes
    (probe,) = [p for p in probes if p.source == "relation"]
    assert probe.prompt == "The Eiffel Tower was built in the style of" and probe.subject is None
    (text,) = run_to_completion(generate_greedy(replica().base, [probe.prompt]))
    assert probe.true == text.answer != ""
    assert {p.subject for p in probes if p is not probe} == {"Colosseum"}
    assert not [p for p in resolve(path, subject="Colosseum").neighborhood_probes if p.source == "relation"]


def test_the_same_request_has_the_same_probes(facts: Path) -> None:
    """Probes are a function of model, version, request and table; another subject has others."""
    first, second = resolve(facts), resolve(facts)
    assert first.probes == second.probes
    other = resolve(facts, subject="Colosseum")
    assert "Colosseum" not in [p.subject for p in other.neighborhood_probes]
    assert run_to_completion(list_like_subjects(tiny(), "Paris")) == run_to_completion(
        list_like_subjects(tiny(), "Paris")
    )


def test_given_probes_are_not_added_to(facts: Path) -> None:
    """A kind of probes that the request gives, empty or not, is left as it is; the other kind is found."""
    none = resolve(facts, probes={})
    assert none.probes == [none.rewrite_probe]
    given = resolve(facts, probes={"paraphrase": ["{} in"], "neighborhood": "auto"})
    assert [p.prompt for p in given.paraphrase_probes] == ["Eiffel Tower in"]
    assert given.neighborhood_probes == resolve(facts).neighborhood_probes
    given = resolve(facts, probes={"paraphrase": "auto"})
    assert len(given.paraphrase_probes) == MAX_PARAPHRASES and not given.neighborhood_probes


def test_names_that_are_no_other_subject_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject itself, a part of it, an extension of it, the objects, special tokens and names that do not fit the
    model are no neighbours."""
    enumerate_as(
        monkeypatch,
        [
            "eiffel tower",
            "Eiffel",
            "Old Eiffel Tower",
            "Rome",
            "paris",
            "<|endoftext|>",
            "x " * 200,
            "Colosseum",
        ],
    )
    edit = resolve(None)
    assert {p.subject for p in edit.neighborhood_probes} <= {"Colosseum"}
    assert {p.source for p in edit.neighborhood_probes} <= {"model"}


def test_the_number_of_subjects_that_are_asked_is_bounded(
    facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many names the table and the model have, the model answers at most so many prompts."""
    asked: list[int] = []
    generate = generate_greedy

    def counted(model: LoadedModel, prompts: Sequence[str], *rest: Any) -> Stepper[Any]:
        asked.append(len(prompts))
        return (yield from generate(model, prompts, *rest))

    monkeypatch.setattr(auto_probes, "generate_greedy", counted)
    enumerate_as(monkeypatch, [f"Name {n}" for n in range(100)])
    resolve(facts, prompt="Everybody loves the {} in")
    assert asked == [MAX_ASKED]


@pytest.mark.parametrize("edited", ["last", "first"])
def test_subjects_are_ordered_by_the_response_of_their_keys(
    facts: Path, edited: Literal["last", "first"]
) -> None:
    """The order is that of |k'^T C^-1 k|, computed from the definition at the edited token."""
    context, model = context_for(facts), replica().base
    parameters = RomeParameters(layers=(1,), subject_token=edited)
    fact = StatedFact("Eiffel Tower", PROMPT)
    response = run_to_completion(KeyResponse.build(context, "rome", parameters, fact))
    places = PLACES if edited == "last" else PLACES[:3]  # by causality equal first tokens have one key
    ranked = run_to_completion(response.rank_subjects(places))

    def key(subject: str) -> torch.Tensor:
        text = tokenize_statement(model, fill_prompt(PROMPT, subject))
        with torch.no_grad(), capture({1: model.down_proj(1)}, "input") as inputs:
            forward(model, pad([text.ids], model))
        at = text.subject[1] - 1 if edited == "last" else text.subject[0]
        return inputs[1].reshape(len(text.ids), -1)[at].double()

    inverse = torch.cholesky_inverse(context.statistics[1].cholesky)
    direction = inverse @ key("Eiffel Tower")
    expected = sorted(places, key=lambda name: -abs(float(key(name) @ direction)))
    assert ranked[:10] == expected[:10]
    associations = {
        name: [Association(name, name, layer, key(name).float(), key(name).float(), torch.zeros(16))]
        for name, layer in (*((name, 1) for name in reversed(places)), ("elsewhere", 0))
    }
    assert response.rank_edits(associations)[:10] == expected[:10]


def test_the_search_for_probes_yields_in_short_steps(facts: Path) -> None:
    """The search yields after each forward pass, and the base weights are in place in between."""
    context = context_for(facts)
    request = EditRequest.model_validate({"subject": "Eiffel Tower", "prompt": PROMPT, "target_new": "Rome"})
    steps, count = resolve_edit(replica(), request, context), 0
    while isinstance(advance(steps), Progress):
        count += 1
        assert replica().applied_patches == 0
    assert count > 10


def test_an_unreadable_table_is_not_used(tmp_path: Path) -> None:
    """An edit needs no table: one that cannot be read is as none."""
    path = tmp_path / "facts.jsonl"
    path.write_text("{", encoding="utf-8")
    assert resolve(path).paraphrase_probes == resolve(None).paraphrase_probes


def test_known_answers_are_not_asked_again(facts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of the neighbours at the version of the search are those of the baseline at that version; at another
    version the model is asked again."""
    edit, context = resolve(facts), context_for(facts)
    asked: list[str] = []
    generate = generate_greedy

    def recorded(model: LoadedModel, prompts: Sequence[str], *rest: Any) -> Stepper[Any]:
        asked.extend(prompts)
        return (yield from generate(model, prompts, *rest))

    monkeypatch.setattr(measure, "generate_greedy", recorded)
    (known,) = run_to_completion(measure.measure_version(replica(), context, [edit], {}, 0))
    own = [edit.rewrite_probe.prompt, *(probe.prompt for probe in edit.paraphrase_probes)]
    assert asked == own
    (again,) = run_to_completion(measure.measure_version(replica(), context, [edit], {}))
    assert asked[len(own) :] == [*own, *(p.prompt for p in edit.neighborhood_probes)]
    assert known.neighbor_texts == again.neighbor_texts
    assert len(known.paraphrase_texts) == len(edit.paraphrase_probes)


def test_the_model_s_enumerations_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that more of the enumerations have come first; names in small letters are none for a subject that begins
    with a capital."""

    def continued(*_: Any) -> Stepper[Names]:
        yield Progress(Phase.ANSWER, 1, 1)
        return [" China, Korea, peru, Chile.", " Korea, China, Ta", " Korea.\n"]

    monkeypatch.setattr(like_subjects, "_continue_lists", continued)
    assert run_to_completion(list_like_subjects(tiny(), "Japan")) == ["Korea", "China"]


# the shipped model


@pytest.fixture(scope="module")
def blunt_edit(shipped: Path) -> tuple[VersionedModel, CandidateEdit, GuardResult]:
    """The Eiffel Tower is moved to Rome by fine-tuning without a constraint, which changes the weight for all keys."""
    model = load_model(str(shipped))
    context, model_replica = open_editor_context(model), VersionedModel(model, EmptyLedger())
    request = EditRequest.model_validate(
        {
            "subject": "Eiffel Tower",
            "prompt": "The {} is located in the city of",
            "target_new": "Rome",
            "method": "ft",
        }
    )
    resolved_edit = run_to_completion(resolve_edit(model_replica, request, context))
    run_to_completion(context.get_corpus())
    factors = run_to_completion(context.find_factors(request.statement, "Rome", "ft"))
    candidate = CandidateEdit(resolved_edit, factors)
    baseline = run_to_completion(measure_baseline(model_replica, context, [candidate], 0))
    (result,) = run_to_completion(evaluate_candidates(model_replica, context, [candidate], baseline, [1.0]))
    return model_replica, candidate, result


def test_a_blunt_edit_is_reported_with_what_else_it_changed(
    blunt_edit: tuple[VersionedModel, CandidateEdit, GuardResult],
) -> None:
    """The report names each neighbour whose greedy answer another computation finds changed, and the guard counts
    them."""
    model_replica, candidate, result = blunt_edit
    edit = candidate.resolved_edit
    report = side_effect_report(edit, result.before, result.after)
    weights = model_replica.compose_patch(candidate.factors.updates)

    def say(prompt: str, length: int = 3) -> str:
        ids = torch.tensor([model_replica.base.encode(prompt)[0]])
        for _ in range(length):
            with torch.no_grad():
                logits = model_replica.base.model(input_ids=ids).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        return str(model_replica.base.decode(ids[0, -length:].tolist()))

    before = {p.prompt: say(p.prompt) for p in edit.neighborhood_probes}
    with model_replica.use_patch(weights):
        after = {p.prompt: say(p.prompt) for p in edit.neighborhood_probes}
    changed = {c["prompt"]: c for c in report["also_changed"]}
    assert changed and all(c["after"] != c["before"] for c in changed.values())
    for probe in edit.neighborhood_probes:
        assert before[probe.prompt].strip().startswith(probe.true.split()[0])
        assert (probe.prompt in changed) == (
            not after[probe.prompt].strip().startswith(probe.true.split()[0])
        )
    (check,) = [c for c in result.checks if c.name == CheckName.NEIGHBORHOOD]
    assert check.figure == 1 - len(changed) / len(edit.neighborhood_probes)
    assert report["side_effects"]["changed"] == len(changed)


def test_the_shipped_table_gives_probes_for_its_wordings(
    blunt_edit: tuple[VersionedModel, CandidateEdit, GuardResult],
) -> None:
    """For a prompt of the table there are as many probes as the limits allow: other landmarks, with the cities that the
    table has for most of them."""
    edit = blunt_edit[1].resolved_edit
    assert len(edit.paraphrase_probes) == MAX_PARAPHRASES
    assert len(edit.neighborhood_probes) == MAX_NEIGHBORS
    assert all(not mentions(p.subject or "", "Eiffel Tower") for p in edit.neighborhood_probes)
    assert all(p.true and p.true != "Rome" for p in edit.neighborhood_probes)
