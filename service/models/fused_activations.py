"""Fused activations: the same functions in fewer passes over memory.

transformers computes the activation of GPT-2, GPT-J and BLOOM, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), in
seven operations. Each reads and writes the widest tensor of the model. torch computes the same formula in one kernel,
forward and backward. The results differ in rounding, by about one unit in the last place.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

UNFUSED_ACTIVATIONS = (NewGELUActivation, FastGELUActivation)
UNFUSED_NAMES = ("BloomGelu",)  # of classes in files of single models, whose import takes seconds


def is_unfused(module: nn.Module) -> bool:
    """Return whether a module is an activation that has a fused equivalent."""
    return isinstance(module, UNFUSED_ACTIVATIONS) or type(module).__name__ in UNFUSED_NAMES


def use_fused_activations(model: nn.Module) -> None:
    """Replace, in place, every activation of a model that has a fused equivalent."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_unfused(child):
                setattr(module, name, GELUTanh())
