"""The tensors of an edit, and how they are stored.

An edit consists of updates. An `Association` is one key and the change of value at it, at one layer. A `DenseUpdate`
is the change of a whole weight. `service/weights/composition.py` combines them into the weights of a version. A
`CodebookEntry` is looked up beside the weights (`service/codebooks/codebook.py`), and so is an association with a gate.
A `StatementRecord` is a statement that is read before prompts within its scope (`service/records/record_router.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from service.methods.method import JOINT_RULE, SolveRule
from service.methods.registry import SOLVE_RULES
from service.models.loading import WeightRef
from service.models.memory_estimates import COLUMN_BLOCK
from service.weights.gate_space import GateSpace, deserialize_gate_space
from service.weights.scope_classifier import PREFIX as SCOPE_PREFIX
from service.weights.scope_classifier import ScopeClassifier, deserialize_scope_classifier

DEFAULT_RIDGE = 1e-3  # eps of the mode "joint", as a multiple of the mean of D, when a recipe names none


@dataclass(frozen=True, order=True)
class SolveMode:
    """How the associations of one layer are solved together."""

    name: str = JOINT_RULE.name
    ridge: float = DEFAULT_RIDGE  #: of "joint": a multiple of the mean of D; of the others: the ridge itself

    @property
    def rule(self) -> SolveRule:
        """The rule of this mode, as its method declares it."""
        return SOLVE_RULES[self.name]

    def ridge_for(self, diagonal: Tensor) -> float:
        """Return the ridge that is added to the diagonal (n,) of the gram matrix."""
        if self.rule.relative_ridge:
            return self.ridge * float(diagonal.mean())
        return 0.0 if self.rule.exact_alone and len(diagonal) == 1 else self.ridge


JOINT = SolveMode()


@dataclass(frozen=True)
class Gate:
    """Where a gated association acts: at keys whose cosine in the gate space with one of its own exceeds a threshold
    and the cosine with every blocked key (`service/gating/gated_rows.py`)."""

    space: GateSpace
    keys: Tensor = field(repr=False)  #: its keys in the gate space, (m, r) in fp32, of norm 1
    blocked: Tensor = field(repr=False)  #: keys of other subjects that are near, (b, r); b can be 0
    threshold: float


@dataclass(frozen=True)
class Association:
    """One key and the change of value at it, at one layer, computed on the base model.

    Without a gate it is solved into the weight together with the others of its layer. With a gate it is looked up.
    """

    edit: str  #: id of the edit; updates are sorted by it
    subject: str
    layer: int
    key: Tensor = field(repr=False)  #: k (D,)
    direction: Tensor = field(repr=False)  #: C^-1 k (D,); AlphaEdit: P k
    value: Tensor = field(repr=False)  #: delta (d,): the change of the down-projection's output at k
    solve_mode: SolveMode = JOINT
    gate: Gate | None = None
    number: int = 0  #: of the associations of its edit at its layer

    @property
    def order(self) -> tuple[str, int]:
        """The key by which the associations of a layer are sorted."""
        return self.edit, self.number

    @property
    def weight_ref(self) -> WeightRef:
        return WeightRef(self.layer)

    @property
    def nbytes(self) -> int:
        of_gate = 0 if self.gate is None else self.gate.keys.nbytes + self.gate.blocked.nbytes
        return self.key.nbytes + self.direction.nbytes + self.value.nbytes + of_gate

    def scaled(self, strength: float) -> Association:
        """Return the association with its change of value multiplied by `strength`."""
        return replace(self, value=self.value * strength)

    def response_direction(self) -> Tensor:
        """Return C^-1 k / (k^T C^-1 k), (D,) in fp32: its product with a key is the share of the change there."""
        direction = self.direction.double()
        own = self.key.double() @ direction
        return (direction / own if own else torch.zeros_like(direction)).float()

    def rank_one(self) -> LowRank:
        """Return the update of the association alone: delta (C^-1 k)^T / (k^T C^-1 k + ridge); ROME (Meng et al.
        2022, Eq. 2) has no ridge. Where nothing is solved it is delta u^T, with the direction u."""
        key, direction = self.key.double(), self.direction.double()
        if not self.solve_mode.rule.solved:
            return LowRank(self.value.double()[:, None], direction[None, :])
        own = (key @ direction)[None]
        if not self.solve_mode.rule.superposes_subjects:
            own = own + self.solve_mode.ridge_for(own)
        return LowRank((self.value.double() / own)[:, None], direction[None, :])


@dataclass(frozen=True)
class DenseUpdate:
    """The change of a whole weight, as fine-tuning produces it."""

    edit: str
    subject: str
    weight_ref: WeightRef
    change: Tensor = field(repr=False)  #: (out, in)

    @property
    def layer(self) -> int:
        return self.weight_ref.layer

    @property
    def nbytes(self) -> int:
        return self.change.nbytes

    def scaled(self, strength: float) -> DenseUpdate:
        """Return the update multiplied by `strength`."""
        return replace(self, change=self.change * strength)


@dataclass(frozen=True)
class CodebookEntry:
    """A key of GRACE and the value that replaces the output of its layer near it (Hartvigsen et al. 2023), computed on
    the base model."""

    edit: str
    subject: str
    layer: int
    key: Tensor = field(repr=False)  #: q (D,): the down-projection's input at the last token of the prompt
    output: Tensor = field(repr=False)  #: f(q) (d,): its output there
    value: Tensor = field(repr=False)  #: v (d,): what replaces the output
    radius: float  #: e0: the radius of the ball around the key before other entries make it smaller
    label: tuple[int, ...]  #: the tokens of the object; those of an erased object after -1
    replayed: bool = False  #: the radii are those of the published code (`compat`)

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.output.nbytes + self.value.nbytes

    def scaled(self, strength: float) -> CodebookEntry:
        """Return the entry with its difference from the layer's own output multiplied by `strength`."""
        if strength == 1:
            return self
        return replace(self, value=self.output + strength * (self.value - self.output))


