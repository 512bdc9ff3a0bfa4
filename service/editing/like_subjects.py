"""Subjects like another one, as the base model enumerates them."""

from __future__ import annotations

from collections import Counter

from service.engine.decoding import DecodingBatch, new_sequence
from service.errors import InvalidInput
from service.kit.name_list import begins_with_capital, parse_names
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.schemas import Sampling

#: beginnings of enumerations; the subject stands in place of {}
LIST_PROMPTS = ("Similar to {}:", "A list of names of the same kind: {},")
LIST_TOKENS = 32
SAMPLES = 2  #: of each beginning, beside its greedy continuation
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "seed": 0}


def list_like_subjects(model: LoadedModel, subject: str) -> Stepper[list[str]]:
    """Return names of the same kind as a subject, those first that most of the model's enumerations contain.

    The enumerations are continued greedily and sampled with a fixed seed, so that the result is the same each time.
    """
    texts = yield from _continue_lists(model, subject)
    capital = begins_with_capital(subject)
    votes = Counter(name for text in texts for name in parse_names(text, capital))
    return sorted(votes, key=lambda name: -votes[name])


def _continue_lists(model: LoadedModel, subject: str) -> Stepper[list[str]]:
    greedy = Sampling(max_new_tokens=LIST_TOKENS, stop=["\n"])
    sampled = Sampling.model_validate({"max_new_tokens": LIST_TOKENS, "stop": ["\n"], **SAMPLING})
    choices = [(greedy, 0), *((sampled, number) for number in range(SAMPLES))]
    try:
        rows = [
            new_sequence(model, prompt.replace("{}", subject), *choice)
            for prompt in LIST_PROMPTS
            for choice in choices
        ]
    except InvalidInput:  # the subject fills all positions of the model
        return []
    batch = DecodingBatch(model, rows)
    step = 0
    while len(batch):
        batch.step()
        step += 1
        yield Progress(Phase.ANSWER, step, LIST_TOKENS)
    return [row.text + ("\n" if row.finish_reason == "stop" else "") for row in rows]
