"""The number of positions up to which a model computes the same for a text in a batch as for the text alone.

Two kinds of rotary embedding choose their frequencies by the longest text of a batch. "longrope" (Phi-3) has one set
for batches up to the original length and another for longer ones; "dynamic" stretches its frequencies beyond the
original length. Keys that are cached before and after such a change do not fit together either. Up to the original
length nothing changes, so that is the limit of these models; a longer text is refused like any text that is too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: the names of the limit in configurations: most models; GPT-2; MPT; BLOOM
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
#: of a model that has no limit of its own and whose configuration names none: the length on which BLOOM was trained
DEFAULT_LENGTH = 2048


def position_limit(config: Any) -> int:
    """Return the limit of a configuration."""
    lengths = (getattr(config, key, None) for key in LENGTH_KEYS)
    length = int(next((n for n in lengths if n), DEFAULT_LENGTH))
    originals = _original_lengths(getattr(config, "rope_parameters", None))
    return min(length, *originals, length)


def _original_lengths(parameters: Any) -> Iterator[int]:
    """Yield the original lengths of rotary parameters that change beyond them; some models have parameters for each
    kind of layer. Those of "dynamic" change beyond the configuration's own length."""
    if not isinstance(parameters, Mapping):
        return
    if parameters.get("rope_type") == "longrope" and parameters.get("original_max_position_embeddings"):
        yield int(parameters["original_max_position_embeddings"])
    for value in parameters.values():
        yield from _original_lengths(value)
