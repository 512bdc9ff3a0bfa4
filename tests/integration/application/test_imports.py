"""Export of edits from one ledger and import into another, on each wiring: service.application.edit_set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from service.application.edit_set import FORMAT, read_edit_set
from service.db.models import Job, JobArtifact, StoredGateSpace
from service.editing import edit_job
from service.errors import InvalidInput
from service.kit.safetensors_io import read_safetensors
from service.kit.steps import Stepper
from service.models.loading import LoadedModel
from service.schemas import ExportRequest
from service.weights.gate_space import GateSpace
from tests.support import wirings
from tests.support.stepped_service import Resource, SteppedService
from tests.support.tiny_models import tiny
from workers.model_info import model_info

BuildPlace = Callable[..., SteppedService]  # the argument is the model; default: the tiny model


@pytest.fixture(params=wirings.ALL_WIRINGS)
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BuildPlace]:
    """Return a function that creates services with their own stores, by default with one model."""
    places: list[SteppedService] = []

    def built(model: LoadedModel | None = None) -> SteppedService:
        stores = wirings.store_settings(request)
        places.append(SteppedService(tmp_path / str(len(places)), model or tiny(), **stores))
        return places[-1]

    yield built
    for place in places:
        place.container.close()


@pytest.fixture
def source(build: BuildPlace) -> SteppedService:
    """A service with four active edits of three methods. One superseded another, and one was committed after
    a revert."""
    place = build()
    place.edit("Eiffel Tower", "is")
    place.edit("Eiffel Tower", "in")
    reverted = place.edit("Big Ben", "is")
    place.edit("Colosseum", "on", probes={"paraphrase": ["What about the {}"]})
    place.edit("Mount Fuji", "in", method="ft-l", hparams={"steps": 3})
    place.services.edits.revert(reverted, "key:alice")
    place.edit("Louvre", "is", method="memit")
    return place


@pytest.fixture
def destination(build: BuildPlace, source: SteppedService, monkeypatch: pytest.MonkeyPatch) -> SteppedService:
    """Another service, which fails if it computes the factors of an edit."""
    place = build()

    def search(*_: Any) -> Stepper[Any]:
        raise AssertionError("an imported edit is searched for")

    monkeypatch.setattr(edit_job, "find_batch_factors", search)
    return place


def test_the_weights_are_the_same_bytes(source: SteppedService, destination: SteppedService) -> None:
    """After an import the destination has the state and digest of the source, and its ledger records the
    origin and provenance of each edit."""
    data = source.export_edit_set()
    created, already_present = destination.services.imports.submit(data, "key:bob")
    assert len(created) == 4 and already_present == []
    destination.run_queued_edits()
    assert [destination.services.edits.get(e["id"])["status"] for e in created] == ["applied"] * 4
    assert destination.replica.digest(4) == source.replica.digest(source.worker_parts.ledger.head())
    assert destination.state() == source.state()
    assert destination.services.ledger.verify()["ok"]
    origin = destination.services.edits.get(created[0]["id"])["origin"]
    entry, theirs = destination.services.ledger.page()["items"][0], source.services.ledger.page()["items"][1]
    assert (
        origin["edit"] == theirs["edit_id"] and origin["actor"] == "key:alice" and entry["actor"] == "key:bob"
    )
    assert entry["body"]["origin"] == origin and origin["entry"] == theirs["hash"]
    for name in (
        "hparams",
        "statistics",
        "corpus",
        "libraries",
        "strength",
        "factors_sha256",
        "resolved_true",
        "resolved_separator",
        "subject_token",
    ):
        assert entry["body"][name] == theirs["body"][name], name
    assert destination.count(JobArtifact) == 0


def test_no_probes_are_found_for_an_import(source: SteppedService, destination: SteppedService) -> None:
    """An imported edit has the probes that its request gave; its report says that side effects were not measured."""
    assert source.services.edits.page()["items"][0]["probes"] == "auto"
    created, _ = destination.services.imports.submit(source.export_edit_set(), "key:bob")
    destination.run_queued_edits()
    edits = {e["subject"]: destination.services.edits.get(e["id"]) for e in created}
    none: Resource = {"paraphrase": [], "neighborhood": []}
    assert edits["Louvre"]["probes"] == none
    assert edits["Colosseum"]["probes"] == none | {"paraphrase": ["What about the {}"]}
    assert not edits["Louvre"]["result"]["side_effects"]["measured"]
    assert edits["Louvre"]["result"]["paraphrase"] == []


def test_batched_import_commits_the_same_bytes(source: SteppedService, destination: SteppedService) -> None:
    """Imported edits that run as one batch give the digest of the source."""
    destination.services.imports.submit(source.export_edit_set(), "key:bob")
    destination.run_queued_edits(as_group=True)
    assert destination.replica.digest(4) == source.replica.digest(source.worker_parts.ledger.head())


def test_an_edit_to_the_models_own_answer_is_imported(build: BuildPlace) -> None:
    """An edit that was applied while another edit had changed the answer is imported where the model says its object
    by itself."""
    place, other = build(), build()
    changed = place.edit("Colosseum", "in", prompt="We know the {}")
    place.edit("Colosseum", "is", prompt="We know the {}")
    place.services.edits.revert(changed, "key:alice")
    created, _ = other.services.imports.submit(place.export_edit_set(), "key:bob")
    other.run_queued_edits()
    assert [other.services.edits.get(e["id"])["status"] for e in created] == ["applied"]


def test_an_older_version_is_exported_as_it_was(source: SteppedService, destination: SteppedService) -> None:
    """An older version is exported as the same bytes each time, and its import gives the digest of that
    version."""
    data = source.export_edit_set(1)
    assert data == source.export_edit_set(1)
    destination.services.imports.submit(data, "key:bob")
    destination.run_queued_edits()
    assert destination.replica.digest(1) == source.replica.digest(1) != source.replica.digest(2)


def test_import_is_idempotent(source: SteppedService, destination: SteppedService) -> None:
    """A repeated import creates no edits while the first ones are queued or applied, nor does an import into
    the source. A reverted edit is imported again."""
    data = source.export_edit_set()
    first, _ = destination.services.imports.submit(data, "key:bob")
    ids = [e["id"] for e in first]
    for _ in range(2):
        again, already_present = destination.services.imports.submit(data, "key:bob")
        assert [e["id"] for e in again] == already_present == ids
        destination.run_queued_edits()
    assert destination.worker_parts.ledger.head() == 4
    assert len(source.services.imports.submit(data, "key:bob")[1]) == 4
    destination.services.edits.revert(ids[1], "key:bob")
    third, already_present = destination.services.imports.submit(data, "key:bob")
    assert [e["id"] for e in third][1] not in ids and already_present == [ids[0], *ids[2:]]


def test_imported_edits_can_be_reverted(source: SteppedService, destination: SteppedService) -> None:
    """After all imported edits are reverted the weights have the digest of the base model."""
    created, _ = destination.services.imports.submit(source.export_edit_set(), "key:bob")
    destination.run_queued_edits()
    for e in created:
        destination.services.edits.revert(e["id"], "key:bob")
    assert destination.replica.digest(destination.worker_parts.ledger.head()) == destination.replica.digest(0)


def test_imported_edits_can_be_exported_again(
    build: BuildPlace, source: SteppedService, destination: SteppedService
) -> None:
    """Imported edits can be exported; a third service that imports them has the same digest."""
    destination.services.imports.submit(source.export_edit_set(), "key:bob")
    destination.run_queued_edits()
    third = build()
    third.services.imports.submit(destination.export_edit_set(), "key:carol")
    third.run_queued_edits()
    assert third.replica.digest(4) == source.replica.digest(source.worker_parts.ledger.head())


def test_guard_applies_to_imports(source: SteppedService, destination: SteppedService) -> None:
    """An imported edit that fails its guard is rejected at its original strength and is not committed."""
    strict = json.loads(read_safetensors(source.export_edit_set(1), "it").metadata["set"])
    strict["edits"][0]["request"]["guard"] = {"min_probability": 1.0}
    created, _ = destination.services.imports.submit(forge_file(source.export_edit_set(1), strict), "key:bob")
    destination.run_queued_edits()
    ended = destination.services.edits.get(created[0]["id"])
    assert ended["status"] == "rejected" and ended["result"]["strength"] == 1.0
    assert destination.worker_parts.ledger.head() == 0 and destination.count(JobArtifact) == 0


def test_idempotency_key_covers_one_import(source: SteppedService, destination: SteppedService) -> None:
    """A repeated import with one idempotency key returns the same edits; another file with that key is
    rejected."""
    first, _ = destination.services.imports.submit(source.export_edit_set(), "key:bob", ("k", "a"))
    again, _ = destination.services.imports.submit(source.export_edit_set(), "key:bob", ("k", "a"))
    assert [e["id"] for e in first] == [e["id"] for e in again]
    with pytest.raises(InvalidInput, match="another request body"):
        destination.services.imports.submit(source.export_edit_set(1), "key:bob", ("k", "b"))


# gated edits

GATED: Resource = {"hparams": {"form": "gated", "layers": [1]}}
SPACE = "gate_space."  # the beginning of the name of a gate space in a file


@pytest.fixture
def gated_source(build: BuildPlace) -> SteppedService:
    """A service with two gated edits in one space, and one in the weights."""
    place = build()
    place.edit("Eiffel Tower", "is", **GATED)
    place.edit("Louvre", "in", **GATED)
    place.edit("Big Ben", "is")
    return place


def gate_spaces_of(place: SteppedService) -> dict[str, bytes]:
    with place.container.database.read_session() as session:
        return {space.digest: bytes(space.data) for space in session.query(StoredGateSpace)}


def test_gated_edits_are_imported_as_the_same_bytes(
    gated_source: SteppedService, destination: SteppedService
) -> None:
    """The file holds the gate space once, as the ledger does. After an import the destination has the digest and the
    state of the source, the stored space, and the same edit set."""
    data = gated_source.export_edit_set()
    file, stored = read_safetensors(data, "it"), gate_spaces_of(gated_source)
    assert len(stored) == 1
    assert {n.removeprefix(SPACE): file.read(n) for n in file.tensor_infos if SPACE in n} == stored
    created, _ = destination.services.imports.submit(data, "key:bob")
    destination.run_queued_edits()
    assert [destination.services.edits.get(e["id"])["status"] for e in created] == ["applied"] * 3
    assert destination.replica.digest(3) == gated_source.replica.digest(3)
    assert destination.replica.patch(3).patches[-1].nbytes > 0
    assert destination.state() == gated_source.state() and gate_spaces_of(destination) == stored
    again = read_safetensors(destination.export_edit_set(), "it")
    assert [again.read(n) for n in again.tensor_infos] == [file.read(n) for n in file.tensor_infos]
    assert destination.services.ledger.verify()["ok"]


def test_import_of_gated_edits_is_idempotent(
    gated_source: SteppedService, destination: SteppedService
) -> None:
    """A repeated import creates no edits and stores no second space, nor does an import into the source."""
    data = gated_source.export_edit_set()
    first, _ = destination.services.imports.submit(data, "key:bob")
    destination.run_queued_edits(as_group=True)
    for place in (destination, gated_source):
        assert len(place.services.imports.submit(data, "key:bob")[1]) == len(first) == 3
        assert len(gate_spaces_of(place)) == 1
    for e in first:
        destination.services.edits.revert(e["id"], "key:bob")
    assert destination.replica.digest(6) == destination.replica.digest(0)


def test_an_edit_set_without_gated_edits_has_no_space(gated_source: SteppedService) -> None:
    """The spaces of edits that are not active at a version are not in its file."""
    for edit in gated_source.services.edits.page()["items"]:
        if edit["subject"] != "Big Ben":
            gated_source.services.edits.revert(edit["id"], "key:alice")
    file = read_safetensors(gated_source.export_edit_set(), "it")
    assert len(file.tensor_infos) == 1 and SPACE not in next(iter(file.tensor_infos))


# rejected files


def forge_file(data: bytes, edit_set: Resource, vectors: dict[str, bytes] | None = None) -> bytes:
    """Return a file with a valid digest of the given edit set, and with all gate spaces."""
    encoded_set = json.dumps(edit_set)
    metadata = {
        "format": FORMAT,
        "set": encoded_set,
        "sha256": hashlib.sha256(encoded_set.encode()).hexdigest(),
    }
    file = read_safetensors(data, "it")
    blobs = {name: np.frombuffer(file.read(name), np.uint8) for name in file.tensor_infos}
    blobs |= {name: np.frombuffer(blob, np.uint8) for name, blob in (vectors or {}).items()}
    names = [e["origin"]["edit"] for e in edit_set["edits"]]
    names += [name for name in blobs if name.startswith(SPACE)]
    return save({name: blobs[name.removeprefix("../")] for name in names}, metadata)


def with_changed_vectors(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """Return the file of one edit with changed tensors and valid digests."""
    edit_set = json.loads(read_safetensors(data, "it").metadata["set"])
    name = edit_set["edits"][0]["origin"]["edit"]
    tensors = dict(load(read_safetensors(data, "it").read(name)))
    change(tensors)
    blob = save(tensors)
    edit_set["edits"][0]["factors_sha256"] = hashlib.sha256(blob).hexdigest()
    return forge_file(data, edit_set, {name: blob})


def with_changed_set(data: bytes, change: Callable[[Resource], Any]) -> bytes:
    """Return the file of one edit with changed metadata and a valid digest."""
    edit_set = json.loads(read_safetensors(data, "it").metadata["set"])
    change(edit_set)
    return forge_file(data, edit_set)


def first_edit(edit_set: Resource) -> Resource:
    return edit_set["edits"][0]  # type: ignore[no-any-return]


HOSTILE_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "not a valid safetensors file"),
    "not ours": (lambda d: save({"a": np.zeros(3)}), "not an edit set"),
    "cut off": (lambda d: d[:-1], "not a valid safetensors file"),
    "longer": (lambda d: d + b"\0", "not a valid safetensors file"),
    "a vector changed": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "damaged or modified"),
    "words changed": (lambda d: d.replace(b"Eiffel Tower", b"Eiffel Cower"), "damaged or modified"),
    "another model": (
        lambda d: with_changed_set(d, lambda t: t["model"].update(fingerprint="0" * 64)),
        "fingerprint",
    ),
    "not a number": (
        lambda d: with_changed_vectors(d, lambda v: v["layer.0.key"].fill(np.nan)),
        "not finite",
    ),
    "infinite": (lambda d: with_changed_vectors(d, lambda v: v["layer.1.value"].fill(np.inf)), "not finite"),
    "of another shape": (
        lambda d: with_changed_vectors(d, lambda v: v.update({"layer.0.key": np.zeros(41, np.float32)})),
        "must be F32",
    ),
    "of another type": (
        lambda d: with_changed_vectors(d, lambda v: v.update({"layer.0.key": np.zeros(40, np.int32)})),
        "must be F32",
    ),
    "a layer missing": (
        lambda d: with_changed_vectors(d, lambda v: [v.pop(n) for n in list(v) if n.startswith("layer.1")]),
        "not those of rome",
    ),
    "a vector more": (
        lambda d: with_changed_vectors(
            d, lambda v: v.update({"weight.0.mlp": np.zeros((16, 40), np.float32)})
        ),
        "not those of rome",
    ),
    "a negative ridge": (
        lambda d: with_changed_vectors(d, lambda v: v.update({"layer.0.form.memit": np.array([-1.0])})),
        "not finite",
    ),
    "an unknown form": (
        lambda d: with_changed_vectors(d, lambda v: v.update({"layer.0.form.x": np.array([1.0])})),
        "not those of rome",
    ),
    "a layer that is not there": (
        lambda d: with_changed_set(d, lambda t: first_edit(t)["provenance"]["hparams"].update(layers=[7])),
        "must name layers",
    ),
    "a layer that is a boolean": (
        lambda d: with_changed_set(
            d, lambda t: first_edit(t)["provenance"]["hparams"].update(layers=[False])
        ),
        "must name layers",
    ),
    "an unknown objective": (
        lambda d: with_changed_set(d, lambda t: first_edit(t)["provenance"].update(objective="x")),
        "objective",
    ),
    "a corpus of kilobytes": (
        lambda d: with_changed_set(d, lambda t: first_edit(t)["provenance"].update(corpus="x" * 300_000)),
        "corpus",
    ),
    "an edit of megabytes": (
        lambda d: with_changed_set(d, lambda t: first_edit(t)["provenance"].update(corpus="x" * 3_000_000)),
        "an item of `edits` has more than",
    ),
    "very many libraries": (
        lambda d: with_changed_set(
            d, lambda t: first_edit(t)["provenance"].update(libraries={str(i): "1" for i in range(10_000)})
        ),
        "libraries",
    ),
    "very large numbers": (
        lambda d: with_changed_vectors(d, lambda v: v["layer.1.value"].fill(3e38)),
        "values above 1e\\+30",
    ),
    "an unknown hyperparameter": (
        lambda d: with_changed_set(d, lambda t: first_edit(t)["provenance"]["hparams"].update(x=1)),
        "hparams",
    ),
    "an unknown method": (
        lambda d: with_changed_set(d, lambda t: first_edit(t)["provenance"].update(method="x")),
        "method",
    ),
    "no slot": (
        lambda d: with_changed_set(d, lambda t: first_edit(t)["request"].update(prompt="x")),
        "exactly one",
    ),
    "an id that is a path": (
        lambda d: with_changed_set(
            d, lambda t: first_edit(t)["origin"].update(edit="../" + first_edit(t)["origin"]["edit"])
        ),
        "file is invalid",
    ),
    "no edits": (lambda d: with_changed_set(d, lambda t: t.update(edits=[])), "file is invalid"),
    "more than it should say": (lambda d: with_changed_set(d, lambda t: t.update(x=1)), "file is invalid"),
    "one edit twice": (
        lambda d: with_changed_set(d, lambda t: t["edits"].append(first_edit(t))),
        "do not match",
    ),
}


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of one edit."""
    place = SteppedService(tmp_path_factory.mktemp("sound"), tiny())
    place.edit("Eiffel Tower", "is")
    data = place.export_edit_set()
    place.container.close()
    return data