@dataclass(frozen=True)
class StatementRecord:
    """A record of SERAC: a statement that is read before the prompts within its scope (Mitchell et al. 2022)."""

    edit: str
    subject: str
    classifier: ScopeClassifier
    keys: Tensor = field(repr=False)  #: (m, k) in fp64: the embeddings of its texts
    statement: str  #: what is read, with what stands between it and the prompt
    names: tuple[str, ...]  #: of which a prompt must contain one; none: any prompt can be within its scope
    threshold: float  #: the least similarity of a prompt within its scope

    @property
    def layer(self) -> int:
        """The layer whose hidden states the classifier reads."""
        return self.classifier.layer

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + len(self.statement.encode())

    def scaled(self, strength: float) -> StatementRecord:
        """Return the record: a statement has no strength."""
        return self


WeightUpdate = Association | DenseUpdate
EditUpdate = WeightUpdate | CodebookEntry | StatementRecord
#: what the factors of an edit name by a digest, because many edits have it in common
SharedFactors = GateSpace | ScopeClassifier


def weight_updates(updates: Iterable[EditUpdate]) -> Iterator[WeightUpdate]:
    """Yield the updates that change a weight: those that are not looked up."""
    for update in updates:
        if isinstance(update, DenseUpdate) or (isinstance(update, Association) and update.gate is None):
            yield update


def gate_of(update: EditUpdate) -> Gate | None:
    """Return the gate of a gated association, or None for an update that is solved or added into a weight."""
    return update.gate if isinstance(update, Association) else None


def without_gate(update: EditUpdate) -> EditUpdate:
    """Return the update as one that is solved into the weight of its layer."""
    return replace(update, gate=None) if isinstance(update, Association) else update


@dataclass(frozen=True)
class LowRank:
    """A change of a weight, left @ right: left (d, n) in fp64; right (n, D), which is widened to fp64 where it is
    used."""

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)

    def column_blocks(self, device: torch.device | str = "cpu") -> Iterator[tuple[slice, Tensor]]:
        """Yield the change in blocks of columns: the slice of columns and the block (d, c) in fp64 on `device`."""
        left = self.left.to(device)
        for columns in column_slices(self.right):
            yield columns, left @ self.right[:, columns].to(device).double()

    def dense(self) -> Tensor:
        """Return the change as one matrix (d, D)."""
        return torch.cat([change for _, change in self.column_blocks()], 1)

    def norm(self) -> float:
        """Return the Frobenius norm. With few terms it is |left R^T|, where right^T = Q R; otherwise it is summed
        over all columns.

        The gram matrices of both factors give it too, but lose half of the digits when terms cancel.
        """
        if 2 * self.left.shape[1] < self.left.shape[0]:
            return float((self.left @ torch.linalg.qr(self.right.double().T, mode="r").R.T).norm())
        return math.hypot(*(float(change.norm()) for _, change in self.column_blocks()))


