"""The result of an edit as JSON, the reason of a rejection, and the provenance that the ledger records."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version as library_version
from typing import Any

from service.editing.candidate import CandidateEdit, ResolvedEdit, VersionMeasurement
from service.editing.context import EditorContext
from service.editing.guard import CheckName, GuardResult
from service.editing.probes import Probe, ProbeResult, edit_holds, neighbor_preserved
from service.editing.side_effects import side_effect_report
from service.editing.subject_token import SubjectToken
from service.engine.versioned_model import VersionedModel
from service.gating.gate_reference import GateReport
from service.kit.text import begins_with
from service.methods.registry import get_method
from service.models.loading import WeightRef
from service.scores.scores import share_preferring_new, share_preferring_true


def edit_report(
    candidate: CandidateEdit,
    guard_result: GuardResult,
    seconds: float,
    batched_with: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the `result` of an edit. `batched_with`: the edits that were measured in the same version."""
    resolved_edit, factors, openings = candidate.resolved_edit, candidate.factors, candidate.openings
    before, after = guard_result.before, guard_result.after
    first_neighbor = resolved_edit.first_neighbor

    def probabilities(i: int) -> dict[str, Any]:
        return {
            "prompt": resolved_edit.probes[i].prompt,
            "new": resolved_edit.probes[i].new,
            "true": resolved_edit.probes[i].true,
            "source": resolved_edit.probes[i].source,
            "before": before.probe_results[i].probabilities(),
            "after": after.probe_results[i].probabilities(),
            "opened": openings[i] if openings else None,
        }

    return {
        "target_true": resolved_edit.rewrite_probe.true,
        "objective": resolved_edit.request.objective,
        "rewrite": probabilities(0) | {"text_before": before.preview_text, "text_after": after.preview_text},
        "paraphrase": [
            probabilities(i) | _paraphrase_texts(resolved_edit.probes[i], before, after, i - 1)
            for i in range(1, first_neighbor)
        ],
        "neighborhood": [probabilities(i) for i in range(first_neighbor, len(resolved_edit.probes))],
        **side_effect_report(resolved_edit, before, after),
        "subject_name": _name_report(resolved_edit, before, after),
        "description_kl": {"before": before.description_kl, "after": after.description_kl},
        "scores": {"before": _scores(resolved_edit, before), "after": _scores(resolved_edit, after)},
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "delta_norm": factors.delta_norm,
        "norm_ratio": {weight_label(site): r for site, r in guard_result.norm_ratio.items()},
        "layers": sorted({p.layer for p in factors.updates}),
        "subject_token": _token_report(factors.subject_token),
        "gate": _gate_report(factors.gate),
        "scope": None if factors.scope is None else asdict(factors.scope),
        "ball": None if guard_result.ball is None else asdict(guard_result.ball),
        **({"layer_search": resolved_edit.layer_search} if resolved_edit.layer_search else {}),
        "strength": guard_result.strength,
        "optimisation": {"steps": len(factors.losses), "first": factors.losses[0], "last": factors.losses[-1]}
        if factors.losses
        else None,
        "regressed_edits": guard_result.regressed_edits,
        "conflicts": [
            {
                "edit": r.edit,
                "prompt": r.prompt,
                "target_new": r.target_new,
                "probability": r.probability,
                "cosine": r.cosine,
            }
            for r in guard_result.conflicts
        ],
        "supersedes": list(guard_result.supersedes),
        "capacity": {str(layer): left for layer, left in sorted(guard_result.capacity.items())},
        "batched_with": list(batched_with),
        "guard": {
            "passed": guard_result.passed,
            "checks": [
                {"name": str(c.name), "passed": c.passed, "figure": c.figure, "limit": c.limit}
                for c in guard_result.checks
            ],
        },
        "reason": _rejection_reason(guard_result),
        "seconds": round(seconds, 3),
    }


def _paraphrase_texts(
    probe: Probe, before: VersionMeasurement, after: VersionMeasurement, number: int
) -> dict[str, Any]:
    """Return what the model says after a paraphrase, and whether that follows the edit: it begins with the new object;
    to erase, not with the true one."""
    text_before, text_after = (m.paraphrase_texts[number].text for m in (before, after))
    says_object = begins_with(text_after, probe.new)
    return {
        "text_before": text_before,
        "text_after": text_after,
        "follows": not says_object if probe.objective == "erase" else says_object,
    }


def _name_report(
    resolved_edit: ResolvedEdit, before: VersionMeasurement, after: VersionMeasurement
) -> dict[str, Any] | None:
    """Return the probability of the subject's name where the model restates the fact, before and after."""
    if resolved_edit.name_probe is None or before.name is None or after.name is None:
        return None
    return {
        "prompt": resolved_edit.name_probe.prompt,
        "before": before.name.joint_probability,
        "after": after.name.joint_probability,
    }