@pytest.fixture(scope="module")
def gated_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of one gated edit."""
    place = SteppedService(tmp_path_factory.mktemp("gated"), tiny())
    place.edit("Eiffel Tower", "is", **GATED)
    data = place.export_edit_set()
    place.container.close()
    return data


@pytest.fixture(scope="module")
def empty_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SteppedService]:
    """A service without edits."""
    place = SteppedService(tmp_path_factory.mktemp("lone"), tiny())
    yield place
    place.container.close()


@pytest.mark.parametrize("name", list(HOSTILE_FILES))
def test_rejected_file_writes_nothing(name: str, valid_file: bytes, empty_service: SteppedService) -> None:
    """An invalid file is rejected with a message that states the error, and no job or artifact is written."""
    spoil, said = HOSTILE_FILES[name]
    spoiled = spoil(valid_file)
    assert spoiled != valid_file
    with pytest.raises(InvalidInput, match=said):
        empty_service.services.imports.submit(spoiled, "key:bob")
    assert empty_service.count(Job) == empty_service.count(JobArtifact) == 0


Tensors = dict[str, Any]


def with_changed_gate(name: str, value: Any) -> Callable[[bytes], bytes]:
    """Return a function that replaces a tensor of the gate of the only edit of a file; None removes it."""

    def change(tensors: Tensors) -> None:
        tensors.pop(f"layer.1.gate.{name}")
        if value is not None:
            tensors[f"layer.1.gate.{name}"] = value

    return lambda data: with_changed_vectors(data, change)


def with_changed_space(change: Callable[[Tensors], Any]) -> Callable[[bytes], bytes]:
    """Return a function that changes the gate space of a file, and names its new digest in the file and in the gate."""

    def changed(data: bytes) -> bytes:
        file = read_safetensors(data, "it")
        (name,) = (n for n in file.tensor_infos if n.startswith(SPACE))
        tensors = dict(load(file.read(name)))
        change(tensors)
        layer, sketch = next((int(n.split(".")[1]), torch.from_numpy(t)) for n, t in tensors.items())
        digest = GateSpace(layer, sketch).digest
        gate = with_changed_gate("space", np.frombuffer(bytes.fromhex(digest), np.uint8))(data)
        return with_spaces(gate, {SPACE + digest: save(tensors)})

    return changed


def with_spaces(data: bytes, spaces: dict[str, bytes]) -> bytes:
    """Return a file with other gate spaces."""
    file = read_safetensors(data, "it")
    blobs = {name: file.read(name) for name in file.tensor_infos if not name.startswith(SPACE)} | spaces
    return save({name: np.frombuffer(blob, np.uint8) for name, blob in blobs.items()}, file.metadata)


def with_another_space(name: str) -> Callable[[bytes], bytes]:
    """Return a function that adds a gate space that no gate names."""

    def changed(data: bytes) -> bytes:
        file = read_safetensors(data, "it")
        space = GateSpace(1, torch.ones(2, 40))
        spaces = {n: file.read(n) for n in file.tensor_infos if n.startswith(SPACE)}
        return with_spaces(data, spaces | {name.format(space.digest): space.serialize()})

    return changed


def with_sketch(
    shape: tuple[int, ...], value: float = 1.0, dtype: Any = np.float32
) -> Callable[[bytes], bytes]:
    return with_changed_space(lambda s: s.update({"layer.1.sketch": np.full(shape, value, dtype)}))


def with_sketch_of_layer(layer: int) -> Callable[[bytes], bytes]:
    return with_changed_space(lambda s: s.update({f"layer.{layer}.sketch": s.pop("layer.1.sketch")}))


def with_form(form: str) -> Callable[[bytes], bytes]:
    return lambda d: with_changed_set(d, lambda t: first_edit(t)["provenance"]["hparams"].update(form=form))


def unit_keys(count: int, size: int = 256) -> Any:
    return np.eye(count, size, dtype=np.float32)


def orthogonal_direction(tensors: Tensors) -> None:
    key, direction = np.zeros((2, 40), np.float32)
    key[:2], direction[:2] = (1, 1e-35), (0, 1)
    tensors.update({"layer.1.key": key, "layer.1.direction": direction})


HOSTILE_GATED_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a space changed": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "digest of the gate space"),
    "a space missing": (lambda d: with_spaces(d, {}), "which the file lacks"),
    "a space more": (with_another_space(SPACE + "{}"), "no edit names"),
    "a space with another digest": (with_another_space(SPACE + "0" * 64), "digest of the gate space"),
    "a space without a digest": (with_another_space(SPACE + "x"), "do not match"),
    "a space of another width": (with_sketch((256, 41)), r"must be F32 \[256, 40\]"),
    "a space of very many rows": (with_sketch((1025, 40)), r"must be F32 \[1024, 40\]"),
    "a space without rows": (with_sketch((0, 40)), r"must be F32 \[1, 40\]"),
    "a space that is a number": (with_sketch(()), "must be F32"),
    "a space of another type": (with_sketch((256, 40), dtype=np.float64), "must be F32"),
    "a space that is not a number": (with_sketch((256, 40), np.nan), "not finite"),
    "a space that is infinite": (with_sketch((256, 40), -np.inf), "not finite"),
    "a space of very large numbers": (with_sketch((256, 40), 3e38), r"values above 1e\+30"),
    "a space of another layer": (with_sketch_of_layer(0), "names the gate space of layer 0"),
    "a space of a layer that is not there": (with_sketch_of_layer(7), "must be the sketch of one layer"),
    "a space of two layers": (
        with_changed_space(lambda s: s.update({"layer.0.sketch": s["layer.1.sketch"]})),
        "must be the sketch of one layer",
    ),
    "a space that is not safetensors": (
        lambda d: with_spaces(d, {SPACE + "0" * 64: b"x"}),
        "not a valid safetensors file",
    ),
    "no keys": (with_changed_gate("keys", unit_keys(0)), r"must be F32 \[1, 256\]"),
    "very many keys": (with_changed_gate("keys", unit_keys(9)), r"must be F32 \[8, 256\]"),
    "keys of another space": (with_changed_gate("keys", unit_keys(2, 255)), r"must be F32 \[2, 256\]"),
    "keys of another type": (with_changed_gate("keys", np.eye(2, 256)), "must be F32"),
    "a key that is long": (with_changed_gate("keys", unit_keys(2) * np.float32(1.01)), "norm is not 1"),
    "a key that is zero": (with_changed_gate("keys", unit_keys(2) * np.float32(0)), "norm is not 1"),
    "a key that is not a number": (with_changed_gate("keys", unit_keys(1) * np.nan), "not finite"),
    "very many blocked keys": (with_changed_gate("blocked", unit_keys(17)), r"must be F32 \[16, 256\]"),
    "a blocked key that is long": (
        with_changed_gate("blocked", unit_keys(2) * np.float32(2)),
        "norm is not 1",
    ),
    "a blocked key that is infinite": (
        with_changed_gate("blocked", np.full((1, 256), np.inf, np.float32)),
        "not finite",
    ),
    "a threshold of 1": (with_changed_gate("threshold", np.ones(1, np.float32)), "between -1 and 1"),
    "a threshold of -1": (with_changed_gate("threshold", -np.ones(1, np.float32)), "between -1 and 1"),
    "a threshold that is not a number": (
        with_changed_gate("threshold", np.full(1, np.nan, np.float32)),
        "between -1 and 1",
    ),
    "two thresholds": (with_changed_gate("threshold", np.zeros(2, np.float32)), "must be F32"),
    "a short digest": (with_changed_gate("space", np.zeros(31, np.uint8)), r"must be U8 \[32\]"),
    "a digest of another type": (with_changed_gate("space", np.zeros(32, np.float32)), "must be U8"),
    "a part missing": (with_changed_gate("blocked", None), "not those of rome"),
    "a gate of an edit in the weights": (with_form("weights"), "not those of rome"),
    "a direction that is orthogonal to the key": (
        lambda d: with_changed_vectors(d, orthogonal_direction),
        "nearly orthogonal",
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE_GATED_FILES))
def test_rejected_gate_writes_nothing(name: str, gated_file: bytes, empty_service: SteppedService) -> None:
    """An invalid gate or gate space is rejected with a message that states the error, and nothing is written."""
    spoil, said = HOSTILE_GATED_FILES[name]
    with pytest.raises(InvalidInput, match=said):
        empty_service.services.imports.submit(spoil(gated_file), "key:bob")
    assert empty_service.count(Job) == empty_service.count(StoredGateSpace) == 0


def test_a_gated_edit_needs_a_gate(valid_file: bytes, empty_service: SteppedService) -> None:
    """An edit of the form gated whose tensors have no gate is rejected."""
    with pytest.raises(InvalidInput, match="not those of rome"):
        empty_service.services.imports.submit(with_form("gated")(valid_file), "key:bob")


@pytest.mark.parametrize(
    "change",
    [
        with_changed_space(lambda s: None),
        with_sketch((256, 40)),
        with_changed_gate("keys", unit_keys(8)),
        with_changed_gate("blocked", unit_keys(0)),
        with_changed_gate("blocked", unit_keys(16)),
        with_changed_gate("threshold", np.full(1, -0.5, np.float32)),
    ],
)
def test_valid_forged_gate_is_accepted(
    change: Callable[[bytes], bytes], gated_file: bytes, empty_service: SteppedService
) -> None:
    """A forged file whose gate is valid is accepted, with the digest that its space has."""
    data = change(gated_file)
    info = model_info(tiny(), empty_service.context)
    (imported,) = read_edit_set(data, tiny().fingerprint, info, max_edit_size=1_000_000)
    (digest,) = imported.shared
    assert imported.read_shared(digest) == read_safetensors(data, "it").read(SPACE + digest)


# edits with several associations at a layer

ULTRAEDIT: Resource = {"method": "ultraedit", "hparams": {"layers": [0, 1], "eta": 1e-3}}


KN: Resource = {"method": "kn", "hparams": {"nodes": 4, "contexts": 1, "new_weight": 1}}


@pytest.fixture
def source_of_several(build: BuildPlace) -> SteppedService:
    """A service with edits by UltraEdit, by KN, and an erasure by KN."""
    place = build()
    place.edit("Eiffel Tower", "in the city", **ULTRAEDIT)
    place.edit("Louvre", "in", **KN)
    place.edit("Big Ben", "is", objective="erase", target_new=None, target_true="is", **KN)
    return place


def test_edits_with_several_associations_are_imported_as_the_same_bytes(
    source_of_several: SteppedService, destination: SteppedService
) -> None:
    """The destination has the digest and the state of the source. A file that lacks a tensor of one token, or has a
    token too many, is refused."""
    place = source_of_several
    data = place.export_edit_set()
    for change in (
        lambda tensors: tensors.pop("layer.1.1.value"),
        lambda tensors: tensors.update({"layer.1.64.key": tensors["layer.1.key"]}),
    ):
        with pytest.raises(InvalidInput, match="names are not those of ultraedit"):
            destination.services.imports.submit(with_changed_vectors(data, change), "key:bob")
    destination.services.imports.submit(data, "key:bob")
    destination.run_queued_edits()
    assert destination.replica.digest(3) == place.replica.digest(3)
    assert destination.state() == place.state()


# edits by GRACE

GRACE: Resource = {"method": "grace", "hparams": {"layers": [1], "steps": 3}}


@pytest.fixture(params=[None, "hartvigsen2023"])
def grace_source(build: BuildPlace, request: pytest.FixtureRequest) -> SteppedService:
    """A service with two edits by GRACE, and one in the weights."""
    place = build()
    hparams = GRACE["hparams"] | {"compat": request.param, "radius": 2.0}
    place.edit("Eiffel Tower", "is", method="grace", hparams=hparams)
    place.edit("Louvre", "in", method="grace", hparams=hparams)
    place.edit("Big Ben", "is")
    return place


def test_edits_by_grace_are_imported_as_the_same_bytes(
    grace_source: SteppedService, destination: SteppedService
) -> None:
    """The destination has the digest and the state of the source, the stored bytes, and the same edit set."""
    place = grace_source
    data = place.export_edit_set()
    created, _ = destination.services.imports.submit(data, "key:bob")
    destination.run_queued_edits()
    assert [destination.services.edits.get(e["id"])["status"] for e in created] == ["applied"] * 3
    assert destination.replica.digest(3) == place.replica.digest(3)
    assert destination.state() == place.state()
    file, again = (read_safetensors(p.export_edit_set(), "it") for p in (place, destination))
    assert [again.read(n) for n in again.tensor_infos] == [file.read(n) for n in file.tensor_infos]
    assert destination.services.ledger.verify()["ok"]


@pytest.fixture(scope="module")
def codebook_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the file of one edit by GRACE."""
    place = SteppedService(tmp_path_factory.mktemp("codebook"), tiny())
    place.edit("Eiffel Tower", "is", **GRACE)
    data = place.export_edit_set()
    place.container.close()
    return data


