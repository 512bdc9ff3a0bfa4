"""Exports of a version in formats that other programs read: a LoRA adapter, the edited weights, a whole model."""
