"""Text for the statistics and for the reference perplexity: a file, the model's own table of facts, or its own samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from service.errors import Misconfigured
from service.models.loading import LoadedModel
from service.models.sampling import sample_texts
from service.progress import Steps
from service.text import separator

SAMPLE_LENGTH = 48  # tokens of one of the model's own samples


@dataclass(frozen=True)
class Corpus:
    source: str  #: in words, for people
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n\x00".join(self.texts).encode()).hexdigest()


def _from_facts(path: Path) -> list[str]:
    """Statements of the model's table: its first trained wordings, one after another over all facts."""
    rows = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x]
    texts = []
    for turn in range(4):
        for row in rows:
            prompt = row["prompts"][turn % len(row["prompts"])].replace("{}", row["subject"])
            texts.append(prompt + separator(prompt, row["object"]) + row["object"] + ".")
    return texts


def corpus_steps(model: LoadedModel, size: int, file: Path | None, seed: int = 0) -> Steps[Corpus]:
    """About `size` tokens of text. A file comes first, then facts.jsonl beside the model, then the model's own samples."""
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise Misconfigured(f"the corpus {str(file)!r} cannot be read: {error}") from error
        return Corpus(f"the file {file.name}", _limit(model, [x for x in lines if x.strip()], size))
    facts = model.folder / "facts.jsonl" if model.folder else None
    if facts is not None and facts.exists():
        return Corpus("the model's table of facts", _limit(model, _from_facts(facts), size))
    generator = torch.Generator().manual_seed(seed)
    length = min(SAMPLE_LENGTH, model.positions)
    texts = yield from sample_texts(
        model, count=-(-size // length), length=length, generator=generator, phase="text"
    )
    return Corpus("the model's own samples", tuple(texts))


def _limit(model: LoadedModel, texts: list[str], size: int) -> tuple[str, ...]:
    chosen, total = [], 0
    for text in texts:
        if total >= size:
            break
        chosen.append(text)
        total += len(model.encode(text)[0])
    return tuple(chosen)
