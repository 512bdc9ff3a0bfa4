"""The corpus for the statistics of keys and the reference perplexity: a file or folder of text, a public data set,
the model's table of facts, or samples of the model."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.errors import Misconfigured
from service.kit.extras import install_command
from service.kit.files import write_atomically
from service.kit.separator import separator
from service.kit.steps import Phase, Progress, Stepper, advance
from service.models.loading import LoadedModel
from service.models.sampling import sample_texts

HUB_PREFIX = "hub:"  # prefix of the name of a public data set
OWN_SAMPLES = "samples"  # the name of the model's own samples
SAMPLE_LENGTH = 48  # tokens of a sample
CORPUS_BATCH_SIZE = 64  # samples in one batch; a step of it is shorter than an optimization step of an edit
MAX_BATCHES = 2**32  # of one seed
TOKENS_PER_DIMENSION = 4  # tokens of the statistics for each dimension of a key
MIN_TOKENS = 8000  # tokens of the statistics of a small model


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


@dataclass(frozen=True)
class CorpusSource:
    """Where the corpus comes from, and how many tokens of it are used.

    `file` names a file or a folder with one text a line, "hub:NAME" a data set on a hub, and "samples" the model's
    own samples. When it is None, the corpus is facts.jsonl next to the model, or else the model's own samples.
    """

    file: Path | None
    max_tokens: int
    seed: int = 0

    @property
    def hub_dataset(self) -> str | None:
        name = str(self.file or "")
        return name.removeprefix(HUB_PREFIX) if name.startswith(HUB_PREFIX) else None

    @property
    def is_named_file(self) -> bool:
        return self.file is not None and self.hub_dataset is None and str(self.file) != OWN_SAMPLES

    def is_sampled(self, model: LoadedModel) -> bool:
        """Whether the model writes the texts, which takes long."""
        return str(self.file) == OWN_SAMPLES or (self.file is None and not fact_sentences(model))

    def check(self, model: LoadedModel) -> None:
        """Raise Misconfigured for texts on this machine that cannot be read, or a package that is missing."""
        if self.hub_dataset is not None:
            _hub_loader()
        elif self.is_named_file and self.file is not None:
            if next(_read_lines(self.file), None) is None:
                raise Misconfigured(f"the corpus {str(self.file)!r} contains no text: name another one.")
        elif not self.is_sampled(model):
            fact_sentences(model)


def default_tokens(model: LoadedModel) -> int:
    """Return how many tokens the statistics of a model need: see docs/decisions/0022."""
    return max(MIN_TOKENS, TOKENS_PER_DIMENSION * model.intermediate_size)


def load_corpus(
    model: LoadedModel, max_tokens: int, file: Path | None, seed: int = 0, folder: Path | None = None
) -> Stepper[Corpus]:
    """Load or sample about `max_tokens` tokens of text: see CorpusSource."""
    source = CorpusSource(file, max_tokens, seed)
    if (name := source.hub_dataset) is not None:
        return Corpus(f"the data set {name}", _limit_tokens(model, _stream_hub_dataset(name), max_tokens))
    if source.is_named_file and file is not None:
        kind = "folder" if file.is_dir() else "file"
        return Corpus(f"the {kind} {file.name}", _limit_tokens(model, _read_lines(file), max_tokens))
    if not source.is_sampled(model):
        sentences = fact_sentences(model)
        random.Random(seed).shuffle(sentences)  # a part of the table is a sample of it
        return Corpus("the model's table of facts", _limit_tokens(model, sentences, max_tokens))
    texts = yield from _sample_corpus(model, max_tokens, folder, seed)
    return Corpus("the model's own samples", tuple(texts))


def _sample_corpus(model: LoadedModel, max_tokens: int, folder: Path | None, seed: int) -> Stepper[list[str]]:
    """Return samples of the model. Each batch has a seed of its own and is stored in `folder` when it is complete, so
    that an interrupted start, or one that needs more tokens, continues with the same texts."""
    length = min(SAMPLE_LENGTH, model.max_positions)
    fingerprint = f"{model.fingerprint} {seed} {length} {CORPUS_BATCH_SIZE}"
    name = f"samples-{hashlib.sha256(fingerprint.encode()).hexdigest()[:32]}.json"
    path = folder / name if folder else None
    texts = _stored_samples(path)
    count = -(-max_tokens // length)
    while len(texts) < count:
        generator = torch.Generator().manual_seed(seed * MAX_BATCHES + len(texts) // CORPUS_BATCH_SIZE)
        batch = sample_texts(
            model, CORPUS_BATCH_SIZE, length, generator, phase=Phase.CORPUS, batch_size=CORPUS_BATCH_SIZE
        )
        texts += yield from _report_of_all(batch, len(texts) * length, count * length)
        if path is not None:
            write_atomically(path, json.dumps(texts))
    return texts[:count]


def _stored_samples(path: Path | None) -> list[str]:
    """Return the complete batches of samples that are stored."""
    if path is None or not path.exists():
        return []
    texts = [str(text) for text in json.loads(path.read_text(encoding="utf-8"))]
    return texts[: len(texts) - len(texts) % CORPUS_BATCH_SIZE]


def _report_of_all(batch: Stepper[list[str]], tokens_before: int, total: int) -> Stepper[list[str]]:
    """Run the steps of one batch, with the progress of all batches."""
    with closing(batch):
        while isinstance(outcome := advance(batch), Progress):
            yield Progress(outcome.phase, min(total, tokens_before + outcome.done), total)
        return outcome.result


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
    load_dataset = _hub_loader()
    words = name.split("/")
    try:
        rows = load_dataset("/".join(words[:2]), *words[2:3], split="train", streaming=True)
        yield from (str(row["text"]) for row in rows if str(row.get("text") or "").strip())
    except Exception as error:  # the name or the network
        raise Misconfigured(
            f"the data set {name!r} cannot be read: {error} Give a file or a folder of text, or a data set with a "
            'column "text" on a hub that can be reached from here.'
        ) from error


def _hub_loader() -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise Misconfigured(
            f"a data set from a hub needs the package datasets: {install_command('corpora')}"
        ) from None
    return load_dataset


def _limit_tokens(model: LoadedModel, texts: Iterable[str], max_tokens: int) -> tuple[str, ...]:
    selected, total = [], 0
    for text in texts:
        if total >= max_tokens:
            break
        selected.append(text)
        total += len(model.encode(text)[0])
    return tuple(selected)
