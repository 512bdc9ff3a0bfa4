"""Edit sets: edits exported from one ledger as one safetensors file, to be imported into another.

Each tensor is named by the id of an edit and holds the bytes of the safetensors file that `GET /edits/{id}/delta`
returns. The metadata describes the edits in JSON: request, provenance and origin. Its digest covers a digest of every
tensor and detects a damaged or modified file. It does not authenticate the author: anyone with the scope to edit may
import.

Free of torch. Everything in a file is checked against the model before it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from service.errors import InvalidInput
from service.kit import safetensors_io
from service.kit.large_json import parse_json
from service.kit.safetensors_io import ReadableFile, SafetensorsFile, TensorInfo
from service.kit.separator import Separator
from service.ledger.ledger import Entry, canonical_json, iso_utc
from service.methods.registry import METHODS, SOLVE_RULES
from service.schemas import MAX_HPARAMS, EditRequest, MethodName, Objective, Probes

FORMAT = "palimpsest-edits-2"
MAX_EDITS = 1000  #: edits in one file
MAX_HEADER = 16_000_000  #: bytes of the header of a file, which describes its edits
#: fields of a ledger entry's body that an export takes; the others come from the request or the importing service
PROVENANCE_FIELDS = (
    "method", "objective", "hparams", "strength", "resolved_true", "resolved_separator", "subject_token",
    "statistics", "corpus", "dtype", "device", "libraries",
)  # fmt: skip
_FILE_LABEL = "the file"
_CHUNK = 1_000_000  # bytes of a file that are read at once
MAX_MAGNITUDE = 1e30  # of a number in a tensor; products of larger ones leave the range of fp32
#: short texts by name, such as versions of libraries
Labels = Annotated[dict[str, Annotated[str, Field(max_length=200)]], Field(max_length=128)]


class _FileModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class SubjectTokenLabel(_FileModel):
    """The edited token of the subject, by its position in the prompt."""

    position: int = Field(ge=0)
    text: str = Field(max_length=1000)


class EditProvenance(_FileModel):
    """How an edit was computed, as recorded in its ledger."""

    method: MethodName
    objective: Objective
    hparams: dict[str, JsonValue] = Field(max_length=MAX_HPARAMS)
    strength: float = Field(gt=0, le=100)
    resolved_true: str = Field(max_length=500)
    resolved_separator: Separator | None = None  # None in files from before it was recorded
    subject_token: SubjectTokenLabel | None = None
    statistics: Labels
    corpus: str = Field(max_length=1000)
    dtype: str = Field(max_length=32)
    device: str = Field(max_length=200)
    libraries: Labels


class EditOrigin(_FileModel):
    """The ledger and the entry that an edit comes from."""

    ledger: str = Field(max_length=64, description="hash of the first entry of that ledger")
    edit: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$", description="id of the edit in that ledger")
    version: int = Field(ge=1, description="version at which it was applied")
    actor: str = Field(max_length=300)
    at: str = Field(max_length=40)
    entry: str = Field(max_length=64, description="hash of its entry in that ledger")


class ExportedEdit(_FileModel):
    """An edit of a set, without its tensors."""

    origin: EditOrigin
    request: EditRequest
    provenance: EditProvenance
    factors_sha256: str = Field(max_length=64)


class EditSet(_FileModel):
    """The metadata of a file."""

    model: dict[str, JsonValue] = Field(max_length=64)
    version: int = Field(ge=0)
    state: str = Field(max_length=64)
    edits: list[ExportedEdit] = Field(min_length=1, max_length=MAX_EDITS)


@dataclass(frozen=True)
class ImportedEdit:
    """An edit of a file that passed all checks."""

    edit: ExportedEdit
    _file: SafetensorsFile

    def read_factors(self) -> bytes:
        """Return the tensors of the edit, as a file."""
        return self._file.read(self.edit.origin.edit)

    @property
    def request(self) -> EditRequest:
        """Return the request of the import: the original one with the resolved hyperparameters, and to be committed.

        Its probes are the given ones. The service finds none for it: that would take longer than the rest of an import.
        """
        provenance, request = self.edit.provenance, self.edit.request
        changes = {
            "probes": Probes(
                paraphrase=request.given_paraphrases or [], neighborhood=request.given_neighbors or []
            ),
            "hparams": provenance.hparams,
            "method": provenance.method,
            "separator": provenance.resolved_separator,
            "dry_run": False,
        }
        return request.model_copy(update=changes)

    @property
    def identity(self) -> tuple[str, str]:
        """Return what identifies the edit in every ledger: its fact, and the digest of its tensors."""
        request = self.edit.request
        return request.fact.key, self.edit.factors_sha256

    @property
    def origin(self) -> dict[str, Any]:
        """Return the origin as the edit's resource and the importing ledger record it."""
        return {**self.edit.origin.model_dump(mode="json"), "factors_sha256": self.edit.factors_sha256}

    @property
    def body(self) -> dict[str, Any]:
        """Return the provenance that the importing ledger records."""
        return self.edit.provenance.model_dump(mode="json")


