"""The layer that a scope classifier reads. Free of torch."""

from __future__ import annotations

from service.errors import InvalidInput
from service.methods.registry import get_method
from service.schemas import ScopePlan


def check_scope_layer(plan: ScopePlan, layers: int) -> int:
    """Return the layer that a plan names, or the default of the method. Raise InvalidInput for one that the model does
    not have."""
    layer = int((get_method("serac").default_depth or 0) * layers) if plan.layer is None else plan.layer
    if layer >= layers:
        raise InvalidInput(f"layer {layer} does not exist: the model has layers 0 to {layers - 1}.", "layer")
    return layer
