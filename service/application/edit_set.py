"""Edit sets: edits exported from one ledger as one safetensors file, to be imported into another.

Each tensor is named by the id of an edit and holds the bytes of the safetensors file that `GET /edits/{id}/delta`
returns. A further tensor, named by its digest, holds each gate space of gated edits, and each classifier of statement
records, as the ledger stores it, once. The metadata describes the edits in JSON: request, provenance and origin. Its
digest covers a digest of every tensor and detects a damaged or modified file; what edits share is covered by the edits,
whose tensors name its digest. It does not authenticate the author: anyone with the scope to edit may import.

Free of torch. Everything in a file is checked against the model before it is used.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from service.application.edit_set_records import RECORD_PARTS, check_classifier, check_record
from service.application.tensor_checks import MAX_MAGNITUDE, check_numbers, check_tensor, clamp
from service.errors import InvalidInput
from service.kit import safetensors_io
from service.kit.large_json import parse_json
from service.kit.safetensors_io import ReadableFile, SafetensorsFile, TensorInfo
from service.kit.separator import Separator
from service.ledger.ledger import Entry, canonical_json, iso_utc
from service.methods.gate_sizes import MAX_BLOCKED, MAX_KEYS, SKETCH_SIZE
from service.methods.method import EditMethod
from service.methods.registry import METHODS, SOLVE_RULES
from service.schemas import MAX_HPARAMS, EditRequest, MethodName, Objective, Probes

FORMAT = "palimpsest-edits-2"
MAX_EDITS = 1000  #: edits in one file
MAX_TENSORS = 2 * MAX_EDITS  #: in one file: those of its edits, and at most one that each shares
MAX_HEADER = 16_000_000  #: bytes of the header of a file, which describes its edits
MAX_SKETCH_SIZE = 4 * SKETCH_SIZE  #: dimensions of a gate space
#: fields of a ledger entry's body that an export takes; the others come from the request or the importing service
PROVENANCE_FIELDS = (
    "method", "objective", "hparams", "strength", "resolved_true", "resolved_separator", "subject_token",
    "statistics", "corpus", "dtype", "device", "libraries",
)  # fmt: skip
_FILE_LABEL = "the file"
_CHUNK = 1_000_000  # bytes of a file that are read at once
NORM_TOLERANCE = 1e-3  # of a key of a gate, whose norm is 1 before it is rounded to fp32
_GATE_PARTS = ("keys", "blocked", "threshold", "space")  # the tensors of a gate
MAX_LABEL = 4096  #: tokens of the object of an edit
MAX_TOKEN_ID = 2**31
_ENTRY_DTYPES = {"radius": "F64", "replayed": "U8"}  # of an entry of a codebook; its other numbers are F32
#: the name in a file of what edits share
_SHARED = re.compile(r"(?:gate_space|scope_classifier)\.([0-9a-f]{64})")
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
    shared: Mapping[str, str]  #: the gate spaces and classifiers that it names: digest -> name in the file
    _file: SafetensorsFile

    def read_factors(self) -> bytes:
        """Return the tensors of the edit, as a file."""
        return self._file.read(self.edit.origin.edit)

    def read_shared(self, digest: str) -> bytes:
        """Return a gate space or classifier that it names, as a file."""
        return self._file.read(self.shared[digest])

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
    """Return the header of a set's file. The tensors follow in the order of `sizes`, which are their bytes: those of
    the edits by id, then what they share by `shared_names`."""
    text = canonical_json(edit_set.model_dump(mode="json"))
    metadata = {
        "format": FORMAT,
        "set": text.decode(),
        "sha256": hashlib.sha256(text).hexdigest(),
    }
    tensor_infos = [TensorInfo(name, "U8", (size,)) for name, size in sizes.items()]
    return safetensors_io.build_header(tensor_infos, metadata)


def gate_space_name(digest: str) -> str:
    """Return the name of the tensor that holds a gate space."""
    return f"gate_space.{digest}"


def classifier_name(digest: str) -> str:
    """Return the name of the tensor that holds a scope classifier."""
    return f"scope_classifier.{digest}"


def shared_names(factors: bytes) -> dict[str, str]:
    """Return the gate spaces and classifiers that the stored tensors of an edit name, with their names in a file, by
    digest."""
    file = safetensors_io.read_safetensors(factors, "the stored factors")
    spaces = [file.read(name).hex() for name in file.tensor_infos if name.endswith(".gate.space")]
    classifiers = [
        file.read(n).hex() for n in file.tensor_infos if n.startswith("record.") and n.endswith(".classifier")
    ]
    return {d: gate_space_name(d) for d in spaces} | {d: classifier_name(d) for d in classifiers}


# reading


def read_edit_set(
    source: ReadableFile | bytes, fingerprint: str, info: Mapping[str, Any], max_edit_size: int
) -> list[ImportedEdit]:
    """Return the edits of a file, ordered by id. Raise InvalidInput if it is damaged, invalid, or for another model.

    The tensors of one edit are in memory at a time, at most `max_edit_size` bytes.
    """
    file = safetensors_io.read_safetensors(source, _FILE_LABEL, MAX_HEADER, MAX_TENSORS)
    edit_set = _parse_edit_set(file)
    _check_model(edit_set, fingerprint, info)
    names = [e.origin.edit for e in edit_set.edits]
    shared_names = [name for name in file.tensor_infos if _SHARED.fullmatch(name)]
    if len(set(names)) < len(names) or {*names, *shared_names} != set(file.tensor_infos):
        raise InvalidInput("the file is damaged: its edits and its tensors do not match.")
    shared = {name: _read_shared_shape(file, name, info, max_edit_size) for name in shared_names}
    imported = [
        ImportedEdit(edit, _check_edit(file, edit, info, max_edit_size, shared), file)
        for edit in edit_set.edits
    ]
    if unnamed := set(shared).difference(*(g.shared.values() for g in imported)):
        raise InvalidInput(f"the file is invalid: no edit names the {_describe_shared(min(unnamed))}.")
    return sorted(imported, key=lambda g: g.edit.origin.edit)


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


@dataclass(frozen=True)
class _SharedShape:
    """A gate space or classifier of a file that passed all checks, without its numbers."""

    layer: int
    size: int  #: the number of its dimensions


#: the gate spaces and classifiers of a file by name
_Shared = Mapping[str, _SharedShape]


def _describe_shared(name: str) -> str:
    """Return "gate space DIGEST" or "scope classifier DIGEST"."""
    return name.replace("_", " ").replace(".", " ")


def _read_shared_shape(
    file: SafetensorsFile, name: str, info: Mapping[str, Any], max_size: int
) -> _SharedShape:
    """Return the shape of a gate space or classifier. Raise InvalidInput unless it is valid, and its content has the
    digest that names it."""
    _check_size(file, name, max_size)
    try:
        content = safetensors_io.read_safetensors(file.open(name), "it")
        is_space = name.startswith("gate_space.")
        layer, size, digest = (_check_gate_space if is_space else check_classifier)(content, info)
    except InvalidInput as error:
        raise InvalidInput(f"the {_describe_shared(name)} is invalid: {error.detail}") from None
    if not name.endswith(digest):
        raise _damaged_error(f"the {_describe_shared(name)}")
    return _SharedShape(layer, size)


def _check_gate_space(file: SafetensorsFile, info: Mapping[str, Any]) -> tuple[int, int, str]:
    """Return the layer, the dimensions and the digest of a gate space, as `service/weights/gate_space.py` defines it.
    Raise InvalidInput unless it is the sketch of a layer of the model, with finite numbers."""
    layer_of_name = {f"layer.{x}.sketch": x for x in range(info["layers"])}
    name = next(iter(file.tensor_infos), "")
    if len(file.tensor_infos) != 1 or name not in layer_of_name:
        raise InvalidInput("it must be the sketch of one layer of the model.")
    rows, inner_width = (*file.tensor_infos[name].shape, 0)[0], _weight_shapes(info)["mlp"][1]
    check_tensor(file.tensor_infos[name], "F32", (clamp(rows, 1, MAX_SKETCH_SIZE), inner_width))
    sketch = file.to_numpy(name)
    check_numbers(name, sketch)
    digest = hashlib.sha256(f"{layer_of_name[name]}:{sketch.shape}".encode())
    digest.update(sketch.data)
    return layer_of_name[name], rows, digest.hexdigest()


def _check_size(file: SafetensorsFile, name: str, max_size: int) -> None:
    size = file.tensor_infos[name].nbytes
    if size > max_size:
        raise InvalidInput(
            f"the tensors of {name} have {size} bytes, and one edit at most {max_size}, a third of the maximum size of a "
            "file: raise PALIMPSEST_MAX_IMPORT_BODY."
        )


def _check_edit(
    file: SafetensorsFile,
    edit: ExportedEdit,
    info: Mapping[str, Any],
    max_edit_size: int,
    shared: _Shared,
) -> dict[str, str]:
    """Return the gate spaces and classifiers that an edit names: digest -> name. Raise InvalidInput unless its tensors
    are valid."""
    name = edit.origin.edit
    _check_size(file, name, max_edit_size)
    factors, digest = file.open(name), hashlib.sha256()
    while chunk := factors.read(_CHUNK):
        digest.update(chunk)
    if digest.hexdigest() != edit.factors_sha256:
        raise _damaged_error(f"the tensor {name}")
    try:
        content = safetensors_io.read_safetensors(factors, "it")
        if METHODS[edit.provenance.method].keeps_records:
            return _check_record(content, edit, info, shared)
        digests = _check_factors(content, edit.provenance, info, shared)
        return {digest: gate_space_name(digest) for digest in digests}
    except InvalidInput as error:
        raise InvalidInput(f"the tensors of {name} are invalid: {error.detail}") from None


def _check_factors(
    file: SafetensorsFile,
    provenance: EditProvenance,
    info: Mapping[str, Any],
    shared: _Shared,
) -> frozenset[str]:
    """Return the digests of the gate spaces of an edit. Raise InvalidInput unless the tensors are those of the method
    at its layers, with the model's shapes, and finite, and its gates are valid.
    """
    layers = _layers_of(provenance, info)
    method = METHODS[provenance.method]
    is_gated = provenance.hparams.get("form") == "gated" and method.writes_associations
    gated_layers = sorted(set(layers)) if is_gated else []
    counts = _association_counts(file, layers, method)
    expected_shapes = _factor_shapes(provenance, counts, _weight_shapes(info))
    gate_names = {f"layer.{x}.gate.{part}" for x in gated_layers for part in _GATE_PARTS}
    mode_names = (
        {n for n in file.tensor_infos if _is_solve_mode(n, layers)} if method.writes_associations else set()
    )
    label_names = {f"codebook.{x}.label" for x in layers} if method.keeps_codebook else set()
    expected_names = {*expected_shapes, *gate_names, *label_names}
    if set(file.tensor_infos) - mode_names != expected_names or len(mode_names) > len(layers):
        raise InvalidInput(f"their names are not those of {provenance.method} at the layers {layers}.")
    for name in set(file.tensor_infos) - gate_names - label_names:
        dtype, shape = ("F64", (1,)) if name in mode_names else ("F32", expected_shapes[name])
        dtype = _ENTRY_DTYPES.get(name.rpartition(".")[2], dtype) if method.keeps_codebook else dtype
        check_tensor(file.tensor_infos[name], dtype, shape)
        is_positive = name in mode_names or name.endswith(".radius")
        check_numbers(name, file.to_numpy(name), may_be_negative=not is_positive)
    for name in label_names:
        _check_label(file, name)
    if method.keeps_codebook:
        _check_replayed(file, layers, provenance)
    return frozenset(_check_gate(file, x, shared) for x in gated_layers)


def _check_record(
    file: SafetensorsFile, edit: ExportedEdit, info: Mapping[str, Any], shared: _Shared
) -> dict[str, str]:
    """Return the classifier of a statement record: digest -> name. Raise InvalidInput unless the record is that of the
    edit's request, and its classifier is in the file."""
    provenance, request = edit.provenance, edit.request
    layers = _layers_of(provenance, info)
    if len(layers) != 1 or set(file.tensor_infos) != {f"record.{layers[0]}.{part}" for part in RECORD_PARTS}:
        raise InvalidInput(f"their names are not those of {provenance.method} at the layers {layers}.")
    named = f"record.{layers[0]}.classifier"
    check_tensor(file.tensor_infos[named], "U8", (32,))
    digest = file.read(named).hex()
    if (found := shared.get(classifier_name(digest))) is None:
        raise InvalidInput(f"{named} names the scope classifier {digest}, which the file lacks.")
    if found.layer != layers[0]:
        raise InvalidInput(f"{named} names the scope classifier of layer {found.layer}.")
    target = request.target_object or provenance.resolved_true
    between = provenance.resolved_separator
    check_record(file, layers[0], found.size, request, target, between, provenance.hparams)
    return {digest: classifier_name(digest)}


