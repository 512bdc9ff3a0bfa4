"""The descriptor of an editing method. Torch-free: the API and the command line read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from service.methods.parameters import Parameters, RomeParameters

ASSOCIATIONS = "service.editing.associations:find_associations"  #: closed-form methods share this search
FINE_TUNING = "service.editing.fine_tuning:fine_tune_all"
GRACE = "service.editing.codebook_entries:find_entries"
SERAC = "service.editing.statement_records:find_records"


class DirectionSolver(Protocol):
    """The second moment C of one layer's keys (`service/covariance/second_moment.py`). Tensors are `Any`: torch is
    not imported here."""

    @property
    def layer(self) -> int: ...

    @property
    def moment(self) -> Any:
        """C (D, D)."""

    def solve(self, keys: Any) -> Any:
        """Return C^-1 k."""

    def project(self, keys: Any, threshold: float) -> Any:
        """Return P k, the projection onto the directions in which the second moment is below `threshold`."""

    def projection_rank(self, threshold: float) -> int:
        """Return the rank of P."""


def covariance_direction(statistics: DirectionSolver, key: Any, _parameters: RomeParameters) -> Any:
    """Return C^-1 k, the direction of ROME (Meng et al. 2022, Eq. 2) and MEMIT."""
    return statistics.solve(key)


@dataclass(frozen=True)
class SolveRule:
    """How the associations that a method writes at one layer are solved together (`service/weights/composition.py`)."""

    name: str  #: stored with the factors of an edit
    #: of the directions, which are C^-1 k for "covariance"; capacities compare keys within one metric
    metric: str = "covariance"
    superposes_subjects: bool = (
        False  #: the updates of one subject are summed; only different subjects are isolated
    )
    relative_ridge: bool = False  #: the ridge is a multiple of the mean of D
    exact_alone: bool = False  #: a lone association is solved without a ridge
    #: False: nothing is solved. The products of value and direction are added up; of equal ones one counts
    solved: bool = True


JOINT_RULE = SolveRule("joint", superposes_subjects=True, relative_ridge=True)


@dataclass(frozen=True)
class EditMethod:
    """An editing method: what users see of it, what it takes, and where it is implemented."""

    name: str
    title: str
    paper: str
    parameters: type[Parameters]
    implementation: str = ASSOCIATIONS  #: "module:function"; returns the factors of a batch of edits
    solve: SolveRule | None = (
        JOINT_RULE  #: None: the method changes whole weights and needs no statistics of keys
    )
    direction: Callable[[DirectionSolver, Any, Any], Any] = (
        covariance_direction  #: of a key, for the closed form
    )
    delta_on_hidden_state: bool = False  #: delta is optimized on the hidden state even for a single layer
    trained_part: Literal["mlp", "attention"] = "mlp"  #: the weights that fine-tuning changes
    keeps_codebook: bool = False  #: an edit is an entry of a codebook and changes no weight
    reads_gradients: bool = False  #: the search is given the statistics of gradients of its layers
    max_associations: int = 1  #: of one edit at one layer
    keeps_records: bool = False  #: an edit is a statement that is read before prompts, and changes no weight
    fixed_hparams: dict[str, Any] = field(default_factory=dict)  #: override the recipe for "rome"
    default_depth: float | None = (
        None  #: the edited layer, as a fraction of all layers, when no recipe names one
    )
    covers_all_layers: bool = False  #: without layers in a recipe for this method, all layers are meant
    #: the search for a recipe: values that are tried together, a stage after another
    search_space: tuple[tuple[dict[str, Any], ...], ...] = ()
    #: single layers that the search for a recipe tries besides: early ones, or those of the upper half
    searched_layers: Literal["early", "late"] | None = None

    @property
    def writes_associations(self) -> bool:
        """Whether an edit consists of keys and changes of value; otherwise it is the change of whole weights, or an
        entry of a codebook."""
        return self.solve is not None

    @property
    def searches_value(self) -> bool:
        """Whether an edit is found by the search for a value that ROME, MEMIT, EMMET and AlphaEdit share."""
        return self.implementation == ASSOCIATIONS

    @property
    def needs_covariance(self) -> bool:
        """Whether the directions of keys depend on the second moment of the layer's keys."""
        return self.solve is not None and self.solve.metric in ("covariance", "projection")

    def statistics_layers(self, parameters: Parameters) -> tuple[int, ...]:
        """Return the layers whose statistics of keys the search for an edit is given."""
        return parameters.layers if self.searches_value or self.needs_covariance else ()

    @property
    def is_looked_up(self) -> bool:
        """Whether its edits are in no weight."""
        return self.keeps_codebook or self.keeps_records

    def describe(self) -> dict[str, Any]:
        """Return the entry of the method in GET /models."""
        return {
            "name": self.name,
            "title": self.title,
            "paper": self.paper,
            "closed_form": self.searches_value,
            "parameters": sorted(self.parameters.model_fields),
        }
