"""An edit that is wanted, with all that the search for it needs: what several methods share before they part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from service.editing.value_optimizer import DeltaSite, TokenizedContexts, ValueSearchSpec, tokenize_contexts
from service.kit.text import Statement, normalize_whitespace
from service.models.budget import block_flops, group_budget
from service.models.loading import LoadedModel, WeightRef
from service.models.memory_estimates import edit_bytes
from service.recipes.recipe import FineTuneParameters, MemitParameters, Parameters
from service.schemas import Objective


@dataclass(frozen=True)
class ValueEditSpec(ValueSearchSpec):
    """One edit that associations are wanted for."""

    subject: str
    edit: str = ""
    method: str = "rome"

    @property
    def delta_site(self) -> DeltaSite:
        """Where its delta is optimised: at the one layer it edits, or on the hidden state after the highest of several, as
        MEMIT and its kin do with one layer, too."""
        layers = self.parameters.layers
        return DeltaSite(
            max(layers), on_hidden_state=len(layers) > 1 or isinstance(self.parameters, MemitParameters)
        )

    def flops_per_step(self, model: LoadedModel) -> int:
        """Floating-point operations of one optimisation step: forward, and the same again backward (methods G)."""
        suffix = sum(len(t.ids) - t.last_subject_index for t in self.tokenized.texts())
        return 2 * suffix * block_flops(model) * (model.num_layers - self.delta_site.layer)

    def peak_bytes(self, model: LoadedModel) -> int:
        """What the search takes at its peak."""
        texts = self.tokenized.texts()
        prefix_length = max(t.last_subject_index for t in texts)
        suffix_length = max(len(t.ids) - t.last_subject_index for t in texts)
        target_tokens = sum(map(len, self.tokenized.targets)) + 1
        return edit_bytes(
            model, len(texts), prefix_length, suffix_length, self.delta_site.layer, target_tokens
        )


@dataclass(frozen=True)
class FineTuneSpec:
    """One edit that a weight is to be trained for: the bare statement, no contexts."""

    tokenized: TokenizedContexts
    parameters: FineTuneParameters
    subject: str
    edit: str = ""
    method: str = "ft"
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)  #: (n, d) on the subject

    def peak_bytes(self, model: LoadedModel) -> int:
        """What the training takes at its peak: one row through the blocks and back, and for each entry of the weights its
        gradient, two moments of Adam, the weight itself in single precision and its change."""
        layers = self.parameters.layers
        texts = self.tokenized.texts()
        weight_refs = model.attention_weights(0) if self.method == "ft-attn" else [WeightRef(0)]
        entries = len(layers) * sum(model.parameter(site).numel() for site in weight_refs)
        length = max(len(t.ids) for t in texts)
        target_tokens = sum(map(len, self.tokenized.targets))
        return 20 * entries + edit_bytes(model, len(texts), 0, length, min(layers), target_tokens)


#: what an editor is asked for
EditSpec = ValueEditSpec | FineTuneSpec


def build_edit_spec(
    model: LoadedModel,
    contexts: Sequence[str],
    statement: Statement,
    target: str,
    parameters: Parameters,
    edit: str = "",
    method: str = "rome",
    objective: Objective = "write",
    noise: Tensor | None = None,
) -> EditSpec:
    """That the model, as it stands (the base model), say `target` after the statement; or, to erase, not say it. `noise` (n, d) is
    on the subject's embeddings during the search."""
    subject = normalize_whitespace(statement.text[slice(*statement.span)])
    if isinstance(parameters, FineTuneParameters):
        tokenized_prompt = tokenize_contexts(model, statement, target, ())
        return FineTuneSpec(tokenized_prompt, parameters, subject, edit, method, objective, noise)
    tokenized = tokenize_contexts(model, statement, target, contexts, parameters.bare_keys)
    return ValueEditSpec(tokenized, parameters, subject, edit, method, objective=objective, noise=noise)


def batch_edit_specs(model: LoadedModel, specs: Iterable[EditSpec]) -> list[list[EditSpec]]:
    """Edits that are found side by side, in their order: of one place, and as many as one step has room for. A weight is trained
    for one edit at a time."""
    budget = group_budget(model)
    groups: list[list[EditSpec]] = []
    remaining_budget, delta_site = 0, None
    for spec in specs:
        if isinstance(spec, FineTuneSpec):
            groups.append([spec])
            delta_site = None
            continue
        cost = spec.flops_per_step(model)
        if spec.delta_site != delta_site or cost > remaining_budget:
            groups.append([])
            remaining_budget, delta_site = budget, spec.delta_site
        groups[-1].append(spec)
        remaining_budget -= cost
    return groups