def _layers_of(provenance: EditProvenance, info: Mapping[str, Any]) -> list[int]:
    layers: Any = provenance.hparams.get("layers")
    if not isinstance(layers, list) or not all(type(x) is int and 0 <= x < info["layers"] for x in layers):
        raise InvalidInput("hparams.layers must name layers of the model.")
    return layers


def _weight_shapes(info: Mapping[str, Any]) -> Mapping[str, Sequence[int]]:
    """Return the editable weights of a layer with their shapes (out, in)."""
    return info.get("weights") or {"mlp": (info["width"], info["inner_width"])}


def _association_counts(file: SafetensorsFile, layers: Sequence[int], method: EditMethod) -> dict[int, int]:
    """Return how many associations of each layer an edit must have, by those that its file has: 1 to as many as the
    method can write. Of a method that looks at all layers those count that have any, and one must."""
    numbers = range(1, method.max_associations)
    counts = {x: 1 + sum(f"layer.{x}.{n}.key" in file.tensor_infos for n in numbers) for x in layers}
    if not method.covers_all_layers:
        return counts
    touched = {x: n for x, n in counts.items() if f"layer.{x}.key" in file.tensor_infos}
    return touched or counts


def _factor_shapes(
    provenance: EditProvenance, counts: Mapping[int, int], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an edit with their shapes, without solve modes and gates. `counts`: the associations of
    each layer."""
    method, layers = METHODS[provenance.method], list(counts)
    if method.writes_associations:
        places = [f"{x}.{n}" if n else str(x) for x, count in counts.items() for n in range(count)]
        return {n: s for place in places for n, s in _association_shapes(place, shapes).items()}
    if method.keeps_codebook:
        d, D = shapes["mlp"]
        sizes = {"key": D, "output": d, "value": d, "radius": 1, "replayed": 1}
        return {f"codebook.{x}.{name}": (n,) for x in layers for name, n in sizes.items()}
    parts = [part for part in shapes if (part != "mlp") == (method.trained_part == "attention")]
    return {f"weight.{x}.{part}": tuple(shapes[part]) for x in layers for part in parts}


def _check_label(file: SafetensorsFile, name: str) -> None:
    """Raise InvalidInput unless a label is a list of token ids, which may begin with -1."""
    count = (*file.tensor_infos[name].shape, 0)[0]
    check_tensor(file.tensor_infos[name], "I64", (clamp(count, 1, MAX_LABEL),))
    label = file.to_numpy(name)
    if label[0] < -1 or label[1:].min(initial=0) < 0 or not 0 <= label.max() < MAX_TOKEN_ID:
        raise InvalidInput(f"{name} must have token ids.")


def _check_replayed(file: SafetensorsFile, layers: Sequence[int], provenance: EditProvenance) -> None:
    """Raise InvalidInput unless the entries have the radii that the hyperparameters name."""
    replayed = int(provenance.hparams.get("compat") is not None)
    for name in (f"codebook.{x}.replayed" for x in layers):
        if file.to_numpy(name)[0] != replayed:
            raise InvalidInput(f"{name} must be {replayed}, as hparams.compat says.")


def _check_gate(file: SafetensorsFile, layer: int, shared: _Shared) -> str:
    """Return the digest of the space of a gate. Raise InvalidInput unless the space is in the file and of this layer,
    and the tensors of the gate are valid in it."""
    infos = {part: file.tensor_infos[f"layer.{layer}.gate.{part}"] for part in _GATE_PARTS}
    check_tensor(infos["space"], "U8", (32,))
    digest = file.read(infos["space"].name).hex()
    if (space := shared.get(gate_space_name(digest))) is None:
        raise InvalidInput(f"{infos['space'].name} names the gate space {digest}, which the file lacks.")
    if space.layer != layer:
        raise InvalidInput(f"{infos['space'].name} names the gate space of layer {space.layer}.")
    for part, least, most in (("keys", 1, MAX_KEYS), ("blocked", 0, MAX_BLOCKED)):
        rows = (*infos[part].shape, 0)[0]
        check_tensor(infos[part], "F32", (clamp(rows, least, most), space.size))
        _check_unit_rows(infos[part].name, file.to_numpy(infos[part].name))
    check_tensor(infos["threshold"], "F32", (1,))
    if not -1 < file.to_numpy(infos["threshold"].name)[0] < 1:  # NaN is not
        raise InvalidInput(f"{infos['threshold'].name} must be between -1 and 1.")
    _check_response(file, layer)
    return digest


def _check_unit_rows(name: str, rows: np.ndarray[Any, Any]) -> None:
    check_numbers(name, rows)
    norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    if (np.abs(norms - 1) > NORM_TOLERANCE).any():
        raise InvalidInput(f"{name} has keys whose norm is not 1.")


def _check_response(file: SafetensorsFile, layer: int) -> None:
    """Raise InvalidInput if the direction of a gated association, divided by its product with the key, is too large for
    fp32: its change would not be a number where the gate opens."""
    key, direction = (file.to_numpy(f"layer.{layer}.{n}").astype(np.float64) for n in ("key", "direction"))
    own = abs(float(key @ direction))
    if own and np.abs(direction).max() > own * MAX_MAGNITUDE:
        raise InvalidInput(f"layer.{layer}.direction is nearly orthogonal to the key.")


def _association_shapes(place: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an association with their shapes. `place`: its layer, and its number unless that is 0."""
    d, D = shapes["mlp"]
    sizes = {"key": D, "direction": D, "value": d, "left": d, "right": D}
    return {f"layer.{place}.{name}": (n,) for name, n in sizes.items()}


def _is_solve_mode(name: str, layers: Sequence[Any]) -> bool:
    parts = name.split(".")
    return (
        len(parts) == 4
        and parts[0] == "layer"
        and parts[2] == "form"
        and parts[1] in map(str, layers)
        and parts[3] in SOLVE_RULES
    )
