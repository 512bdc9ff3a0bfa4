"""What the model says without being shown the answer: greedy text from the bare prompt to the end of its statement.

Teacher forcing shows the model the object's first tokens and its length. Measured by what models say, published edits
lose most of their success (WILD, Yang et al. 2025).
"""

from __future__ import annotations

from collections import Counter

from service.datasets.record import Record
from service.evaluation.metrics import Measures
from service.evaluation.suites.question import Answers, FreeText, Question, TextAnswer, text_of
from service.evaluation.suites.suite import Suite, SuiteInputs, share
from service.kit.text import begins_with

LOOP_WORDS = 3  # a sequence of words of this length that occurs as often is a loop


def _questions(record: Record, _inputs: SuiteInputs) -> list[Question]:
    """Return the prompt, the paraphrases and the neighbors."""
    return [FreeText(prompt) for prompt in record.prompts]


def _measure(record: Record, _inputs: SuiteInputs, answers: Answers, base: Answers) -> Measures:
    """Return the measures of what the model says."""
    own = text_of(answers, record.text)
    paraphrases = [text_of(answers, p) for p in record.paraphrases]
    new, true = record.target_new, record.target_true
    old = None if true is None else own.mentions(true)
    neighbors = [(text_of(base, n.prompt), text_of(answers, n.prompt)) for n in record.neighbours]
    return {
        "free_exact": float(is_exactly(own, new)),
        "free_says": float(begins_with(own.text, new)),
        "free_contains": float(own.mentions(new)),
        "free_old": None if old is None else float(old),
        "free_both": None if old is None else float(old and own.mentions(new)),
        "free_loops": float(has_loop(own.text)),
        "free_says_paraphrase": share([begins_with(p.text, new) for p in paraphrases]),
        "free_contains_paraphrase": share([p.mentions(new) for p in paraphrases]),
        "free_kept": share([before.object == after.object for before, after in neighbors]),
        "free_kept_right": share(
            [
                begins_with(after.text, n.target)
                for n, (before, after) in zip(record.neighbours, neighbors, strict=True)
                if begins_with(before.text, n.target)
            ]
        ),
    }


def is_exactly(answer: TextAnswer, name: str) -> bool:
    """Whether an answer is a name and then a boundary, in capitals or not."""
    return answer.object == " ".join(name.casefold().split())


def has_loop(text: str) -> bool:
    """Whether a sequence of three words occurs three times."""
    words = text.casefold().split()
    runs = Counter(tuple(words[i : i + LOOP_WORDS]) for i in range(len(words) - LOOP_WORDS + 1))
    return max(runs.values(), default=0) >= LOOP_WORDS


FREE_TEXT = Suite(
    "free",
    "what the model says",
    {
        "free_exact": "its text after the prompt is the new object and then a boundary",
        "free_says": "its text after the prompt begins with the new object",
        "free_contains": "its text after the prompt has the new object",
        "free_old": "its text after the prompt has the true object",
        "free_both": "its text after the prompt has both objects",
        "free_loops": "its text after the prompt repeats three words three times",
        "free_says_paraphrase": "its text after the paraphrases begins with the new object",
        "free_contains_paraphrase": "its text after the paraphrases has the new object",
        "free_kept": "it says the same object as before after the neighbours",
        "free_kept_right": "the same, of the neighbours whose own object it said before",
    },
    _questions,
    _measure,
)
