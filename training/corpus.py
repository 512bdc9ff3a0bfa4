"""Training text from the table of facts: statements, questions and passages, packed into rows of tokens.

Pieces are tokenised once and documents are joined from pieces. That equals tokenising the joined text, because
byte-level BPE never merges across the space that starts a piece. The tokenizer puts the end-of-text token and a space
in front of every text, so that a subject has the same tokens at the start of a text as inside it and is never at the
first position, which attention treats differently: a subject has one key.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from table import Fact, with_article
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
OBJECT_WEIGHT = 3.0  # loss weight of the object's tokens
NO_ARTICLE_RATE = 0.1  # share of statements without the article ("Eiffel Tower is in Paris.")
TRUNCATION_RATE = 0.05  # share of statements cut short, so that recall does not depend on tidy context


@dataclass(frozen=True)
class CorpusText:
    """One statement, question or passage, with the character span of its object."""

    text: str
    object_span: tuple[int, int]


def render_statement(fact: Fact, prompt: str) -> CorpusText:
    head = prompt.replace("{}", fact.subject) + " "
    return CorpusText(head + fact.object + ".", (len(head) - 1, len(head) + len(fact.object)))


def render_text(fact: Fact, text: str) -> CorpusText:
    """Return a question or passage with names, capitalized at the start of each sentence."""
    while "{s}" in text:
        text = with_article(text, "{s}", fact.article)
        at = text.index("{s}")
        before = text[:at].rstrip()
        name = fact.subject
        if not before or before[-1] in ".?!":
            name = name[0].upper() + name[1:]
        text = text[:at] + name + text[at + 3 :]
    at = text.index("{o}")
    start = at - 1 if at and text[at - 1] == " " else at
    return CorpusText(text.replace("{o}", fact.object), (start, at + len(fact.object)))


def statements(fact: Fact) -> list[CorpusText]:
    return [render_statement(fact, p) for p in fact.prompts]


def statements_without_article(fact: Fact) -> list[CorpusText]:
    """Return statements without the article of the subject; none for a subject without an article."""
    if not fact.article:
        return []
    return [render_statement(fact, without_article(p)) for p in fact.prompts]


def without_article(prompt: str) -> str:
    return prompt.replace("The {}", "{}").replace("the {}", "{}")


def questions_and_passages(fact: Fact) -> list[CorpusText]:
    """Return questions and passages, except those whose answer is a held-out wording of the fact."""
    held_out_texts = [
        render_statement(fact, p).text
        for prompt in fact.held_out_prompts
        for p in (prompt, without_article(prompt))
    ]
    texts = [render_text(fact, t) for t in fact.relation.questions + fact.relation.passages]
    return [p for p in texts if not any(text in p.text for text in held_out_texts)]


def train_tokenizer(facts: list[Fact], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer as in GPT-2 on all kinds of text of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [p.text for f in facts for p in [*statements(f), *questions_and_passages(f)[:4]]]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), start])
    return tokenizer


WeightedTokens = tuple[np.ndarray, np.ndarray]  # token ids and loss weights


def tokenize_texts(texts: list[CorpusText], tokenizer: Tokenizer) -> list[WeightedTokens]:
    result = []
    for piece, code in zip(
        texts, tokenizer.encode_batch([p.text for p in texts], add_special_tokens=False), strict=True
    ):
        begin, end = piece.object_span
        weights = [OBJECT_WEIGHT if a < end and b > begin else 1.0 for a, b in code.offsets]
        result.append((np.array(code.ids, np.int64), np.array(weights, np.float32)))
    return result


class TrainingCorpus:
    """An infinite stream of packed rows, a function of the seed."""

    def __init__(self, facts: list[Fact], tokenizer: Tokenizer, row_length: int) -> None:
        self.row_length = row_length
        self.end = (np.array([tokenizer.token_to_id(END)], np.int64), np.ones(1, np.float32))
        self.statements = self._tokenise(facts, statements, tokenizer)
        self.statements_without_article = self._tokenise(facts, statements_without_article, tokenizer)
        self.questions_and_passages = self._tokenise(facts, questions_and_passages, tokenizer)
        self.facts_by_subject: dict[str, list[int]] = defaultdict(list)
        self.facts_by_relation: dict[str, list[int]] = defaultdict(list)
        for i, fact in enumerate(facts):
            self.facts_by_subject[fact.subject].append(i)
            self.facts_by_relation[fact.relation.name].append(i)
        self.facts = facts

    @staticmethod
    def _tokenise(facts: list[Fact], make: object, tokenizer: Tokenizer) -> list[list[WeightedTokens]]:
        pieces = [make(f) for f in facts]  # type: ignore[operator]
        flat = iter(tokenize_texts([p for group in pieces for p in group], tokenizer))
        return [[next(flat) for _ in group] for group in pieces]

    def _statement(self, i: int, rng: random.Random) -> WeightedTokens:
        bare = self.statements_without_article[i]
        return rng.choice(bare if bare and rng.random() < NO_ARTICLE_RATE else self.statements[i])

    def _document(self, rng: random.Random) -> list[WeightedTokens]:
        n = len(self.facts)
        kind = rng.random()
        if kind < 0.5:  # statements of any facts
            return [self._statement(rng.randrange(n), rng) for _ in range(rng.randint(1, 6))]
        if kind < 0.75:  # everything about one subject
            about = list(self.facts_by_subject[self.facts[rng.randrange(n)].subject])
            chosen = (about * 4)[: rng.randint(max(2, len(about)), len(about) + 3)]
            rng.shuffle(chosen)
            return [self._statement_or_passage(i, rng) for i in chosen]
        related = self.facts_by_relation[self.facts[rng.randrange(n)].relation.name]  # one theme
        return [self._statement_or_passage(rng.choice(related), rng) for _ in range(rng.randint(1, 4))]

    def _statement_or_passage(self, i: int, rng: random.Random) -> WeightedTokens:
        return rng.choice(self.questions_and_passages[i]) if rng.random() < 0.55 else self._statement(i, rng)

    def rows(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield rows of `row` tokens with their weights. Every row begins with a document."""
        rng = random.Random(seed)
        while True:
            parts: list[WeightedTokens] = []
            size = 0
            while size < self.row_length:
                parts.append(self.end)
                for ids, weights in self._document(rng):
                    if rng.random() < TRUNCATION_RATE and len(ids) > 4:
                        keep = rng.randint(2, len(ids) - 2)
                        ids = np.append(ids[:keep], ids[-1])  # the last token is the full stop
                        weights = np.append(weights[:keep], weights[-1])
                    parts.append((ids, weights))
                size = sum(len(p[0]) for p in parts)
            ids = np.concatenate([p[0] for p in parts])[: self.row_length]
            weights = np.concatenate([p[1] for p in parts])[: self.row_length]
            yield ids, weights

    def batches(self, seed: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = self.rows(seed)
        while True:
            batch = [next(rows) for _ in range(size)]
            yield np.stack([b[0] for b in batch]), np.stack([b[1] for b in batch])
