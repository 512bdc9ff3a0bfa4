"""Subjects like another one, as the base model enumerates them after a few examples of such lists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from service.engine.decoding import DecodingBatch, new_sequence
from service.errors import InvalidInput
from service.kit.name_list import begins_with_capital, enumerated_names
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.schemas import Sampling

#: one list for each of several kinds of names; without them a small model repeats the name or describes it
EXAMPLES = (
    "Like France: Norway, Peru, Kenya, Canada, Thailand",
    "Like London: Berlin, Madrid, Vienna, Chicago, Sydney",
    "Like Big Ben: Golden Gate Bridge, Taj Mahal, Colosseum, Sydney Opera House",
    "Like Isaac Newton: Charles Darwin, Niels Bohr, Galileo Galilei, Max Planck",
    "Like Ford: Toyota, Fiat, Volvo, Honda, Chrysler",
    "Like piano: guitar, violin, flute, drum, trumpet",
)
LIST_TOKENS = 24


def list_like_subjects(model: LoadedModel, subject: str) -> Stepper[list[str]]:
    """Return names of the same kind as a subject: those first that more of the model's greedy lists contain, after the
    examples in either order."""
    texts = yield from _continue_lists(
        model, [_list_prompt(EXAMPLES, subject), _list_prompt(EXAMPLES[::-1], subject)]
    )
    capital = begins_with_capital(subject)
    votes = Counter(name for text in texts for name in enumerated_names(text, capital))
    return sorted(votes, key=lambda name: -votes[name])


def _list_prompt(examples: Sequence[str], subject: str) -> str:
    return "\n".join([*examples, f"Like {subject}:"])


def _continue_lists(model: LoadedModel, prompts: Sequence[str]) -> Stepper[list[str]]:
    """Return the greedy continuations up to the end of a line, which is their last character where it was reached."""
    greedy = Sampling(max_new_tokens=LIST_TOKENS, stop=["\n"])
    try:
        rows = [new_sequence(model, prompt, greedy) for prompt in prompts]
    except InvalidInput:  # the examples fill all positions of the model
        return []
    batch = DecodingBatch(model, rows)
    step = 0
    while len(batch):
        batch.step()
        step += 1
        yield Progress(Phase.ANSWER, step, LIST_TOKENS)
    return [row.text + ("\n" if row.finish_reason == "stop" else "") for row in rows]
