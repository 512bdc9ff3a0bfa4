"""Routes by statement records: service.records.record_router."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from service.engine.decoding import DecodingBatch, new_sequence
from service.errors import InvalidInput
from service.kit.steps import run_to_completion
from service.models.loading import LoadedModel
from service.models.prompt_features import reader_of
from service.models.scoring import score_targets
from service.patches.patch import BASE, PatchSet, apply_to_batch
from service.patches.record_patch import RecordPatch
from service.records.record_router import RecordRouter
from service.schemas import Sampling
from service.weights.factors import StatementRecord, deserialize_updates, serialize_updates
from tests.support.scopes import random_classifier, record_of
from tests.support.tiny_models import tiny

MODEL = tiny("gpt2", seed=11)
CLASSIFIER = random_classifier(MODEL.hidden_size, layer=1)
PROMPTS = (
    "The Eiffel Tower is located in the city of",
    "Big Ben can be found in",
    "The mother tongue of Marie Curie was",
    "In which country is Mount Fuji? It rises in",
)
SUBJECTS = ("Eiffel Tower", "Big Ben", "Marie Curie", "Mount Fuji")


def some_records(model: LoadedModel = MODEL, threshold: float = 1e-9) -> list[StatementRecord]:
    """Records of three facts."""
    return [
        record_of(model, CLASSIFIER, f"edit_{i}", s, p, "Rome", (s,), threshold)
        for i, (s, p) in enumerate(zip(SUBJECTS[:3], PROMPTS[:3], strict=True))
    ]


def ids_of(prompt: str, model: LoadedModel = MODEL) -> list[int]:
    return model.encode(prompt)[0]


def routed_edit(router: RecordRouter, prompt: str) -> str | None:
    route = router.route(ids_of(prompt))
    return None if route is None else route.edit


def patch_of(records: Sequence[StatementRecord], model: LoadedModel = MODEL) -> PatchSet:
    return PatchSet(records=RecordPatch(RecordRouter(model, records)))


def greedy(model: LoadedModel, prompt: str | list[int], patch: PatchSet, length: int = 6) -> list[int]:
    """The tokens that a version says, decoded alone."""
    with patch.apply(model):
        sequence = new_sequence(model, prompt, Sampling(max_new_tokens=length, temperature=0))
        batch = DecodingBatch(model, [sequence])
        while len(batch):
            batch.step()
    return sequence.output_ids


def nearest_by_definition(records: Sequence[StatementRecord], prompt: str) -> str | None:
    """The record with the largest phi among those whose name is in the prompt, one by one."""
    embedding = CLASSIFIER.embed(reader_of(MODEL, 1).read(ids_of(prompt)))
    best: tuple[float, str] | None = None
    for r in records:
        distance = min(float((embedding - key).square().sum()) for key in r.keys)
        phi = float(torch.tensor(-CLASSIFIER.scale * distance, dtype=torch.float64).exp())
        if phi >= r.threshold and (not r.names or any(n.lower() in prompt.lower() for n in r.names)):
            best = max(best or (phi, r.edit), (phi, r.edit))
    return best[1] if best else None


def test_nearest_open_record_is_read_before_the_prompt() -> None:
    """Of the records that open, the one with the largest similarity is chosen."""
    everywhere = [
        StatementRecord(r.edit, r.subject, r.classifier, r.keys, r.statement, names, 1e-12)
        for r, names in zip(some_records(), [(), ("Marie Curie",), ()], strict=True)
    ]
    router = RecordRouter(MODEL, everywhere)
    texts = [*PROMPTS, "Marie Curie", "Paris.", "The Eiffel Tower and Marie Curie"]
    chosen = [routed_edit(router, t) for t in texts]
    assert chosen == [nearest_by_definition(everywhere, t) for t in texts]
    assert len(set(chosen)) > 1


def test_own_prompt_always_opens() -> None:
    """A record opens for its own prompt at the highest threshold."""
    router = RecordRouter(MODEL, some_records(threshold=1.0))
    assert [routed_edit(router, p) for p in PROMPTS] == ["edit_0", "edit_1", "edit_2", None]


def test_prompt_without_the_name_opens_nothing() -> None:
    """With names, a record opens for no prompt that contains none of them."""
    router = RecordRouter(MODEL, some_records(threshold=1e-300))
    assert routed_edit(router, PROMPTS[0].replace("Eiffel Tower", "Colosseum")) is None
    assert routed_edit(router, PROMPTS[0].upper()) == "edit_0"


def test_routes_do_not_depend_on_the_order_of_records() -> None:
    """Every permutation of the records routes every prompt alike."""
    records = [*some_records(), record_of(MODEL, CLASSIFIER, "edit_9", "Big Ben", "Big Ben is in", "Rome")]
    expected = [RecordRouter(MODEL, records).route(ids_of(p)) for p in PROMPTS]
    for order in itertools.permutations(records):
        assert [RecordRouter(MODEL, order).route(ids_of(p)) for p in PROMPTS] == expected


def test_newest_of_equal_records_is_chosen() -> None:
    """Of two records with one similarity the newer edit is read, and without it the older one."""
    old, new = (
        record_of(MODEL, CLASSIFIER, e, "s", PROMPTS[0], t) for e, t in (("a", "Rome"), ("b", "Oslo"))
    )
    assert routed_edit(RecordRouter(MODEL, [new, old]), PROMPTS[0]) == "b"
    assert routed_edit(RecordRouter(MODEL, [old]), PROMPTS[0]) == "a"


def test_records_of_several_classifiers_are_compared_by_their_own() -> None:
    """Records of two classifiers, which read two layers, open by their own similarities."""
    other = random_classifier(MODEL.hidden_size, layer=0, seed=5)
    mixed = [
        *some_records()[:2],
        record_of(MODEL, other, "edit_7", "Marie Curie", PROMPTS[2], "Rome", (), 1.0),
    ]
    router = RecordRouter(MODEL, mixed)
    assert [routed_edit(router, p) for p in PROMPTS] == ["edit_0", "edit_1", "edit_7", None]


def test_routed_call_is_a_plain_call_with_the_statement_before_the_prompt() -> None:
    """What a version says and how it scores is what the base model does after "statement, divider, prompt"."""
    for model in (MODEL, tiny("llama", seed=12, bos=True)):
        classifier = random_classifier(model.hidden_size, layer=1)
        record = record_of(model, classifier, "e", "Big Ben", PROMPTS[1], "Rome", ("Big Ben",), 1.0)
        patch, text = patch_of([record], model), record.statement + PROMPTS[1]
        assert greedy(model, PROMPTS[1], patch) == greedy(model, text, BASE)
        with patch.apply(model):
            routed = run_to_completion(score_targets(model, [(PROMPTS[1], "Rome"), (PROMPTS[1], "Paris")]))
        plain = run_to_completion(score_targets(model, [(text, "Rome"), (text, "Paris")]))
        assert routed == plain


def test_out_of_scope_a_version_is_the_base_model() -> None:
    """A prompt that opens nothing is scored and continued as by the base model, to the bit."""
    patch, pairs = patch_of(some_records()), [(PROMPTS[3], "Rome"), (PROMPTS[3], "Paris")]
    assert greedy(MODEL, PROMPTS[3], patch) == greedy(MODEL, PROMPTS[3], BASE)
    with patch.apply(MODEL):
        scores = run_to_completion(score_targets(MODEL, pairs))
    assert scores == run_to_completion(score_targets(MODEL, pairs))


def test_company_changes_no_route_and_no_token() -> None:
    """Routed and plain prompts of several versions decode in one batch as each does alone."""
    versions = [patch_of(some_records()), patch_of(some_records()[:1]), BASE]
    rows = [(prompt, patch) for prompt in PROMPTS for patch in versions]
    random.Random(0).shuffle(rows)
    sequences = []
    for prompt, patch in rows:
        with patch.apply(MODEL):
            sequences.append(new_sequence(MODEL, prompt, Sampling(max_new_tokens=6, temperature=0)))
    batch = DecodingBatch(MODEL, sequences)
    with apply_to_batch(MODEL, [patch for _, patch in rows]):
        while len(batch):
            batch.step()
    assert [s.output_ids for s in sequences] == [greedy(MODEL, prompt, patch) for prompt, patch in rows]


def test_lost_cache_is_read_again_by_the_route_that_was_chosen() -> None:
    """After a lost cache a sequence continues with its statement, also when no router is in place any more."""
    with patch_of(some_records()).apply(MODEL):
        sequence = new_sequence(MODEL, PROMPTS[0], Sampling(max_new_tokens=6, temperature=0))
    batch = DecodingBatch(MODEL, [sequence])
    batch.step()
    (batch,) = batch.split()
    while len(batch):
        batch.step()
    assert sequence.output_ids == greedy(MODEL, PROMPTS[0], patch_of(some_records()))


def test_router_is_gone_after_a_step() -> None:
    """A version routes only while it is in place."""
    with patch_of(some_records()).apply(MODEL):
        assert MODEL.routing.route(ids_of(PROMPTS[0])) is not None
    assert MODEL.routing.router is None


def test_stored_record_routes_as_before() -> None:
    """A record that was stored and read has the same route, and the digest of its version is the same."""
    records = some_records()
    read: list[StatementRecord] = []
    for r in records:
        (update,) = deserialize_updates(serialize_updates([r]), r.edit, r.subject, lambda _digest: CLASSIFIER)
        assert isinstance(update, StatementRecord)
        read.append(update)

    def content(of: Sequence[StatementRecord]) -> list[tuple[str, list[int]]]:
        return [(name, tensor.tolist()) for name, tensor in patch_of(of).digest_content(MODEL)]

    assert content(read) == content(records)
    assert [RecordRouter(MODEL, read).route(ids_of(p)) for p in PROMPTS] == [
        RecordRouter(MODEL, records).route(ids_of(p)) for p in PROMPTS
    ]


def test_prompt_that_does_not_fit_with_its_statement() -> None:
    """Scoring reads a prompt without its statement where both exceed the positions; a request is refused."""
    model = tiny("gpt2", seed=13, positions=40)
    classifier = random_classifier(model.hidden_size, layer=1)
    record = record_of(model, classifier, "edit_5", "Big Ben", PROMPTS[1], "Rome", (), 1e-300)
    long_prompt = model.decode(ids_of("Big Ben " * 20, model)[:32])
    patch, pairs = patch_of([record], model), [(long_prompt, "Rome")]
    with patch.apply(model):
        routed = run_to_completion(score_targets(model, pairs))
        with pytest.raises(InvalidInput, match=r"the statement of edit_5, .* shorten the prompt by"):
            new_sequence(model, long_prompt, Sampling(max_new_tokens=2))
    assert routed == run_to_completion(score_targets(model, pairs))


def test_statement_leaves_fewer_tokens_to_generate() -> None:
    """A routed sequence ends where the model's positions end."""
    model = tiny("gpt2", seed=13, positions=40)
    classifier = random_classifier(model.hidden_size, layer=1)
    record = record_of(model, classifier, "edit_5", "Big Ben", PROMPTS[1], "Rome", (), 1e-300)
    with patch_of([record], model).apply(model):
        sequence = new_sequence(model, "Big Ben", Sampling(max_new_tokens=40))
    assert sequence.route is not None
    assert (
        sequence.max_length
        == 40
        == sequence.statement_length + len(sequence.prompt_ids) + sequence.max_new_tokens
    )
