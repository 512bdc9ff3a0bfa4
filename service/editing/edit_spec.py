"""The specification of an edit, the input of an editing method, and the factors that a method returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from service.covariance.gradient_statistics import GradientStatistics
from service.editing.subject_token import LAST, SubjectToken
from service.editing.suffix_batch import DeltaSite
from service.editing.tokenized_contexts import TokenizedContexts, tokenize_contexts
from service.editing.value_optimizer import ValueSearchSpec
from service.gating.gate_reference import GateReference, GateReport
from service.kit.separator import Separator
from service.kit.text import Statement, normalize_whitespace
from service.methods.parameters import (
    FineTuneParameters,
    GraceParameters,
    GradientParameters,
    NeuronParameters,
    Parameters,
    RomeParameters,
    SeracParameters,
)
from service.methods.registry import DEFAULT_METHOD, get_method
from service.models.budget import block_flops, group_budget
from service.models.loading import LoadedModel, WeightRef
from service.models.memory_estimates import edit_bytes
from service.models.token_batch import TokenizedStatement
from service.schemas import Objective
from service.weights.factors import EditUpdate
from service.weights.scope_classifier import ScopeClassifier


@dataclass(frozen=True)
class EditFactors:
    """The updates of one edit, and figures of the search for them."""

    updates: list[EditUpdate]
    losses: list[float]  #: of each optimization step
    delta_norm: float  #: |delta|, or the norm of the change of the trained weights
    value_norm: float  #: |v|, or the norm of the trained weights
    subject_token: SubjectToken | None = (
        None  #: the edited one; None where no single token is edited, or unknown
    )
    gate: GateReport | None = None  #: of a gated edit
    scope: ScopeReport | None = None  #: of an edit that is a statement


@dataclass(frozen=True)
class ScopeReport:
    """What is read before which prompts."""

    statement: str
    names: tuple[str, ...]  #: of which a prompt must contain one
    threshold: float
    classifier: str  #: its digest


@dataclass(frozen=True)
class ValueEditSpec(ValueSearchSpec):
    """An edit that is written as associations, gated ones with a reference."""

    subject: str
    edit: str = ""
    method: str = DEFAULT_METHOD
    gate_reference: GateReference | None = field(default=None, kw_only=True, repr=False, compare=False)

    @property
    def delta_site(self) -> DeltaSite:
        """Where delta is optimized: at the output of the edited layer, or on the hidden state after the highest of
        several layers.

        MEMIT, EMMET and AlphaEdit use the hidden state for a single layer, too.
        """
        layers = self.parameters.layers
        on_hidden_state = len(layers) > 1 or get_method(self.method).delta_on_hidden_state
        return DeltaSite(max(layers), on_hidden_state)

    def flops_per_step(self, model: LoadedModel) -> int:
        """Return the floating-point operations of one optimization step: a forward pass, and as much for the backward
        pass."""
        suffix = sum(len(t.ids) - t.edited_index for t in self.tokenized.texts())
        return 2 * suffix * block_flops(model) * (model.num_layers - self.delta_site.layer)

    def peak_bytes(self, model: LoadedModel) -> int:
        """Return the peak memory of the search, in bytes."""
        texts = self.tokenized.texts()
        prefix_length = max(t.edited_index for t in texts)
        suffix_length = max(len(t.ids) - t.edited_index for t in texts)
        target_tokens = sum(map(len, self.tokenized.targets)) + 1
        return edit_bytes(
            model, len(texts), prefix_length, suffix_length, self.delta_site.layer, target_tokens
        )


@dataclass(frozen=True)
class FineTuneSpec:
    """An edit for which weights are trained on the bare statement, without contexts."""

    tokenized: TokenizedContexts
    parameters: FineTuneParameters
    subject: str
    edit: str = ""
    method: str = "ft"
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)  #: (n, d) on the subject

    def trained_weights(self, model: LoadedModel) -> list[WeightRef]:
        """Return the weights that the method trains, in order of their layers."""
        layers = sorted(self.parameters.layers)
        if get_method(self.method).trained_part == "attention":
            return [site for x in layers for site in model.attention_weights(x)]
        return [WeightRef(x) for x in layers]

    def peak_bytes(self, model: LoadedModel) -> int:
        """Return the peak memory of the training, in bytes: one row through the blocks and back, and for each entry
        of the weights its gradient, two moments of Adam, the weight in single precision and its change."""
        texts = self.tokenized.texts()
        entries = sum(model.parameter(site).numel() for site in self.trained_weights(model))
        length = max(len(t.ids) for t in texts)
        target_tokens = sum(map(len, self.tokenized.targets))
        return 20 * entries + edit_bytes(
            model, len(texts), 0, length, min(self.parameters.layers), target_tokens
        )


@dataclass(frozen=True)
class CodebookSpec:
    """An edit that is an entry of a codebook. It has one text, the bare statement."""

    tokenized: TokenizedContexts
    parameters: GraceParameters
    subject: str
    edit: str = ""
    method: str = "grace"
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)  #: (n, d) on the subject

    @property
    def target(self) -> list[int]:
        """The object's tokens."""
        return self.tokenized.targets[0]

    @property
    def text(self) -> TokenizedStatement:
        """The statement with its object but the last token. The edited token is the last one of the prompt."""
        ids = self.tokenized.prompts[0].ids
        return TokenizedStatement(ids + self.target[:-1], (len(ids) - 1, len(ids)))

    def peak_bytes(self, model: LoadedModel) -> int:
        """Return the peak memory of the search, in bytes."""
        prefix_length, suffix_length = self.text.edited_index, len(self.target)
        (layer,) = self.parameters.layers
        return edit_bytes(model, 1, prefix_length, suffix_length, layer, suffix_length)


