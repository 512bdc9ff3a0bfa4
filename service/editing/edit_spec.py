"""An edit that is wanted, with all that the search for it needs: what several methods share before they part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from service.editing.value_optimizer import Place, Rows, Wish, rows
from service.kit.text import Statement, words
from service.models.budget import block_operations, company_budget
from service.models.loading import LoadedModel, Site
from service.models.memory_estimates import edit_bytes
from service.recipes.recipe import FineTuneParameters, MemitParameters, Parameters
from service.schemas import Objective


@dataclass(frozen=True)
class Wanted(Wish):
    """One edit that associations are wanted for."""

    subject: str
    edit: str = ""
    method: str = "rome"

    @property
    def place(self) -> Place:
        """Where its delta is optimised: at the one layer it edits, or on the hidden state after the highest of several, as
        MEMIT and its kin do with one layer, too."""
        layers = self.parameters.layers
        return Place(max(layers), hidden=len(layers) > 1 or isinstance(self.parameters, MemitParameters))

    def operations(self, model: LoadedModel) -> int:
        """Floating-point operations of one optimisation step: forward, and the same again backward (methods G)."""
        suffix = sum(len(t.ids) - t.last_subject for t in self.rows.texts())
        return 2 * suffix * block_operations(model) * (model.layers - self.place.layer)

    def bytes(self, model: LoadedModel) -> int:
        """What the search takes at its peak."""
        texts = self.rows.texts()
        before = max(t.last_subject for t in texts)
        active = max(len(t.ids) - t.last_subject for t in texts)
        said = sum(map(len, self.rows.targets)) + 1
        return edit_bytes(model, len(texts), before, active, self.place.layer, said)


@dataclass(frozen=True)
class Training:
    """One edit that a weight is to be trained for: the bare statement, no contexts."""

    rows: Rows
    parameters: FineTuneParameters
    subject: str
    edit: str = ""
    method: str = "ft"
    objective: Objective = "write"
    noise: Tensor | None = field(default=None, repr=False, compare=False)  #: (n, d) on the subject

    def bytes(self, model: LoadedModel) -> int:
        """What the training takes at its peak: one row through the blocks and back, and for each entry of the weights its
        gradient, two moments of Adam, the weight itself in single precision and its change."""
        layers = self.parameters.layers
        texts = self.rows.texts()
        parts = model.reading(0) if self.method == "ft-attn" else [Site(0)]
        entries = len(layers) * sum(model.parameter(site).numel() for site in parts)
        length = max(len(t.ids) for t in texts)
        said = sum(map(len, self.rows.targets))
        return 20 * entries + edit_bytes(model, len(texts), 0, length, min(layers), said)


#: what an editor is asked for
Asked = Wanted | Training


def want(
    model: LoadedModel,
    contexts: Sequence[str],
    statement: Statement,
    target: str,
    parameters: Parameters,
    edit: str = "",
    method: str = "rome",
    objective: Objective = "write",
    noise: Tensor | None = None,
) -> Asked:
    """That the model, as it stands (the base model), say `target` after the statement; or, to erase, not say it. `noise` (n, d) is
    on the subject's embeddings during the search."""
    subject = words(statement.text[slice(*statement.span)])
    if isinstance(parameters, FineTuneParameters):
        bare = rows(model, statement, target, ())
        return Training(bare, parameters, subject, edit, method, objective, noise)
    texts = rows(model, statement, target, contexts, parameters.bare_keys)
    return Wanted(texts, parameters, subject, edit, method, objective=objective, noise=noise)


def batches(model: LoadedModel, edits: Iterable[Asked]) -> list[list[Asked]]:
    """Edits that are found side by side, in their order: of one place, and as many as one step has room for. A weight is trained
    for one edit at a time."""
    budget = company_budget(model)
    found: list[list[Asked]] = []
    room, place = 0, None
    for edit in edits:
        if isinstance(edit, Training):
            found.append([edit])
            place = None
            continue
        cost = edit.operations(model)
        if edit.place != place or cost > room:
            found.append([])
            room, place = budget, edit.place
        found[-1].append(edit)
        room -= cost
    return found