# writing


def build_edit_set(
    model: Mapping[str, Any],
    version: int,
    entries: Sequence[Entry],
    active: Sequence[Entry],
    requests: Mapping[str, Any],
) -> EditSet:
    """Return the set of the active edits, from all entries up to a version and the requests of the edits by id."""
    first = entries[0].hash
    return EditSet(
        model=dict(model),
        version=version,
        state=entries[version - 1].state,
        edits=[
            ExportedEdit(
                origin=EditOrigin(
                    ledger=first,
                    edit=e.edit_id,
                    version=e.version,
                    actor=e.actor,
                    at=iso_utc(e.at),
                    entry=e.hash,
                ),
                request=EditRequest.model_validate(
                    {k: v for k, v in requests[e.edit_id].items() if k != "origin"}
                ),
                provenance=EditProvenance(
                    **{name: e.body[name] for name in PROVENANCE_FIELDS if name in e.body}
                ),
                factors_sha256=str(e.body["factors_sha256"]),
            )
            for e in active
        ],
    )


def edit_set_header(edit_set: EditSet, sizes: Mapping[str, int]) -> bytes:
    """Return the header of a set's file. The tensors follow in the order of its edits; `sizes` are their bytes."""
    text = canonical_json(edit_set.model_dump(mode="json"))
    metadata = {
        "format": FORMAT,
        "set": text.decode(),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    tensor_infos = [TensorInfo(e.origin.edit, "U8", (sizes[e.origin.edit],)) for e in edit_set.edits]
    return safetensors_io.build_header(tensor_infos, metadata)


# reading


def read_edit_set(
    source: ReadableFile | bytes, fingerprint: str, info: Mapping[str, Any], max_edit_size: int
) -> list[ImportedEdit]:
    """Return the edits of a file, ordered by id. Raise InvalidInput if it is damaged, invalid, or for another model.

    The tensors of one edit are in memory at a time, at most `max_edit_size` bytes.
    """
    file = safetensors_io.read_safetensors(source, _FILE_LABEL, MAX_HEADER, MAX_EDITS)
    edit_set = _parse_edit_set(file)
    _check_model(edit_set, fingerprint, info)
    names = [e.origin.edit for e in edit_set.edits]
    if len(set(names)) < len(names) or set(names) != set(file.tensor_infos):
        raise InvalidInput("the file is damaged: its edits and its tensors do not match.")
    for edit in edit_set.edits:
        _check_edit(file, edit, info, max_edit_size)
    return sorted((ImportedEdit(e, file) for e in edit_set.edits), key=lambda g: g.edit.origin.edit)


def _parse_edit_set(file: SafetensorsFile) -> EditSet:
    if file.metadata.get("format") != FORMAT:
        raise InvalidInput(
            f"the file is not an edit set: its metadata lacks the format {FORMAT!r}. Give a file made by "
            "`palimpsest export --format edits`."
        )
    set_json = file.metadata.get("set", "").encode()
    if hashlib.sha256(set_json).hexdigest() != file.metadata.get("sha256"):
        raise _damaged_error("the description of its edits")
    try:
        return _validate_edit_set(parse_json(set_json))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise InvalidInput(
            f"the file is invalid: {'.'.join(map(str, first['loc']))}: {first['msg']}."
        ) from None
    except ValueError as error:
        raise InvalidInput(
            f"the file is invalid: the description of its edits cannot be read: {error}."
        ) from None


def _validate_edit_set(value: Any) -> EditSet:
    """Return the description of a set. Each edit is validated alone, because pydantic holds the interpreter's lock for
    a whole value."""
    edits = value.get("edits") if isinstance(value, dict) else None
    if not isinstance(edits, list) or len(edits) > MAX_EDITS:
        return EditSet.model_validate(value)
    return EditSet.model_validate(
        value | {"edits": [_validate_edit(place, e) for place, e in enumerate(edits)]}
    )


def _validate_edit(place: int, value: Any) -> ExportedEdit:
    try:
        return ExportedEdit.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(map(str, ("edits", place, *first["loc"])))
        raise InvalidInput(f"the file is invalid: {path}: {first['msg']}.") from None


def _damaged_error(what: str) -> InvalidInput:
    return InvalidInput(
        f"the file is damaged or modified: the digest of {what} does not match. Export it again."
    )


def _check_model(edit_set: EditSet, fingerprint: str, info: Mapping[str, Any]) -> None:
    """Raise InvalidInput if the set is for another base model: an edit depends on the weights that it was computed
    on.
    """
    exported_fingerprint = str(edit_set.model.get("fingerprint"))
    if exported_fingerprint != fingerprint:
        raise InvalidInput(
            f"the edits are for the model {str(edit_set.model.get('name'))!r} with the fingerprint {exported_fingerprint[:12]}, and the "
            f"served model is {str(info.get('name'))!r} with {fingerprint[:12]}: serve the same base model in the same precision."
        )


def _check_edit(
    file: SafetensorsFile, edit: ExportedEdit, info: Mapping[str, Any], max_edit_size: int
) -> None:
    name = edit.origin.edit
    size = file.tensor_infos[name].nbytes
    if size > max_edit_size:
        raise InvalidInput(
            f"the tensors of {name} have {size} bytes, and one edit at most {max_edit_size}, a third of the maximum size of a "
            "file: raise PALIMPSEST_MAX_IMPORT_BODY."
        )
    factors, digest = file.open(name), hashlib.sha256()
    while chunk := factors.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != edit.factors_sha256:
        raise _damaged_error(f"the tensor {name}")
    try:
        _check_factors(safetensors_io.read_safetensors(factors, "it"), edit.provenance, info)
    except InvalidInput as error:
        raise InvalidInput(f"the tensors of {name} are invalid: {error.detail}") from None


def _check_factors(file: SafetensorsFile, provenance: EditProvenance, info: Mapping[str, Any]) -> None:
    """Raise InvalidInput unless the tensors are those of the method at its layers, with the model's shapes, and
    finite.
    """
    layers = provenance.hparams.get("layers")
    method = METHODS[provenance.method]
    if not isinstance(layers, list) or not all(type(x) is int and 0 <= x < info["layers"] for x in layers):
        raise InvalidInput("hparams.layers must name layers of the model.")
    shapes: Mapping[str, Sequence[int]] = info.get("weights") or {"mlp": (info["width"], info["inner_width"])}
    if method.needs_covariance:
        expected_shapes = {n: s for x in layers for n, s in _association_shapes(str(x), shapes).items()}
    else:
        parts = [part for part in shapes if (part != "mlp") == (method.trained_part == "attention")]
        expected_shapes = {f"weight.{x}.{part}": tuple(shapes[part]) for x in layers for part in parts}
    mode_names = (
        {n for n in file.tensor_infos if _is_solve_mode(n, layers)} if method.needs_covariance else set()
    )
    if set(file.tensor_infos) - mode_names != set(expected_shapes) or len(mode_names) > len(layers):
        raise InvalidInput(f"their names are not those of {provenance.method} at the layers {layers}.")
    for name, tensor_info in file.tensor_infos.items():
        dtype, shape = ("F64", (1,)) if name in mode_names else ("F32", expected_shapes[name])
        if (tensor_info.dtype, tensor_info.shape) != (dtype, shape):
            raise InvalidInput(
                f"{name} is {tensor_info.dtype} {list(tensor_info.shape)} and must be {dtype} {list(shape)}."
            )
        numbers = file.to_numpy(name)
        low, high = numbers.min(initial=0), numbers.max(initial=0)  # NaN if one number is
        if not np.isfinite((low, high)).all() or (name in mode_names and low < 0):
            raise InvalidInput(f"{name} has values that are not finite, or negative where they must not be.")
        if max(-low, high) > MAX_MAGNITUDE:
            raise InvalidInput(f"{name} has values above {MAX_MAGNITUDE:g}.")


def _association_shapes(layer: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an association with their shapes."""
    d, D = shapes["mlp"]
    sizes = {"key": D, "direction": D, "value": d, "left": d, "right": D}
    return {f"layer.{layer}.{name}": (n,) for name, n in sizes.items()}


def _is_solve_mode(name: str, layers: Sequence[Any]) -> bool:
    parts = name.split(".")
    return (
        len(parts) == 4
        and parts[0] == "layer"
        and parts[2] == "form"
        and parts[1] in map(str, layers)
        and parts[3] in SOLVE_RULES
    )