@dataclass(frozen=True)
class GradientSpec:
    """An edit from one backward pass over the bare statement."""

    tokenized: TokenizedContexts
    parameters: GradientParameters
    subject: str
    gradient_statistics: Mapping[int, GradientStatistics] = field(repr=False, compare=False)
    edit: str = ""
    method: str = "ultraedit"
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)  #: (n, d) on the subject

    def peak_bytes(self, model: LoadedModel) -> int:
        """Return the peak memory of the pass, in bytes."""
        texts, target_tokens = self.tokenized.texts(), len(self.tokenized.targets[0])
        return edit_bytes(model, 1, 0, len(texts[0].ids), min(self.parameters.layers), target_tokens)


@dataclass(frozen=True)
class NeuronSpec:
    """An edit of the neurons that express the statement, bare and after contexts."""

    tokenized: TokenizedContexts
    parameters: NeuronParameters
    subject: str
    edit: str = ""
    method: str = "kn"
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)  #: (n, d) on the subject

    def peak_bytes(self, model: LoadedModel) -> int:
        """Return the peak memory of the attribution of all prompts at one layer, in bytes."""
        rows = (self.parameters.nodes + 2) * self.tokenized.size
        longest = max(len(p.ids) for p in self.tokenized.prompts)
        suffix = max(len(t) for t in self.tokenized.targets)
        return edit_bytes(model, rows, longest - 1, suffix, min(self.parameters.layers), rows * suffix)


@dataclass(frozen=True)
class RecordSpec:
    """An edit that is a statement, read before prompts within its scope."""

    statement: Statement
    target: str
    parameters: SeracParameters
    subject: str
    classifier: ScopeClassifier
    separator: Separator | None = None
    edit: str = ""
    method: str = "serac"
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)

    def peak_bytes(self, model: LoadedModel) -> int:
        """Return the peak memory, in bytes: that of one text in the lower layers."""
        length = len(model.encode(self.statement.text)[0])
        return edit_bytes(model, 1, 0, length, model.num_layers - 1, 1)


EditSpec = ValueEditSpec | FineTuneSpec | CodebookSpec | GradientSpec | NeuronSpec | RecordSpec


def build_edit_spec(
    model: LoadedModel,
    contexts: Sequence[str],
    statement: Statement,
    target: str,
    parameters: Parameters,
    edit: str = "",
    method: str = DEFAULT_METHOD,
    objective: Objective = "write",
    noise: Tensor | None = None,
    separator: Separator | None = None,
    tokens_after: int = LAST,
    gate_reference: GateReference | None = None,
    gradient_statistics: Mapping[int, GradientStatistics] | None = None,
    classifier: ScopeClassifier | None = None,
) -> EditSpec:
    """Return the specification of an edit after which the model continues the statement with `target`, or no longer
    does so when the objective is to erase. `noise` (n, d) is added to the embeddings of the subject during the
    search. `tokens_after`: the subject's tokens after the edited one (`choose_subject_token`). `gate_reference`: of a
    gated edit. `gradient_statistics`: of the layers of a method that reads them. `classifier`: of an edit that is a
    statement."""
    subject = normalize_whitespace(statement.text[slice(*statement.span)])
    if isinstance(parameters, SeracParameters):
        assert classifier is not None
        return RecordSpec(
            statement, target, parameters, subject, classifier, separator, edit, method, objective, noise
        )
    if isinstance(parameters, NeuronParameters):
        with_contexts = tokenize_contexts(model, statement, target, contexts, chosen=separator)
        return NeuronSpec(with_contexts, parameters, subject, edit, method, objective, noise)
    if not isinstance(parameters, RomeParameters):
        tokenized_prompt = tokenize_contexts(model, statement, target, (), chosen=separator)
        if isinstance(parameters, GradientParameters):
            found = gradient_statistics or {}
            return GradientSpec(tokenized_prompt, parameters, subject, found, edit, method, objective, noise)
        if isinstance(parameters, GraceParameters):
            return CodebookSpec(tokenized_prompt, parameters, subject, edit, method, objective, noise)
        return FineTuneSpec(tokenized_prompt, parameters, subject, edit, method, objective, noise)
    restated = parameters.restatement_weight > 0
    tokenized = tokenize_contexts(
        model, statement, target, contexts, parameters.bare_keys, separator, restated, tokens_after
    )
    return ValueEditSpec(
        tokenized,
        parameters,
        subject,
        edit,
        method,
        objective=objective,
        noise=noise,
        gate_reference=gate_reference,
    )


def batch_edit_specs(model: LoadedModel, specs: Iterable[EditSpec]) -> list[list[EditSpec]]:
    """Return batches of edits that share a search, in the given order: edits with one implementation and one delta
    site, as many as the compute budget of a step allows. Weights, and values of a codebook, are trained for one edit
    at a time."""
    budget = group_budget(model)
    batches: list[list[EditSpec]] = []
    remaining_budget, current_key = 0, None
    for spec in specs:
        if not isinstance(spec, ValueEditSpec):
            batches.append([spec])
            current_key = None
            continue
        cost, key = spec.flops_per_step(model), (get_method(spec.method).implementation, spec.delta_site)
        if key != current_key or cost > remaining_budget:
            batches.append([])
            remaining_budget, current_key = budget, key
        batches[-1].append(spec)
        remaining_budget -= cost
    return batches
