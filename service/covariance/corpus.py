"""The corpus for the statistics of keys and the reference perplexity: a file or folder of text, a public data set,
the model's table of facts, or samples of the model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.errors import Misconfigured
from service.kit.files import write_atomically
from service.kit.steps import Phase, Stepper
from service.kit.text import separator
from service.models.loading import LoadedModel
from service.models.sampling import sample_texts

HUB_PREFIX = "hub:"  # prefix of the name of a public data set
OWN_SAMPLES = "samples"  # the name of the model's own samples
SAMPLE_LENGTH = 48  # tokens of a sample


@dataclass(frozen=True)
class Corpus:
    source: str  #: description for reports
    texts: tuple[str, ...]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n\x00".join(self.texts).encode()).hexdigest()


def fact_sentences(model: LoadedModel) -> list[str]:
    """Return the statements of the model's table of facts, the first four trained wordings, each over all facts; none
    without such a table."""
    path = model.companion_file("facts.jsonl")
    if path is None or not path.exists():
        return []
    try:
        rows = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x]
        return [_sentence(row, wording) for wording in range(4) for row in rows]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise Misconfigured(
            f"the table of facts {str(path)!r} cannot be read ({type(error).__name__}: {error}): give one JSON object "
            "a line with `subject`, `object` and `prompts`, or remove the file."
        ) from error


def _sentence(row: dict[str, Any], wording: int) -> str:
    prompts: list[str] = row["prompts"]
    prompt = prompts[wording % len(prompts)].replace("{}", row["subject"])
    return prompt + separator(prompt, row["object"]) + str(row["object"]) + "."


def load_corpus(
    model: LoadedModel, max_tokens: int, file: Path | None, seed: int = 0, folder: Path | None = None
) -> Stepper[Corpus]:
    """Load or sample about `max_tokens` tokens of text.

    `file` names a file or a folder with one text a line, "hub:NAME" a data set on a hub, and "samples" the model's
    own samples. When it is None, the corpus is facts.jsonl next to the model, or else the model's own samples.
    """
    source_name = str(file) if file is not None else ""
    if source_name.startswith(HUB_PREFIX):
        return Corpus(
            f"the data set {source_name.removeprefix(HUB_PREFIX)}",
            _limit_tokens(model, _stream_hub_dataset(source_name.removeprefix(HUB_PREFIX)), max_tokens),
        )
    if file is not None and source_name != OWN_SAMPLES:
        kind = "folder" if file.is_dir() else "file"
        return Corpus(f"the {kind} {file.name}", _limit_tokens(model, _read_lines(file), max_tokens))
    if source_name != OWN_SAMPLES and (sentences := fact_sentences(model)):
        return Corpus("the model's table of facts", _limit_tokens(model, sentences, max_tokens))
    texts = yield from _sample_corpus(model, max_tokens, folder, seed)
    return Corpus("the model's own samples", tuple(texts))


def _sample_corpus(model: LoadedModel, max_tokens: int, folder: Path | None, seed: int) -> Stepper[list[str]]:
    """Return samples of the model, cached in `folder`: sampling takes a minute or more."""
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
    """Yield the non-empty lines of a file, or of the .txt files of a folder in the order of their names."""
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise Misconfigured(
            f"the corpus {str(path)!r} contains no .txt file: name another folder, or a file."
        )
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                yield from (line.rstrip("\n") for line in lines if line.strip())
        except (OSError, UnicodeError) as error:
            raise Misconfigured(f"the corpus {str(file)!r} cannot be read: {error}") from error


def _stream_hub_dataset(name: str) -> Iterator[str]:
    """Yield the texts of a public data set: NAME or NAME/CONFIGURATION, such as
    "Salesforce/wikitext/wikitext-103-raw-v1"."""
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
    except Exception as error:  # the name or the network
        raise Misconfigured(
            f"the data set {name!r} cannot be read: {error} Give a file or a folder of text, or a data set with a "
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
