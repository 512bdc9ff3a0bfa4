"""An edit before it is committed: its resolved request, its factors, and what is measured of a version that contains
it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from service.editing.edit_spec import EditFactors
from service.editing.greedy_text import GreedyText
from service.editing.probes import Probe, ProbeResult
from service.methods.parameters import Parameters
from service.methods.registry import DEFAULT_METHOD
from service.schemas import EditRequest


@dataclass(frozen=True)
class FoundNeighbors:
    """The neighbours that the service found for an edit, with the greedy continuations at the version of the search."""

    version: int
    probes: list[Probe]
    texts: list[GreedyText]


@dataclass(frozen=True)
class ResolvedEdit:
    """The request of an edit with its hyperparameters and probes resolved."""

    request: EditRequest
    parameters: Parameters
    rewrite_probe: Probe
    paraphrase_probes: list[Probe]
    neighborhood_probes: list[Probe]
    found_neighbors: FoundNeighbors | None = None  #: where `neighborhood_probes` are not those of the request
    #: whether the model names the subject where it restates the fact (`restatement.py`); its objects are the subject
    name_probe: Probe | None = None
    layer_search: dict[str, Any] | None = None  #: how its layer was chosen, where the recipe left it open

    @property
    def probes(self) -> list[Probe]:
        """All probes: the rewrite probe, then the paraphrases, then the neighborhood."""
        return [self.rewrite_probe, *self.paraphrase_probes, *self.neighborhood_probes]

    @property
    def first_neighbor(self) -> int:
        """The index of the first neighborhood probe in `probes`."""
        return 1 + len(self.paraphrase_probes)

    @property
    def method(self) -> str:
        return self.request.method or DEFAULT_METHOD

    @property
    def fact(self) -> str:
        """The key of the fact: a later edit of the same fact supersedes this one."""
        return self.request.fact.key


@dataclass(frozen=True)
class CandidateEdit:
    """An edit that is not committed, with the factors that were computed on the base model."""

    resolved_edit: ResolvedEdit
    factors: EditFactors
    #: of a gated edit: the tokens of each of `ResolvedEdit.probes` at which its gate opens
    openings: list[list[str]] | None = None


@dataclass(frozen=True)
class VersionMeasurement:
    """The measurements of one version for one edit."""

    probe_results: list[ProbeResult]  #: of `ResolvedEdit.probes`, in their order
    preview_text: str  #: the greedy continuation of the prompt
    perplexity: float  #: on the reference texts
    holding_edits: set[str]  #: the active edits among the regression probes that hold
    #: of the rewrite probe when the superseded edits are left out; None when that makes no difference
    rewrite_without_superseded: ProbeResult | None = None
    name: ProbeResult | None = None  #: of `ResolvedEdit.name_probe`
    #: divergence of the subject's description from that of the base model (`description.py`)
    description_kl: float | None = None
    #: of `ResolvedEdit.neighborhood_probes`, in their order
    neighbor_texts: list[GreedyText] = field(default_factory=list)
    #: of `ResolvedEdit.paraphrase_probes`, in their order
    paraphrase_texts: list[GreedyText] = field(default_factory=list)