def with_changed_entry(name: str, value: Any) -> Callable[[bytes], bytes]:
    """Return a function that replaces a tensor of the entry of the only edit of a file; None removes it."""

    def change(tensors: Tensors) -> None:
        tensors.pop(f"codebook.1.{name}", None)
        if value is not None:
            tensors[f"codebook.1.{name}"] = value

    return lambda data: with_changed_vectors(data, change)


def with_compat(data: bytes) -> bytes:
    return with_changed_set(
        data, lambda t: first_edit(t)["provenance"]["hparams"].update(compat="hartvigsen2023")
    )


HOSTILE_ENTRIES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a key of another width": (with_changed_entry("key", np.zeros(41, np.float32)), r"must be F32 \[40\]"),
    "a key that is not a number": (with_changed_entry("key", np.full(40, np.nan, np.float32)), "not finite"),
    "a value that is infinite": (with_changed_entry("value", np.full(16, np.inf, np.float32)), "not finite"),
    "a value of very large numbers": (
        with_changed_entry("value", np.full(16, 3e38, np.float32)),
        r"values above 1e\+30",
    ),
    "a value of another type": (with_changed_entry("value", np.zeros(16)), "must be F32"),
    "an output that is missing": (with_changed_entry("output", None), "not those of grace"),
    "a negative radius": (with_changed_entry("radius", np.array([-1.0])), "negative"),
    "a radius that is not a number": (with_changed_entry("radius", np.array([np.nan])), "not finite"),
    "two radii": (with_changed_entry("radius", np.ones(2)), r"must be F64 \[1\]"),
    "a label without tokens": (with_changed_entry("label", np.zeros(0, np.int64)), r"must be I64 \[1\]"),
    "a label of another type": (with_changed_entry("label", np.zeros(1, np.float32)), "must be I64"),
    "a label that is a number": (with_changed_entry("label", np.array(3)), "must be I64"),
    "a label of no token": (with_changed_entry("label", np.array([-2])), "token ids"),
    "a label with a second -1": (with_changed_entry("label", np.array([3, -1])), "token ids"),
    "a label that is only -1": (with_changed_entry("label", np.array([-1])), "token ids"),
    "a label beyond every vocabulary": (with_changed_entry("label", np.array([2**40])), "token ids"),
    "a label of very many tokens": (with_changed_entry("label", np.ones(4097, np.int64)), "4096"),
    "radii of the other form": (with_changed_entry("replayed", np.ones(1, np.uint8)), "must be 0"),
    "hyperparameters of the other form": (with_compat, "must be 1"),
    "no form": (with_changed_entry("replayed", None), "not those of grace"),
    "a tensor more": (with_changed_entry("other", np.ones(1)), "not those of grace"),
    "an association besides": (
        lambda d: with_changed_vectors(d, lambda v: v.update({"layer.1.key": np.zeros(40, np.float32)})),
        "not those of grace",
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE_ENTRIES))
def test_rejected_entry_writes_nothing(
    name: str, codebook_file: bytes, empty_service: SteppedService
) -> None:
    """An invalid entry of a codebook is rejected with a message that states the error, and nothing is written."""
    spoil, said = HOSTILE_ENTRIES[name]
    with pytest.raises(InvalidInput, match=said):
        empty_service.services.imports.submit(spoil(codebook_file), "key:bob")
    assert empty_service.count(Job) == 0


