"""The model info and tokenizer of a served model, without torch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = "The Eiffel Tower is located in the city of Paris. The Colosseum is located in the city of Rome."

INFO: dict[str, Any] = {
    "name": "tiny",
    "architecture": "gpt2",
    "layers": 4,
    "positions": 64,
    "vocabulary": 300,
    "width": 16,
    "device": "cpu",
    "recipe": {"source": "a test", "rome": {"layers": [1], "steps": 5}},
}


@lru_cache
def tokenizer_json() -> str:
    """Return a byte-level BPE tokenizer as JSON."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([TEXT], trainer)
    return raw.to_str()
