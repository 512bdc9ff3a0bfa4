"""Edits on their way from one ledger to another, on each wiring: service.application.edit_set, and what editing makes of what it is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from service.application import edit_set
from service.db.models import Job, Part
from service.editing import edit_job
from service.errors import InvalidInput
from service.kit.safetensors_io import read
from service.kit.steps import Steps
from service.models.loading import LoadedModel
from tests.support import wirings
from tests.support.stepped_service import Place, Resource
from tests.support.tiny_models import tiny
from workers.model_info import card

Build = Callable[[], Place]


@pytest.fixture(params=wirings.BOTH)
def build(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Build]:
    """Services on stores of their own, all with one model."""
    places: list[Place] = []

    def built(model: LoadedModel | None = None) -> Place:
        stores = wirings.stores(request)
        places.append(Place(tmp_path / str(len(places)), model or tiny(), **stores))
        return places[-1]

    yield built
    for place in places:
        place.wired.close()


@pytest.fixture
def here(build: Build) -> Place:
    """A service at version 6, where four edits are active: of two methods, one in place of an older one, one in spite of a revert."""
    place = build()
    place.edit("Eiffel Tower", "is")
    place.edit("Eiffel Tower", "in")
    reverted = place.edit("Big Ben", "is")
    place.edit("Colosseum", "on", probes={"paraphrase": ["What about the {}"]})
    place.edit("Mount Fuji", "in", method="ft-l", hparams={"steps": 3})
    place.do.edits.revert(reverted, "key:alice")
    place.edit("Louvre", "is", method="memit")
    return place


@pytest.fixture
def there(build: Build, here: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Another service, in which nothing is searched for."""
    place = build()

    def search(*_: Any) -> Steps[Any]:
        raise AssertionError("an imported edit is searched for")

    monkeypatch.setattr(edit_job, "find_together_steps", search)
    return place


def test_the_weights_are_the_same_bytes(here: Place, there: Place) -> None:
    """With these edits alone the other service has the same state and the same digest; who found them, and how, is in its ledger."""
    data = here.exported()
    made, known = there.do.imports.submit(data, "key:bob")
    assert len(made) == 4 and known == []
    there.work()
    assert [there.do.edits.get(e["id"])["status"] for e in made] == ["applied"] * 4
    assert there.replica.digest(4) == here.replica.digest(here.desk.head())
    assert there.state() == here.state()
    assert there.do.ledger.verify()["ok"]
    origin = there.do.edits.get(made[0]["id"])["origin"]
    entry, theirs = there.do.ledger.page()["items"][0], here.do.ledger.page()["items"][1]
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
    ):
        assert entry["body"][name] == theirs["body"][name], name
    assert there.count(Part) == 0


def test_tried_together_they_land_the_same(here: Place, there: Place) -> None:
    """As edits that wait together."""
    there.do.imports.submit(here.exported(), "key:bob")
    there.work(together=True)
    assert there.replica.digest(4) == here.replica.digest(here.desk.head())


def test_an_older_version_is_exported_as_it_was(here: Place, there: Place) -> None:
    """Whatever came later; the same version is the same bytes."""
    data = here.exported(1)
    assert data == here.exported(1)
    there.do.imports.submit(data, "key:bob")
    there.work()
    assert there.replica.digest(1) == here.replica.digest(1) != here.replica.digest(2)


def test_what_is_here_is_left_alone(here: Place, there: Place) -> None:
    """Importing twice lands once, also while the first is under way, and also at home; what was reverted may come back."""
    data = here.exported()
    first, _ = there.do.imports.submit(data, "key:bob")
    ids = [e["id"] for e in first]
    for _ in range(2):
        again, known = there.do.imports.submit(data, "key:bob")
        assert [e["id"] for e in again] == known == ids
        there.work()
    assert there.desk.head() == 4
    assert len(here.do.imports.submit(data, "key:bob")[1]) == 4
    there.do.edits.revert(ids[1], "key:bob")
    third, known = there.do.imports.submit(data, "key:bob")
    assert [e["id"] for e in third][1] not in ids and known == [ids[0], *ids[2:]]


