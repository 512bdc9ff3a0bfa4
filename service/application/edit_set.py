"""A set of edits on its way from one ledger to another: one file of safetensors with all that the first knows of them.

Each tensor is named like an edit and is, byte by byte, the file of safetensors that `GET /edits/{id}/delta` gives; the metadata
says in JSON what was asked for and how it was found. A digest over the metadata, which holds a digest of every tensor, tells a
file that was damaged or changed. It tells nobody who wrote it: whoever may edit may import.

Free of torch. Nothing of a file is believed before it is checked against the model that it is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from service.errors import InvalidInput
from service.kit import safetensors_io
from service.kit.safetensors_io import Described, Read
from service.kit.text import fact_key
from service.ledger.ledger import Entry, canonical, moment
from service.recipes.recipe import METHODS
from service.schemas import EditRequest, MethodName

FORMAT = "palimpsest-edits-1"
MOST = 1000  #: edits in one file
#: of an entry's body: how the edit was found. The rest is the request's, or is said anew where the edit lands.
FOUND = (
    "method", "objective", "hparams", "strength", "resolved_true", "statistics", "corpus", "dtype", "device", "libraries",
)  # fmt: skip
_WHAT = "the file"


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Found(_Told):
    """How an edit was found, as its ledger has it."""

    method: MethodName
    objective: str
    hparams: dict[str, JsonValue]
    strength: float = Field(gt=0, le=100)
    resolved_true: str = Field(max_length=500)
    statistics: dict[str, str]
    corpus: str
    dtype: str
    device: str
    libraries: dict[str, str]


class Origin(_Told):
    """Where an edit comes from."""

    ledger: str = Field(max_length=64, description="hash of that ledger's first entry")
    edit: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="its id there")
    version: int = Field(ge=1, description="at which it was applied there")
    actor: str = Field(max_length=300)
    at: str = Field(max_length=40)
    entry: str = Field(max_length=64, description="hash of its entry there")


class Edit(_Told):
    """An edit of a set, without its vectors."""

    origin: Origin
    request: EditRequest
    found: Found
    factors_sha256: str


class Set(_Told):
    """What the metadata says."""

    model: dict[str, JsonValue]
    version: int = Field(ge=0)
    state: str = Field(max_length=64)
    edits: list[Edit] = Field(min_length=1, max_length=MOST)


@dataclass(frozen=True)
class Given:
    """An edit of a file that was found sound."""

    edit: Edit
    factors: bytes

    @property
    def request(self) -> EditRequest:
        """What is asked for here: the same, with the hyperparameters that it was found with, and to land."""
        found = self.edit.found
        changes = {"hparams": found.hparams, "method": found.method, "dry_run": False}
        return self.edit.request.model_copy(update=changes)

    @property
    def name(self) -> tuple[str, str]:
        """What tells it from others, in every ledger: its fact, and the digest of its vectors."""
        request = self.edit.request
        return fact_key(request.subject, request.prompt), self.edit.factors_sha256

    @property
    def origin(self) -> dict[str, Any]:
        """Where it comes from, as the edit's resource and the ledger here say it."""
        return {**self.edit.origin.model_dump(mode="json"), "factors_sha256": self.edit.factors_sha256}

    @property
    def body(self) -> dict[str, Any]:
        """What the ledger here will say of how it was found."""
        return self.edit.found.model_dump(mode="json")


# writing


def described(
    model: Mapping[str, Any],
    version: int,
    past: Sequence[Entry],
    standing: Sequence[Entry],
    asked: Mapping[str, Any],
) -> Set:
    """The set of the edits that stand at a version. `past`: the ledger so far; `asked`: the request of each edit, by its id."""
    first = past[0].hash
    return Set(
        model=dict(model),
        version=version,
        state=past[version - 1].state,
        edits=[
            Edit(
                origin=Origin(
                    ledger=first,
                    edit=e.edit_id,
                    version=e.version,
                    actor=e.actor,
                    at=moment(e.at),
                    entry=e.hash,
                ),
                request=EditRequest.model_validate(
                    {k: v for k, v in asked[e.edit_id].items() if k != "origin"}
                ),
                found=Found(**{name: e.body[name] for name in FOUND}),
                factors_sha256=str(e.body["factors_sha256"]),
            )
            for e in standing
        ],
    )


def beginning(told: Set, sizes: Mapping[str, int]) -> bytes:
    """What the file of a set begins with; the vectors of its edits follow, in order. `sizes`: of these, in bytes."""
    said = canonical(told.model_dump(mode="json"))
    metadata = {"format": FORMAT, "set": said.decode(), "sha256": hashlib.sha256(said).hexdigest()}
    listed = [Described(e.origin.edit, "U8", (sizes[e.origin.edit],)) for e in told.edits]
    return safetensors_io.header(listed, metadata)