def column_slices(matrix: Tensor) -> list[slice]:
    """Return the columns of a matrix (n, D) as slices of at most COLUMN_BLOCK columns."""
    return [slice(at, at + COLUMN_BLOCK) for at in range(0, matrix.shape[1], COLUMN_BLOCK)]


def serialize_updates(updates: Sequence[EditUpdate]) -> bytes:
    """Return the updates of one edit as a safetensors file.

    An association stores its key, direction and value, the rank-one factors of the association alone, its solve mode
    unless that is "joint", and its gate if it has one. Further ones of its layer have the same mode, and their number
    after the layer in their names. A dense update stores the change of its weight, an entry of a codebook and a
    statement all their parts. Tensors of numbers are fp32; the keys of a statement are fp64.
    """
    tensors: dict[str, Tensor] = {}
    for update in updates:
        tensors |= {name: t.contiguous().cpu() for name, t in _update_tensors(update).items()}
    return save(tensors)


def _update_tensors(update: EditUpdate) -> dict[str, Tensor]:
    if isinstance(update, Association):
        return _association_tensors(update)
    if isinstance(update, StatementRecord):
        return _record_tensors(update)
    return _dense_update_tensors(update) if isinstance(update, DenseUpdate) else _entry_tensors(update)


def _association_tensors(a: Association) -> dict[str, Tensor]:
    factors, prefix = a.rank_one(), _association_prefix(a.layer, a.number)
    tensors = {
        f"{prefix}.key": a.key.float(),
        f"{prefix}.direction": a.direction.float(),
        f"{prefix}.value": a.value.float(),
        f"{prefix}.left": factors.left[:, 0].float(),
        f"{prefix}.right": factors.right[0].float(),
    }
    if a.solve_mode != JOINT and a.number == 0:
        tensors[f"{prefix}.form.{a.solve_mode.name}"] = torch.tensor(
            [a.solve_mode.ridge], dtype=torch.float64
        )
    if a.gate is not None:
        tensors[f"{prefix}.gate.keys"] = a.gate.keys.float()
        tensors[f"{prefix}.gate.blocked"] = a.gate.blocked.float()
        tensors[f"{prefix}.gate.threshold"] = torch.tensor([a.gate.threshold], dtype=torch.float32)
        tensors[f"{prefix}.gate.space"] = _digest_tensor(a.gate.space.digest)
    return tensors


def _association_prefix(layer: int, number: int) -> str:
    """Return what the names of the tensors of an association begin with."""
    return f"layer.{layer}.{number}" if number else f"layer.{layer}"


def _digest_tensor(digest: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(digest), dtype=torch.uint8)


def _read_digest(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).hex()


#: a digest -> what it is the digest of
FindShared = Callable[[str], SharedFactors]


def none_shared(digest: str) -> SharedFactors:
    """Raise KeyError: for factors that name nothing by a digest."""
    raise KeyError(f"{digest} is not at hand")


def _read_gate(tensors: Mapping[str, Tensor], layer: int, find_shared: FindShared) -> Gate | None:
    prefix = f"layer.{layer}.gate"
    if f"{prefix}.keys" not in tensors:
        return None
    space = find_shared(_read_digest(tensors[f"{prefix}.space"]))
    assert isinstance(space, GateSpace)
    return Gate(
        space,
        tensors[f"{prefix}.keys"],
        tensors[f"{prefix}.blocked"],
        float(tensors[f"{prefix}.threshold"]),
    )


def _dense_update_tensors(a: DenseUpdate) -> dict[str, Tensor]:
    return {f"weight.{a.weight_ref.layer}.{a.weight_ref.part}": a.change.float()}


def _entry_tensors(a: CodebookEntry) -> dict[str, Tensor]:
    parts = {
        "key": a.key.float(),
        "output": a.output.float(),
        "value": a.value.float(),
        "radius": torch.tensor([a.radius], dtype=torch.float64),
        "label": torch.tensor(a.label, dtype=torch.int64),
        "replayed": torch.tensor([a.replayed], dtype=torch.uint8),
    }
    return {f"codebook.{a.layer}.{name}": tensor for name, tensor in parts.items()}


