"""The edited layer of a model without a recipe: the first edit is tried at a few layers, and the best one is kept.

A dry run can try layers of any model.

A layer's score is the harmonic mean of three shares, for the edit alone on the base model: the probability of the new
object after the prompt (efficacy), and after the paraphrases and the prompt behind texts that the optimization did not
see (generality), and what does not change (specificity): the neighbours, and the predictions for the subject in other
sentences and for plain text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

from service.editing.candidate import ResolvedEdit
from service.editing.context import EditorContext
from service.editing.edit_spec import EditSpec
from service.editing.find_factors import find_batch_factors
from service.editing.probes import Probe, ProbeResult, edit_holds, probe_fits, run_probes
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.kit.steps import Phase, Progress, Stepper, report_as
from service.kit.time_estimate import with_estimate
from service.methods.parameters import RomeParameters, SeracParameters
from service.methods.registry import get_method
from service.models.scoring import measure_drift
from service.recipes.default import can_try_layers
from service.recipes.recipe import Recipe
from service.scores.scores import harmonic_mean

CRITERION = "harmonic mean of efficacy, generality and specificity of this edit alone"
UNSEEN_CONTEXTS = 4  # texts before the prompt that the optimization did not see
UNSEEN_SEED_OFFSET = 1  # of their seed, from that of the contexts of the optimization
PLAIN_TEXTS = 4
TRIAL_STEPS = 10  # optimization steps of a trial, half of those of the default recipe
#: sentences about the subject whose predictions should stay
DESCRIPTIONS = ("{}", "{} is", "Everybody knows that {}")


@dataclass(frozen=True)
class LayerTrial:
    """What an edit does at one layer. One that cannot be carried out has a reason and the score 0."""

    layer: int
    efficacy: float = 0.0
    generality: float = 0.0
    specificity: float = 0.0
    score: float = 0.0
    holds: bool = False  #: whether the edit has its effect after its prompt
    seconds: float = 0.0
    reason: str | None = None


def must_choose_layer(context: EditorContext, resolved_edit: ResolvedEdit) -> bool:
    """Whether the recipe leaves the layer of this edit open, and the request names none."""
    recipe, method = context.recipe, get_method(resolved_edit.method)
    return (
        recipe is not None
        and bool(recipe.candidate_layers)
        and can_try_layers(method)
        and "layers"
        not in {**recipe.methods.get(method.name, {}), **(resolved_edit.request.hparam_overrides or {})}
    )


def choose_layer(
    replica: VersionedModel,
    context: EditorContext,
    resolved_edit: ResolvedEdit,
    specs: dict[int, EditSpec],
) -> Stepper[tuple[ResolvedEdit, Recipe | None]]:
    """Return the edit at the best layer, and the recipe with it; None when the edit fails at all of them.

    `specs`: of the edit at each layer.
    """
    recipe = context.recipe
    assert recipe is not None
    trials = yield from with_estimate(_try_all(replica, context, resolved_edit, specs), {Phase.SEARCH: 1.0})
    best = max(trials, key=lambda trial: trial.score)
    report = {"layer": best.layer, "criterion": CRITERION, "tried": [asdict(trial) for trial in trials]}
    chosen = replace(at_layer(resolved_edit, best.layer), layer_search=report)
    if not best.holds:
        return chosen, None
    tried = ", ".join(str(trial.layer) for trial in trials)
    provisional = recipe.model_copy(
        update={
            "source": f"provisional: the first edit was best at layer {best.layer} of {tried}; `palimpsest tune` replaces it",
            "rome": recipe.rome.model_copy(update={"layers": (best.layer,)}),
            "candidate_layers": (),
            "figures": {"layer_search": report},
        }
    )
    return chosen, provisional


def at_layer(resolved_edit: ResolvedEdit, layer: int, **changes: object) -> ResolvedEdit:
    """Return the same edit at another layer, with other changes of its hyperparameters."""
    update = {"layers": (layer,), **changes}
    return replace(resolved_edit, parameters=resolved_edit.parameters.model_copy(update=update))


def trial_of(resolved_edit: ResolvedEdit, layer: int) -> ResolvedEdit:
    """Return the edit as it is tried at a layer."""
    parameters = resolved_edit.parameters
    assert not isinstance(parameters, SeracParameters)  # whose layer is that of its classifier
    return at_layer(resolved_edit, layer, steps=min(TRIAL_STEPS, parameters.steps))


def _try_all(
    replica: VersionedModel,
    context: EditorContext,
    resolved_edit: ResolvedEdit,
    specs: dict[int, EditSpec],
) -> Stepper[list[LayerTrial]]:
    yield from context.get_statistics(sorted(specs))
    trials: list[LayerTrial] = []
    for layer, spec in specs.items():
        progress = Progress(Phase.SEARCH, len(trials), len(specs), f"layer {layer}")
        yield progress
        trials.append(
            (yield from report_as(_try_layer(replica, context, resolved_edit, layer, spec), progress))
        )
    return trials


def _try_layer(
    replica: VersionedModel, context: EditorContext, resolved_edit: ResolvedEdit, layer: int, spec: EditSpec
) -> Stepper[LayerTrial]:
    started = time.monotonic()
    try:
        statistics = yield from context.get_statistics([layer])
        (factors,) = yield from find_batch_factors(replica.base, statistics, [spec])
    except InvalidInput as error:
        return LayerTrial(layer, reason=error.detail)
    patch = yield from replica.compose_patch_in_steps(factors.updates)
    unseen = yield from _unseen_probes(replica, context, resolved_edit)
    probes = [*resolved_edit.probes, *unseen]
    results = yield from replica.step_with_patch(patch, run_probes(replica.base, probes))
    drift = yield from measure_drift(
        replica.base, _texts_to_keep(context, resolved_edit), partial(replica.use_patch, patch)
    )
    shares = [_share(probe, result) for probe, result in zip(probes, results, strict=True)]
    first, end = resolved_edit.first_neighbor, len(resolved_edit.probes)
    efficacy = shares[0]
    generality = _mean(shares[1:first] + shares[end:]) if first > 1 or unseen else efficacy
    kept = (
        [_kept(result) for result in results[first:end]] if resolved_edit.request.objective == "write" else []
    )
    specificity = _mean([*([_mean(kept)] if kept else []), math.exp(-max(0.0, drift.kl))])
    scores = (efficacy, generality, specificity)
    if not all(map(math.isfinite, (*scores, drift.kl))):
        return LayerTrial(layer, reason="the edited patch give no finite probabilities")
    return LayerTrial(
        layer,
        *scores,
        harmonic_mean(scores),
        edit_holds(probes[0], results[0]),
        round(time.monotonic() - started, 3),
    )


def _unseen_probes(
    replica: VersionedModel, context: EditorContext, resolved_edit: ResolvedEdit
) -> Stepper[list[Probe]]:
    """Return the prompt after texts that the optimization does not see, as far as it fits into the model."""
    parameters, probe = resolved_edit.parameters, resolved_edit.rewrite_probe
    seed = (parameters.seed if isinstance(parameters, RomeParameters) else 0) + UNSEEN_SEED_OFFSET
    contexts = yield from context.get_contexts(UNSEEN_CONTEXTS, seed)
    statement = resolved_edit.request.statement
    probes = [replace(probe, prompt=statement.with_context(f"{text}. ").text) for text in contexts if text]
    return [p for p in probes if probe_fits(replica.base, p)]


def _texts_to_keep(context: EditorContext, resolved_edit: ResolvedEdit) -> list[str]:
    subject = resolved_edit.request.subject
    plain = context.reference_texts
    plain = plain[:: max(1, len(plain) // PLAIN_TEXTS)][:PLAIN_TEXTS]
    return [*(text.replace("{}", subject) for text in DESCRIPTIONS), *plain]


def _share(probe: Probe, result: ProbeResult) -> float:
    """Return the probability of the object, or to erase it that of all others."""
    p = result.joint_probability
    return 1 - p if probe.objective == "erase" else p


def _kept(result: ProbeResult) -> float:
    """Return the share of the probability of both objects that the true one has."""
    return 1 / (1 + math.exp(min(700.0, result.new - result.true)))


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)
