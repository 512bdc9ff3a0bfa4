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
from service.kit.files import write_atomically
from service.kit.steps import Phase, Stepper
from service.kit.text import separator
from service.models.loading import LoadedModel
from service.models.sampling import sample_texts

HUB_PREFIX = "hub:"  # what stands before the name of a public data set
OWN_SAMPLES = "samples"  # what asks for the model's own samples
SAMPLE_LENGTH = 48  # tokens of one of the model's own samples


@dataclass(frozen=True)
class Corpus:
    source: str  #: in words, for people
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n\x00".join(self.texts).encode()).hexdigest()


def _facts_as_sentences(path: Path) -> list[str]:
    """Statements of the model's table: its first trained wordings, one after another over all facts."""
    rows = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x]
    texts = []
    for wording in range(4):
        for row in rows:
            prompt = row["prompts"][wording % len(row["prompts"])].replace("{}", row["subject"])
            texts.append(prompt + separator(prompt, row["object"]) + row["object"] + ".")
    return texts


def load_corpus(
    model: LoadedModel, max_tokens: int, file: Path | None, seed: int = 0, folder: Path | None = None
) -> Stepper[Corpus]:
    """About `size` tokens of text. What is named comes first: a file or a folder, a text a line, or "hub:NAME" for a data set on a
    hub; then facts.jsonl beside the model, then the model's own samples. "samples" names those."""
    source_name = str(file) if file is not None else ""
    if source_name.startswith(HUB_PREFIX):
        return Corpus(
            f"the data set {source_name.removeprefix(HUB_PREFIX)}",
            _limit_tokens(model, _stream_hub_dataset(source_name.removeprefix(HUB_PREFIX)), max_tokens),
        )
    if file is not None and source_name != OWN_SAMPLES:
        kind = "folder" if file.is_dir() else "file"
        return Corpus(f"the {kind} {file.name}", _limit_tokens(model, _read_lines(file), max_tokens))
    facts = model.folder / "facts.jsonl" if model.folder else None
    if source_name != OWN_SAMPLES and facts is not None and facts.exists():
        return Corpus(
            "the model's table of facts", _limit_tokens(model, _facts_as_sentences(facts), max_tokens)
        )
    texts = yield from _sample_corpus(model, max_tokens, folder, seed)
    return Corpus("the model's own samples", tuple(texts))


def _sample_corpus(model: LoadedModel, max_tokens: int, folder: Path | None, seed: int) -> Stepper[list[str]]:
    """The model's own samples; made once for a folder, since they take a minute or more."""
    length = min(SAMPLE_LENGTH, model.max_positions)
    fingerprint = f"{model.fingerprint} {max_tokens} {seed} {length}"
    path = (
        folder / f"samples-{hashlib.sha256(fingerprint.encode()).hexdigest()[:32]}.json" if folder else None
    )
    if path is not None and path.exists():
        return [str(text) for text in json.loads(path.read_text(encoding="utf-8"))]
    generator = torch.Generator().manual_seed(seed)
    texts = yield from sample_texts(
        model, count=-(-max_tokens // length), length=length, generator=generator, phase=Phase.CORPUS
    )
    if path is not None:
        write_atomically(path, json.dumps(texts))
    return texts


def _read_lines(path: Path) -> Iterator[str]:
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


def _stream_hub_dataset(name: str) -> Iterator[str]:
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


def _limit_tokens(model: LoadedModel, texts: Iterable[str], max_tokens: int) -> tuple[str, ...]:
    selected, total = [], 0
    for text in texts:
        if total >= max_tokens:
            break
        selected.append(text)
        total += len(model.encode(text)[0])
    return tuple(selected)