def test_an_import_is_taken_back_like_any_edit(here: Place, there: Place) -> None:
    """Base bytes, when all are."""
    made, _ = there.do.imports.submit(here.exported(), "key:bob")
    there.work()
    for e in made:
        there.do.edits.revert(e["id"], "key:bob")
    assert there.replica.digest(there.desk.head()) == there.replica.digest(0)


def test_an_import_goes_on_from_one_service_to_the_next(build: Build, here: Place, there: Place) -> None:
    """And lands a third time with the same bytes."""
    there.do.imports.submit(here.exported(), "key:bob")
    there.work()
    third = build()
    third.do.imports.submit(there.exported(), "key:carol")
    third.work()
    assert third.replica.digest(4) == here.replica.digest(here.desk.head())


def test_the_guard_stands_before_imports_too(here: Place, there: Place) -> None:
    """An edit that does not hold here does not land, and is not made stronger to that end."""
    strict = json.loads(read(here.exported(1), "it").metadata["set"])
    strict["edits"][0]["request"]["guard"] = {"min_probability": 1.0}
    made, _ = there.do.imports.submit(forged(here.exported(1), strict), "key:bob")
    there.work()
    ended = there.do.edits.get(made[0]["id"])
    assert ended["status"] == "rejected" and ended["result"]["strength"] == 1.0
    assert there.desk.head() == 0 and there.count(Part) == 0


def test_a_key_is_good_for_one_import(here: Place, there: Place) -> None:
    """The same again gives the same edits again; another file with it is refused."""
    first, _ = there.do.imports.submit(here.exported(), "key:bob", ("k", "a"))
    again, _ = there.do.imports.submit(here.exported(), "key:bob", ("k", "a"))
    assert [e["id"] for e in first] == [e["id"] for e in again]
    with pytest.raises(InvalidInput, match="another body"):
        there.do.imports.submit(here.exported(1), "key:bob", ("k", "b"))


# files that are refused


def forged(data: bytes, told: Resource, vectors: dict[str, bytes] | None = None) -> bytes:
    """A file whose digest is right, whoever made it."""
    said = json.dumps(told)
    metadata = {"format": edit_set.FORMAT, "set": said, "sha256": hashlib.sha256(said.encode()).hexdigest()}
    kept = {name: np.frombuffer(blob, np.uint8) for name, blob in read(data, "it").data.items()}
    kept |= {name: np.frombuffer(blob, np.uint8) for name, blob in (vectors or {}).items()}
    names = [e["origin"]["edit"] for e in told["edits"]]
    return save({name: kept[name.removeprefix("../")] for name in names}, metadata)


