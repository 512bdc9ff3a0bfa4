"""Greedy continuations of prompts, and the object that each begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.engine.decoding import DecodingBatch, DecodingSequence, new_sequence
from service.errors import InvalidInput
from service.kit.answer import answer_object
from service.kit.steps import Phase, Progress, Stepper
from service.models.loading import LoadedModel
from service.schemas import Sampling

PREVIEW_TOKENS = 8  # tokens of the continuation that a report shows
GREEDY_BATCH_SIZE = 32  # prompts that are decoded together


@dataclass(frozen=True)
class GreedyText:
    """A greedy continuation."""

    text: str
    complete: bool = False  #: the model ended it

    @property
    def answer(self) -> str:
        """The object that it begins with; empty where the model gives none."""
        return answer_object(self.text, self.complete)


def generate_greedy(
    model: LoadedModel,
    prompts: Sequence[str],
    length: int = PREVIEW_TOKENS,
    is_enough: Callable[[str], bool] = lambda _text: False,
) -> Stepper[list[GreedyText]]:
    """Return the greedy continuations of the prompts, at most `length` tokens each, decoded in batches. A batch ends
    when `is_enough` holds of the text of each."""
    found: list[GreedyText] = []
    for start in range(0, len(prompts), GREEDY_BATCH_SIZE):
        batch = prompts[start : start + GREEDY_BATCH_SIZE]
        found += yield from _generate_batch(model, batch, length, is_enough)
    return found


def _generate_batch(
    model: LoadedModel, prompts: Sequence[str], length: int, is_enough: Callable[[str], bool]
) -> Stepper[list[GreedyText]]:
    greedy = Sampling(max_new_tokens=length, temperature=0)
    rows: list[DecodingSequence | None] = []
    for prompt in prompts:
        try:
            rows.append(new_sequence(model, prompt, greedy))
        except InvalidInput:  # the prompt fills all positions of the model
            rows.append(None)
    batch = DecodingBatch(model, [r for r in rows if r is not None])
    step = 0
    while any(not is_enough(sequence.text) for sequence in batch.sequences):
        batch.step()
        step += 1
        yield Progress(Phase.ANSWER, step, length)
    return [GreedyText("") if r is None else GreedyText(r.text, r.finish_reason == "stop") for r in rows]