def test_size_of_a_gate_space_is_limited(gated_file: bytes, empty_service: SteppedService) -> None:
    """A gate space that exceeds the limit of one edit is refused, with the setting to raise."""
    info = model_info(tiny(), empty_service.context)
    with pytest.raises(InvalidInput, match=r"gate_space.* at most 40000, .*PALIMPSEST_MAX_IMPORT_BODY"):
        read_edit_set(gated_file, tiny().fingerprint, info, max_edit_size=40_000)


def test_revert_to_a_singular_system_builds(
    valid_file: bytes, empty_service: SteppedService, build: BuildPlace
) -> None:
    """Imported edits of two subjects with equal keys and no ridge have a version, also when a revert leads to it."""
    place = build()

    def without_ridge(tensors: dict[str, Any]) -> None:
        tensors.update({f"layer.{layer}.form.memit": np.array([0.0]) for layer in (0, 1)})

    first = with_changed_vectors(valid_file, without_ridge)
    edit_set = json.loads(read_safetensors(first, "it").metadata["set"])
    first_edit(edit_set)["request"]["subject"] = "Louvre"
    second = forge_file(first, edit_set)
    place.services.imports.submit(first, "key:bob")
    place.run_queued_edits()
    superseding = place.edit("Eiffel Tower", "in")
    place.services.imports.submit(second, "key:bob")
    place.run_queued_edits()
    place.services.edits.revert(superseding, "key:bob")
    head = place.worker_parts.ledger.head()
    assert head == 4 and len(place.state()) > 0
    assert place.replica.digest(head) != place.replica.digest(0)
    assert place.services.ledger.verify()["ok"]


