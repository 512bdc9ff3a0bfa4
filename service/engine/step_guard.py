"""The invariant of every step: between two steps no hook is installed and the model is the base model."""

from __future__ import annotations

from service.engine.versioned_model import VersionedModel
from service.models.hooks import installed_hooks


class StepGuardError(RuntimeError):
    """A step ended while a hook or a patch was still in place. It is a defect of the code of that step."""


def check_step(replica: VersionedModel, step: str) -> None:
    """Raise StepGuardError, which names the step, when it left a hook or a patch in place."""
    hooks, patches = installed_hooks(), replica.applied_patches
    if hooks or patches:
        raise StepGuardError(
            f"the step {step!r} left {hooks} hooks and {patches} patches in place. A stepper must close its "
            "contexts before it yields."
        )