def _token_report(token: SubjectToken | None) -> dict[str, Any] | None:
    """Return the position of the edited token in the prompt, and its text."""
    return None if token is None else asdict(token)


def _gate_report(gate: GateReport | None) -> dict[str, Any] | None:
    """Return how well the gate of a gated edit distinguishes its subject; None for an edit in the weights."""
    return None if gate is None else {**asdict(gate), "is_apart": gate.is_apart}


def _scores(resolved_edit: ResolvedEdit, measurement: VersionMeasurement) -> dict[str, float | None]:
    """Return ES, PS and NS (Meng et al. 2022, section 3.3). To erase or amplify: the shares of the prompts on which
    the edit holds, and of the neighborhood that keeps its answer."""
    first_neighbor = resolved_edit.first_neighbor
    if resolved_edit.request.objective == "write":
        log_p = [(a.new, a.true) for a in measurement.probe_results]
        return {
            "ES": share_preferring_new(log_p[:1]),
            "PS": share_preferring_new(log_p[1:first_neighbor]),
            "NS": share_preferring_true(log_p[first_neighbor:]),
        }
    probe_results = list(zip(resolved_edit.probes, measurement.probe_results, strict=True))

    def share(holds: Callable[[Probe, ProbeResult], bool], selected: slice) -> float | None:
        outcomes = [holds(probe, result) for probe, result in probe_results[selected]]
        return sum(outcomes) / len(outcomes) if outcomes else None

    return {
        "ES": share(edit_holds, slice(0, 1)),
        "PS": share(edit_holds, slice(1, first_neighbor)),
        "NS": share(neighbor_preserved, slice(first_neighbor, None)),
    }


def weight_label(site: WeightRef) -> str:
    """Return the name of an edited weight in a report: the layer, with the part unless it is the MLP's."""
    return str(site.layer) if site.part == "mlp" else f"{site.layer}.{site.part}"


_EFFICACY_REASONS = {
    "write": "the edit has no effect: the new object is not more probable than the old one",
    "erase": "the edit has too little effect: the true object is still generated, or too little of its probability is gone",
    "amplify": "the edit has too little effect: the true object is not generated, or its probability rose too little",
}
_REASONS = {
    CheckName.PROBABILITY: "the new object is less probable than required",
    CheckName.PARAPHRASE: "too few paraphrases prefer the new object",
    CheckName.NEIGHBORHOOD: "too many neighborhood prompts lost their answer",
    CheckName.SUBJECT: "the model no longer names the subject where it restates the fact: the edit changed which subject it reads",
    CheckName.DESCRIPTION: "the model's description of the subject changed too much",
    CheckName.PERPLEXITY: "the perplexity on plain text rose too much",
    CheckName.NORM: "the change of the weight is too large",
    CheckName.CAPACITY: "active edits occupy too much of the edit's key: revert some, or name other layers",
    CheckName.CONFLICT: "an active edit covers the same relation in other words",
    CheckName.REGRESSIONS: "other active edits would no longer hold",
}


def _rejection_reason(guard_result: GuardResult) -> str | None:
    """Return the failed checks as a sentence, or None when all passed."""
    reasons = _REASONS | {CheckName.EFFICACY: _EFFICACY_REASONS[guard_result.objective]}
    failed = [
        f"{reasons[CheckName(c.name)]} ({c.figure:.3g}, limit {c.limit:.3g})"
        for c in guard_result.checks
        if not c.passed
    ]
    return "; ".join(failed) or None


def build_provenance(
    replica: VersionedModel,
    context: EditorContext,
    resolved_edit: ResolvedEdit,
    guard_result: GuardResult,
    subject_token: SubjectToken | None,
) -> dict[str, Any]:
    """Return what the ledger records of the computation, so that repeating it gives the same factors."""
    model, layers = replica.base, resolved_edit.parameters.layers
    method = get_method(resolved_edit.method)
    statistics = {
        str(x): context.statistics[x].digest for x in method.statistics_layers(resolved_edit.parameters)
    }
    if method.reads_gradients:
        statistics |= {f"gradients.{x}": context.gradient_statistics[x].digest for x in layers}
    return {
        "method": resolved_edit.method,
        "objective": resolved_edit.request.objective,
        "hparams": resolved_edit.parameters.model_dump(mode="json"),
        "strength": guard_result.strength,
        "resolved_true": resolved_edit.rewrite_probe.true,
        "resolved_separator": resolved_edit.rewrite_probe.separator,
        "subject_token": _token_report(subject_token),
        "supersedes": list(guard_result.supersedes),
        "statistics": statistics,
        "corpus": context.corpus.digest,
        "dtype": str(model.weight(layers[0]).dtype).removeprefix("torch."),
        "device": str(model.device),
        "libraries": {name: library_version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "fingerprint": model.fingerprint,
    }