def test_edit_that_another_one_hides_is_rejected(valid_file: bytes, build: BuildPlace) -> None:
    """An edit whose change alone is beyond the range of the weights is rejected with the figures, although an active
    edit with a larger parallel key and no change hides it, so that a revert does not leave it alone."""

    def changed_to(key: float, value: float) -> Callable[[dict[str, Any]], None]:
        def change(tensors: dict[str, Any]) -> None:
            for layer in (0, 1):
                for name, number in (("key", key), ("direction", key), ("value", value)):
                    tensors[f"layer.{layer}.{name}"].fill(number)
                tensors[f"layer.{layer}.form.memit"] = np.array([0.0])

        return change

    place = build()
    hiding = with_changed_vectors(valid_file, changed_to(1.0, 0.0))
    edit_set = json.loads(read_safetensors(hiding, "it").metadata["set"])
    first_edit(edit_set)["request"]["subject"] = "Louvre"
    place.services.imports.submit(forge_file(hiding, edit_set), "key:bob")
    place.run_queued_edits()
    assert place.worker_parts.ledger.head() == 1
    hidden = with_changed_vectors(valid_file, changed_to(2.0**-100, 2.0**64))
    (created,), _ = place.services.imports.submit(hidden, "key:bob")
    place.run_queued_edits()
    ended = place.services.edits.get(created["id"])
    assert ended["status"] == "rejected" and place.worker_parts.ledger.head() == 1
    assert "the change of the weight is too large (inf" in ended["result"]["reason"]
    assert ended["result"]["norm_ratio"] == {"0": None, "1": None}