def with_vectors(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The file of one edit with other vectors, and all digests right."""
    told = json.loads(read(data, "it").metadata["set"])
    name = told["edits"][0]["origin"]["edit"]
    tensors = dict(load(bytes(read(data, "it").data[name])))
    change(tensors)
    blob = save(tensors)
    told["edits"][0]["factors_sha256"] = hashlib.sha256(blob).hexdigest()
    return forged(data, told, {name: blob})


def with_words(data: bytes, change: Callable[[Resource], Any]) -> bytes:
    """The file of one edit of which something else is said, and the digest right."""
    told = json.loads(read(data, "it").metadata["set"])
    change(told)
    return forged(data, told)


def first(told: Resource) -> Resource:
    return told["edits"][0]  # type: ignore[no-any-return]


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "no file of safetensors"),
    "not ours": (lambda d: save({"a": np.zeros(3)}), "no exported set"),
    "cut off": (lambda d: d[:-1], "no file of safetensors"),
    "longer": (lambda d: d + b"\0", "no file of safetensors"),
    "a vector changed": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "damaged or changed"),
    "words changed": (lambda d: d.replace(b"Eiffel Tower", b"Eiffel Cower"), "damaged or changed"),
    "another model": (
        lambda d: with_words(d, lambda t: t["model"].update(fingerprint="0" * 64)),
        "fingerprint",
    ),
    "not a number": (lambda d: with_vectors(d, lambda v: v["layer.0.key"].fill(np.nan)), "cannot be"),
    "infinite": (lambda d: with_vectors(d, lambda v: v["layer.1.value"].fill(np.inf)), "cannot be"),
    "of another shape": (
        lambda d: with_vectors(d, lambda v: v.update({"layer.0.key": np.zeros(41, np.float32)})),
        "must be F32",
    ),
    "of another type": (
        lambda d: with_vectors(d, lambda v: v.update({"layer.0.key": np.zeros(40, np.int32)})),
        "must be F32",
    ),
    "a layer missing": (
        lambda d: with_vectors(d, lambda v: [v.pop(n) for n in list(v) if n.startswith("layer.1")]),
        "not those of rome",
    ),
    "a vector more": (
        lambda d: with_vectors(d, lambda v: v.update({"weight.0.mlp": np.zeros((16, 40), np.float32)})),
        "not those of rome",
    ),
    "a negative ridge": (
        lambda d: with_vectors(d, lambda v: v.update({"layer.0.form.memit": np.array([-1.0])})),
        "cannot be",
    ),
    "an unknown form": (
        lambda d: with_vectors(d, lambda v: v.update({"layer.0.form.x": np.array([1.0])})),
        "not those of rome",
    ),
    "a layer that is not there": (
        lambda d: with_words(d, lambda t: first(t)["found"]["hparams"].update(layers=[7])),
        "names no layers",
    ),
    "an unknown hyperparameter": (
        lambda d: with_words(d, lambda t: first(t)["found"]["hparams"].update(x=1)),
        "hparams",
    ),
    "an unknown method": (lambda d: with_words(d, lambda t: first(t)["found"].update(method="x")), "method"),
    "no slot": (lambda d: with_words(d, lambda t: first(t)["request"].update(prompt="x")), "exactly one"),
    "an id that is a path": (
        lambda d: with_words(d, lambda t: first(t)["origin"].update(edit="../" + first(t)["origin"]["edit"])),
        "not sound",
    ),
    "no edits": (lambda d: with_words(d, lambda t: t.update(edits=[])), "not sound"),
    "more than it should say": (lambda d: with_words(d, lambda t: t.update(x=1)), "not sound"),
    "one edit twice": (lambda d: with_words(d, lambda t: t["edits"].append(first(t))), "not the same"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of one edit."""
    place = Place(tmp_path_factory.mktemp("sound"), tiny())
    place.edit("Eiffel Tower", "is")
    data = place.exported()
    place.wired.close()
    return data


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A service into which nothing ever comes."""
    place = Place(tmp_path_factory.mktemp("lone"), tiny())
    yield place
    place.wired.close()


@pytest.mark.parametrize("name", list(HOSTILE))
def test_nothing_of_an_unsound_file_is_written(name: str, sound: bytes, lone: Place) -> None:
    """It is refused with words that say what is wrong, before anything is written."""
    spoil, said = HOSTILE[name]
    spoiled = spoil(sound)
    assert spoiled != sound
    with pytest.raises(InvalidInput, match=said):
        lone.do.imports.submit(spoiled, "key:bob")
    assert lone.count(Job) == lone.count(Part) == 0


def test_a_forged_file_that_is_sound_would_pass(sound: bytes, lone: Place) -> None:
    """So that what the test above finds is what it changes."""
    given = edit_set.read(with_vectors(sound, lambda v: None), tiny().fingerprint, card(tiny(), lone.toolkit))
    assert [g.request.subject for g in given] == ["Eiffel Tower"]


def test_another_model_is_another_model(sound: bytes, build: Build) -> None:
    """The same shape with other weights does not do: an edit is a function of its base model."""
    with pytest.raises(InvalidInput, match="serve the same base model"):
        build(tiny(seed=1)).do.imports.submit(sound, "key:bob")


def test_nothing_active_is_nothing_to_export(lone: Place) -> None:
    """Of the base model there are no edits."""
    for export in (lone.exported, lambda: lone.do.exports.submit("head", "peft", "x")):
        with pytest.raises(InvalidInput, match="no edit is active at version 0"):
            export()


def test_fine_tuning_has_no_adapter(here: Place) -> None:
    """Its changes are of whole weights: the refusal names the edits, and what to do instead."""
    with pytest.raises(InvalidInput, match=r"edit_\w+\. Export the edited weights"):
        here.do.exports.submit("head", "peft", "x")
    assert here.do.exports.submit("head", "safetensors", "x")["status"] == "queued"
