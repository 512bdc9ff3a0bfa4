"""The same functions in fewer passes over memory.

GPT-2's and GPT-J's activation, 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), comes from transformers as seven operations, each
of which reads and writes the widest tensor of the model; torch has it as one kernel, forward and backward. It is the same
formula: what differs is rounding, about one unit in the last place.
"""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

UNFUSED_ACTIVATIONS = (NewGELUActivation, FastGELUActivation)


def use_fused_activations(model: nn.Module) -> None:
    """Exchange, in place, every activation of a model that has a faster twin."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, UNFUSED_ACTIVATIONS):
                setattr(module, name, GELUTanh())
