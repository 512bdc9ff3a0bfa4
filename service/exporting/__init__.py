"""A version in forms that other programs read: a LoRA adapter, or the edited weights."""
