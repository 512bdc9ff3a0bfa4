"""An editing problem: a fact with the object to write, paraphrases that should follow, and neighbours that must not
change.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from service.errors import InvalidInput
from service.kit.chat_format import Message
from service.kit.separator import separator
from service.kit.stated_fact import StatedFact
from service.kit.text import RenderedText, Statement
from service.kit.text_encoder import TextEncoder
from service.schemas import Objective


class NeighborProbe(NamedTuple):
    """A prompt about another subject, and the object that it must keep."""

    prompt: str
    target: str


#: what the question of a portability probe is, relative to the edit
PortabilityKind = Literal["hop", "reverse", "alias", "kept", "logical"]
PORTABILITY_KINDS: tuple[PortabilityKind, ...] = get_args(PortabilityKind)


class PortabilityProbe(NamedTuple):
    """A question whose answer follows from the edit, or stays true beside it."""

    kind: PortabilityKind
    prompts: tuple[str, ...]  #: wordings of the question; one right answer is enough
    targets: tuple[str, ...]  #: names of the right answer with the edit
    targets_before: tuple[str, ...] = ()  #: the same without it; empty where unknown


@dataclass(frozen=True)
class Record:
    """One editing problem. Every prompt except `prompt` is a complete text without a placeholder."""

    name: str  #: identifies the record in reports
    subject: str
    prompt: str  #: with one {}
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[NeighborProbe, ...] = ()
    attribute_prompts: tuple[str, ...] = ()  #: about other subjects that have the new object
    generation_prompts: tuple[str, ...] = ()
    reference_texts: tuple[str, ...] = ()  #: about subjects that have the new object
    relation: str = ""
    messages: tuple[Message, ...] = ()  #: of a record in a conversation, whose text is `prompt`
    continued: bool = False  #: the last message is continued
    portability: tuple[PortabilityProbe, ...] = ()

    @property
    def statement(self) -> Statement:
        """Return the prompt with the subject filled in."""
        return self._fact.statement()

    @property
    def _fact(self) -> StatedFact:
        return StatedFact(self.subject, self.prompt, self.messages, self.continued)

    @property
    def text(self) -> str:
        """Return the text of the statement."""
        return self.statement.text

    @property
    def prompts(self) -> tuple[str, ...]:
        """Return every text after which the model is scored on an object."""
        return (self.text, *self.paraphrases, *(n.prompt for n in self.neighbours))

    @property
    def model_texts(self) -> dict[str, tuple[str, ...]]:
        """Return every text that the model reads, by the name of its field; of a conversation its messages."""
        return {
            "subject": (self.subject,),
            "target_new": (self.target_new,),
            "target_true": (self.target_true,) if self.target_true else (),
            "prompt": tuple(self._fact.written_texts.values()),
            "paraphrases": self.paraphrases,
            "neighborhood": tuple(text for neighbor in self.neighbours for text in neighbor),
            "attribute_prompts": self.attribute_prompts,
            "generation_prompts": self.generation_prompts,
            "portability": tuple(prompt for probe in self.portability for prompt in probe.prompts),
        }

    @property
    def missing_fields(self) -> tuple[str, ...]:
        """Return the names of the empty optional fields. Measures that need one of them are not computed."""
        fields = {
            "target_true": self.target_true,
            "paraphrases": self.paraphrases,
            "neighborhood": self.neighbours,
            "generation_prompts": self.generation_prompts,
            "reference_texts": self.reference_texts,
        }
        return tuple(name for name, value in fields.items() if not value)


def target_object(record: Record, objective: Objective) -> str:
    """Return the object that an edit optimises: the new one to write, the true one to erase or to amplify."""
    if objective == "write":
        return record.target_new
    if record.target_true is None:
        raise InvalidInput(f"the objective {objective!r} needs the true object: add `target_true`.")
    return record.target_true


def check_record_fits(record: Record, objective: Objective, encoder: TextEncoder) -> None:
    """Raise InvalidInput if a prompt exceeds the context length, the tokenizer cannot represent the object, or a text
    that the model reads contains a special token."""
    for field, texts in record.model_texts.items():
        for text in texts:
            if not isinstance(text, RenderedText):  # messages are checked when they are rendered
                encoder.check_plain(text, field)
    encoder.check(record.text, target_object(record, objective))
    for prompt in (*record.prompts, *record.model_texts["portability"]):
        encoder.check(prompt)


def record_fits(record: Record, encoder: TextEncoder) -> bool:
    """Return whether the model can be scored on the record's prompts and its new object."""
    try:
        check_record_fits(record, "write", encoder)
    except InvalidInput:
        return False
    return True


def true_statements(records: Sequence[Record]) -> list[str]:
    """Return the unedited fact of each record as a sentence, for the records that name a true object."""
    return [r.text + separator(r.text, r.target_true) + r.target_true + "." for r in records if r.target_true]