def _read_entry(tensors: Mapping[str, Tensor], layer: int, edit: str, subject: str) -> CodebookEntry:
    prefix = f"codebook.{layer}"
    return CodebookEntry(
        edit,
        subject,
        layer,
        tensors[f"{prefix}.key"],
        tensors[f"{prefix}.output"],
        tensors[f"{prefix}.value"],
        float(tensors[f"{prefix}.radius"]),
        tuple(tensors[f"{prefix}.label"].tolist()),
        bool(tensors[f"{prefix}.replayed"]),
    )


def _record_tensors(a: StatementRecord) -> dict[str, Tensor]:
    text = json.dumps({"names": a.names, "statement": a.statement}, ensure_ascii=False, sort_keys=True)
    parts = {
        "classifier": _digest_tensor(a.classifier.digest),
        "keys": a.keys.double(),
        "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8),
        "threshold": torch.tensor([a.threshold], dtype=torch.float64),
    }
    return {f"record.{a.layer}.{name}": tensor for name, tensor in parts.items()}


def _read_record(
    tensors: Mapping[str, Tensor], layer: int, edit: str, subject: str, find_shared: FindShared
) -> StatementRecord:
    prefix = f"record.{layer}"
    classifier = find_shared(_read_digest(tensors[f"{prefix}.classifier"]))
    assert isinstance(classifier, ScopeClassifier)
    text = json.loads(bytes(tensors[f"{prefix}.text"].tolist()))
    return StatementRecord(
        edit,
        subject,
        classifier,
        tensors[f"{prefix}.keys"],
        text["statement"],
        tuple(text["names"]),
        float(tensors[f"{prefix}.threshold"]),
    )


def deserialize_shared(data: bytes) -> SharedFactors:
    """Return what `GateSpace.serialize` or `ScopeClassifier.serialize` stored."""
    names = load(data)
    is_scope = all(name.startswith(f"{SCOPE_PREFIX}.") for name in names)
    return deserialize_scope_classifier(data) if is_scope else deserialize_gate_space(data)


def shared_factors(updates: Iterable[EditUpdate]) -> Iterator[SharedFactors]:
    """Yield what updates name by a digest."""
    for update in updates:
        if isinstance(update, StatementRecord):
            yield update.classifier
        elif (gate := gate_of(update)) is not None:
            yield gate.space


def deserialize_updates(
    data: bytes, edit: str, subject: str, find_shared: FindShared = none_shared
) -> list[EditUpdate]:
    """Return the updates of one edit from the bytes of `serialize_updates`. `find_shared` returns what they name by a
    digest."""
    tensors = load(data)
    names = [name.split(".") for name in sorted(tensors)]
    modes = {
        int(words[1]): SolveMode(words[3], float(tensors[".".join(words)]))
        for words in names
        if words[2] == "form"
    }
    places = sorted(
        (int(words[1]), int(words[2]) if words[2].isdigit() else 0)
        for words in names
        if words[0] == "layer" and words[-1] == "key"
    )
    associations: list[EditUpdate] = [
        Association(
            edit,
            subject,
            x,
            tensors[f"{_association_prefix(x, number)}.key"],
            tensors[f"{_association_prefix(x, number)}.direction"],
            tensors[f"{_association_prefix(x, number)}.value"],
            modes.get(x, JOINT),
            _read_gate(tensors, x, find_shared) if number == 0 else None,
            number,
        )
        for x, number in places
    ]
    dense_weights = [WeightRef(int(words[1]), words[2]) for words in names if words[0] == "weight"]
    dense: list[EditUpdate] = [
        DenseUpdate(edit, subject, s, tensors[f"weight.{s.layer}.{s.part}"]) for s in sorted(dense_weights)
    ]
    entry_layers = sorted({int(words[1]) for words in names if words[0] == "codebook"})
    entries: list[EditUpdate] = [_read_entry(tensors, x, edit, subject) for x in entry_layers]
    record_layers = sorted({int(words[1]) for words in names if words[0] == "record"})
    records = [_read_record(tensors, x, edit, subject, find_shared) for x in record_layers]
    return [*associations, *dense, *entries, *records]