# reading


def read(data: bytes, fingerprint: str, info: Mapping[str, Any]) -> list[Given]:
    """The edits of a file, in the order of their ids. Raises InvalidInput when it is damaged, for another model, or not sound."""
    file = safetensors_io.read(data, _WHAT)
    told = _told(file)
    _check_model(told, fingerprint, info)
    names = [e.origin.edit for e in told.edits]
    if len(set(names)) < len(names) or set(names) != set(file.described):
        raise InvalidInput("the file is damaged: its edits and its tensors are not the same.")
    given = [_given(file, e, info) for e in told.edits]
    return sorted(given, key=lambda g: g.edit.origin.edit)


def _told(file: Read) -> Set:
    if file.metadata.get("format") != FORMAT:
        raise InvalidInput(
            f"the file is no exported set of edits (its metadata has no format {FORMAT!r}): give one made by "
            "`palimpsest export --format edits`."
        )
    said = file.metadata.get("set", "")
    if hashlib.sha256(said.encode()).hexdigest() != file.metadata.get("sha256"):
        raise _damaged("what it says of its edits")
    try:
        return Set.model_validate_json(said)
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidInput(
            f"the file is not sound: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from None


def _damaged(what: str) -> InvalidInput:
    return InvalidInput(
        f"the file was damaged or changed on its way: {what} has another digest. Export it again."
    )


def _check_model(told: Set, fingerprint: str, info: Mapping[str, Any]) -> None:
    """An edit is a function of its base model's weights: on any other it would be noise."""
    theirs = str(told.model.get("fingerprint"))
    if theirs != fingerprint:
        raise InvalidInput(
            f"the edits are of the model {str(told.model.get('name'))!r} with the fingerprint {theirs[:12]}, and the "
            f"resident one is {str(info.get('name'))!r} with {fingerprint[:12]}: serve the same base model in the same precision."
        )


def _given(file: Read, edit: Edit, info: Mapping[str, Any]) -> Given:
    name = edit.origin.edit
    factors = bytes(file.data[name])
    if hashlib.sha256(factors).hexdigest() != edit.factors_sha256:
        raise _damaged(f"the tensor {name}")
    try:
        _check_pieces(safetensors_io.read(factors, "it"), edit.found, info)
    except InvalidInput as error:
        raise InvalidInput(f"the vectors of {name} cannot be used: {error.detail}") from None
    return Given(edit, factors)


def _check_pieces(file: Read, found: Found, info: Mapping[str, Any]) -> None:
    """They are those of the method at its layers, of the model's shapes, and finite."""
    layers = found.hparams.get("layers")
    method = METHODS[found.method]
    if not isinstance(layers, list) or not all(
        isinstance(x, int) and 0 <= x < info["layers"] for x in layers
    ):
        raise InvalidInput("hparams.layers names no layers of the model.")
    shapes: Mapping[str, Sequence[int]] = info.get("weights") or {"mlp": (info["width"], info["inner_width"])}
    if method.associates:
        wanted = {n: s for x in layers for n, s in _association(str(x), shapes).items()}
    else:
        parts = [part for part in shapes if (part != "mlp") == (found.method == "ft-attn")]
        wanted = {f"weight.{x}.{part}": tuple(shapes[part]) for x in layers for part in parts}
    forms = {n for n in file.described if _is_form(n, layers)} if method.associates else set()
    if set(file.described) - forms != set(wanted) or len(forms) > len(layers):
        raise InvalidInput(f"they are not those of {found.method} at the layers {layers}.")
    for name, told in file.described.items():
        dtype, shape = ("F64", (1,)) if name in forms else ("F32", wanted[name])
        if (told.dtype, told.shape) != (dtype, shape):
            raise InvalidInput(
                f"{name} is {told.dtype} {list(told.shape)} and must be {dtype} {list(shape)}."
            )
        numbers = file.numbers(name)
        if not np.isfinite(numbers).all() or (name in forms and numbers.min() < 0):
            raise InvalidInput(f"{name} holds numbers that cannot be.")


def _association(layer: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The vectors of an association and their shapes."""
    d, D = shapes["mlp"]
    sizes = {"key": D, "direction": D, "value": d, "left": d, "right": D}
    return {f"layer.{layer}.{name}": (n,) for name, n in sizes.items()}


def _is_form(name: str, layers: Sequence[Any]) -> bool:
    words = name.split(".")
    return (
        len(words) == 4
        and words[0] == "layer"
        and words[2] == "form"
        and words[1] in map(str, layers)
        and words[3] in FORMS
    )


#: the forms in which associations are solved (`service/weights/composition.py`); what is not named is joint
FORMS = ("joint", "memit", "emmet", "alphaedit")