def test_valid_forged_file_is_accepted(valid_file: bytes, empty_service: SteppedService) -> None:
    """A forged file without changes is accepted, so the rejections above are caused by the changes."""
    imported_edits = read_edit_set(
        with_changed_vectors(valid_file, lambda v: None),
        tiny().fingerprint,
        model_info(tiny(), empty_service.context),
        max_edit_size=1_000_000,
    )
    assert [g.request.subject for g in imported_edits] == ["Eiffel Tower"]


def test_size_of_an_edit_is_limited(valid_file: bytes, empty_service: SteppedService) -> None:
    """An edit whose tensors exceed the limit is refused, with the setting to raise."""
    info = model_info(tiny(), empty_service.context)
    with pytest.raises(InvalidInput, match=r"one edit at most 100, .* raise PALIMPSEST_MAX_IMPORT_BODY"):
        read_edit_set(valid_file, tiny().fingerprint, info, max_edit_size=100)


def test_another_model_is_another_model(valid_file: bytes, build: BuildPlace) -> None:
    """A model of the same shape with other weights rejects the file."""
    with pytest.raises(InvalidInput, match="serve the same base model"):
        build(tiny(seed=1)).services.imports.submit(valid_file, "key:bob")


def test_nothing_active_is_nothing_to_export(empty_service: SteppedService) -> None:
    """A version without active edits cannot be exported."""
    for export in (
        empty_service.export_edit_set,
        lambda: empty_service.services.exports.submit(ExportRequest(version="head", format="peft"), "x"),
    ):
        with pytest.raises(InvalidInput, match="no edit is active at version 0"):
            export()


def test_fine_tuning_has_no_adapter(source: SteppedService) -> None:
    """An adapter of fine-tuning edits is rejected with the edits and the alternative format, which is
    accepted."""
    with pytest.raises(InvalidInput, match=r"edit_\w+\. Export the edited weights"):
        source.services.exports.submit(ExportRequest(version="head", format="peft"), "x")
    assert (
        source.services.exports.submit(ExportRequest(version="head", format="safetensors"), "x")["status"]
        == "queued"
    )
