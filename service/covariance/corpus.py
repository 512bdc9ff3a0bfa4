"""Text for the statistics and for the reference perplexity: a file or a folder of text, a public data set, the model's own table of
facts, or its own samples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from service.errors import Misconfigured
from service.kit.ids import new_id
from service.kit.steps import Steps
from service.kit.text import separator
from service.models.loading import LoadedModel
from service.models.sampling import sample_texts

HUB = "hub:"  # what stands before the name of a public data set
SAMPLES = "samples"  # what asks for the model's own samples
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


def corpus_steps(
    model: LoadedModel, size: int, file: Path | None, seed: int = 0, folder: Path | None = None
) -> Steps[Corpus]:
    """About `size` tokens of text. What is named comes first: a file or a folder, a text a line, or "hub:NAME" for a data set on a
    hub; then facts.jsonl beside the model, then the model's own samples. "samples" names those."""
    named = str(file) if file is not None else ""
    if named.startswith(HUB):
        return Corpus(
            f"the data set {named.removeprefix(HUB)}", _limit(model, _from_hub(named.removeprefix(HUB)), size)
        )
    if file is not None and named != SAMPLES:
        kind = "folder" if file.is_dir() else "file"
        return Corpus(f"the {kind} {file.name}", _limit(model, _lines(file), size))
    facts = model.folder / "facts.jsonl" if model.folder else None
    if named != SAMPLES and facts is not None and facts.exists():
        return Corpus("the model's table of facts", _limit(model, _from_facts(facts), size))
    texts = yield from _samples_steps(model, size, folder, seed)
    return Corpus("the model's own samples", tuple(texts))


def _samples_steps(model: LoadedModel, size: int, folder: Path | None, seed: int) -> Steps[list[str]]:
    """The model's own samples; made once for a folder, since they take a minute or more."""
    length = min(SAMPLE_LENGTH, model.positions)
    made_of = f"{model.fingerprint} {size} {seed} {length}"
    path = folder / f"samples-{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.json" if folder else None
    if path is not None and path.exists():
        return [str(text) for text in json.loads(path.read_text(encoding="utf-8"))]
    generator = torch.Generator().manual_seed(seed)
    texts = yield from sample_texts(
        model, count=-(-size // length), length=length, generator=generator, phase="text"
    )
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix("." + new_id("part"))  # other workers may share the folder
        part.write_text(json.dumps(texts), encoding="utf-8")
        part.replace(path)
    return texts


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, or of the .txt files of a folder in the order of their names; empty ones are left out."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise Misconfigured(
            f"the corpus {str(path)!r} holds no .txt file: name a folder that does, or a file."
        )
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                yield from (line.rstrip("\n") for line in lines if line.strip())
        except (OSError, UnicodeError) as error:
            raise Misconfigured(f"the corpus {str(file)!r} cannot be read: {error}") from error


def _from_hub(name: str) -> Iterator[str]:
    """Texts of a public data set, streamed: NAME or NAME/CONFIGURATION, such as "Salesforce/wikitext/wikitext-103-raw-v1"."""
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise Misconfigured(
            "a data set from a hub needs the package datasets: pip install -c constraints.txt -e '.[corpora]'"
        ) from None
    words = name.split("/")
    try:
        rows = load_dataset("/".join(words[:2]), *words[2:3], split="train", streaming=True)
        yield from (str(row["text"]) for row in rows if str(row.get("text") or "").strip())
    except Exception as error:  # whatever it is, it is about a name or a network
        raise Misconfigured(
            f"the data set {name!r} cannot be read: {error} Give a file or a folder of text, or the name of a data set with a "
            'column "text" on a hub that can be reached from here.'
        ) from error


def _limit(model: LoadedModel, texts: Iterable[str], size: int) -> tuple[str, ...]:
    chosen, total = [], 0
    for text in texts:
        if total >= size:
            break
        chosen.append(text)
        total += len(model.encode(text)[0])
    return tuple(chosen)
