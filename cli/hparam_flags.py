"""Hyperparameters in messages of the service, in the form of the command line.

The service names them as the fields of a request: `"hparams": {"layers": [5]}` and `hparams.layers`.
"""

from __future__ import annotations

import json
import re

_OBJECT = re.compile(r'"hparams": (\{[^{}]*\})')
_FIELD = re.compile(r"\bhparams\.(\w+)")


def in_flags(text: str) -> str:
    """Return a message with `--hparam 'layers=[5]'` for `"hparams": {"layers": [5]}`, and `--hparam layers` for
    `hparams.layers`."""
    return _FIELD.sub(r"--hparam \1", _OBJECT.sub(_object_in_flags, text))


def _object_in_flags(match: re.Match[str]) -> str:
    try:
        values = json.loads(match[1])
    except ValueError:
        return match[0]
    return " ".join(
        f"--hparam '{name}={value if isinstance(value, str) else json.dumps(value)}'"
        for name, value in values.items()
    )
