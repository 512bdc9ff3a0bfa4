"""Probes that the service finds where a request gives none: paraphrases of its prompt, and neighbours whose answers
should stay.

Paraphrases come from templates for all relations and, where the prompt is one of its wordings, from the table of
facts. A neighbour is the prompt about another subject: one of an active edit, one of the same relation in the table,
or one that the base model enumerates beside the subject. Of these the subjects are taken that respond most to the edit
(`key_response`). The object that a neighbour must keep is the greedy answer of the version before the edit; a
neighbour without an answer is left out. Other relations of the subject in the table are asked as well; the guard does
not count them.

Everything is the same each time for one model, version, request and table.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from service.datasets.relation_table import RelationMatch
from service.editing.candidate import FoundNeighbors
from service.editing.context import EditorContext
from service.editing.greedy_text import GreedyText, generate_greedy
from service.editing.key_response import KeyResponse
from service.editing.like_subjects import list_like_subjects
from service.editing.probes import Probe, ProbeSource, probe_fits
from service.engine.versioned_model import VersionedModel
from service.errors import InvalidInput
from service.kit.separator import certain_separator
from service.kit.steps import Stepper
from service.kit.text import PLACEHOLDER, fill_prompt, mentions, normalize_whitespace
from service.methods.parameters import Parameters
from service.methods.registry import DEFAULT_METHOD
from service.models.loading import LoadedModel
from service.schemas import EditRequest

MAX_PARAPHRASES = 6
MAX_NEIGHBORS = 8
MAX_EDIT_NEIGHBORS = 2  #: that are subjects of active edits
TABLE_SUBJECTS = 24  #: of the table, drawn with a seed, of which those with the greatest response are taken
MAX_ASKED = 10  #: subjects that are asked for an answer
MAX_RELATIONS = 4  #: other relations of the subject that are asked for
#: sentences before the prompt that do not depend on its relation
PREFIXES = ("It is a well-known fact. ", "I looked it up. ", "As everyone here knows: ")


@dataclass(frozen=True)
class LikeSubject:
    """A subject like that of the edit, and where it comes from."""

    name: str
    source: ProbeSource


class AutoProbes:
    """The search for the probes of one request."""

    def __init__(
        self,
        replica: VersionedModel,
        context: EditorContext,
        request: EditRequest,
        parameters: Parameters,
        rewrite: Probe,
    ) -> None:
        self._replica, self._context, self._request = replica, context, request
        self._parameters, self._rewrite, self._fact = parameters, rewrite, request.fact

    @property
    def _model(self) -> LoadedModel:
        return self._replica.base

    def find_paraphrases(self) -> Stepper[list[Probe]]:
        """Return at most `MAX_PARAPHRASES` prompts that ask for the object in other words."""
        match, statement = (yield from self._match()), self._fact.statement()
        texts: dict[str, ProbeSource] = {}
        if match is not None and match.by_wording:
            rewordings = match.facts.rewordings(self._request.subject, self._fact.wording)
            texts |= dict.fromkeys(rewordings[: MAX_PARAPHRASES - len(PREFIXES)], "facts")
        texts |= dict.fromkeys([statement.with_context(p).text for p in PREFIXES], "template")
        probes = (self._probe(text, self._rewrite.true, source) for text, source in texts.items())
        return [probe for probe in probes if probe is not None]

    def find_neighbors(self, version: int) -> Stepper[FoundNeighbors]:
        """Return at most `MAX_NEIGHBORS` prompts about other subjects, and the other relations of the subject, with
        their answers at a version."""
        subjects = yield from self._like_subjects(version)
        prompts = [self._fact.statement(subject.name).text for subject in subjects]
        relations = yield from self._other_relations()
        patch = yield from self._replica.patch_in_steps(version)
        generating = generate_greedy(self._model, [*prompts, *relations])
        texts = yield from self._replica.step_with_patch(patch, generating)
        answered = zip(subjects, prompts, texts[: len(prompts)], strict=True)
        found = self._with_answers((p, t, subject.source, subject.name) for subject, p, t in answered)
        found = found[:MAX_NEIGHBORS]
        found += self._with_answers(
            (p, t, "relation", None) for p, t in zip(relations, texts[len(prompts) :], strict=True)
        )
        return FoundNeighbors(version, [probe for probe, _ in found], [text for _, text in found])

    def _with_answers(
        self, asked: Iterable[tuple[str, GreedyText, ProbeSource, str | None]]
    ) -> list[tuple[Probe, GreedyText]]:
        """Return the probes of prompts with an answer in which a change to the new object can be seen."""
        new = normalize_whitespace(self._rewrite.new)
        found = [
            (self._probe(prompt, text.answer, source, subject), text)
            for prompt, text, source, subject in asked
            if text.answer and normalize_whitespace(text.answer) != new
        ]
        return [(probe, text) for probe, text in found if probe is not None]

    def _other_relations(self) -> Stepper[list[str]]:
        """Return prompts about other relations of the subject, in the first wording of the table."""
        table = yield from self._context.get_relation_table()
        request = self._request
        facts = (
            []
            if table is None
            else table.other_facts(self._fact.wording, request.subject, self._rewrite.true)
        )
        wordings = [(f.subject, f.prompts[0]) for f in facts if f.prompts[0].count(PLACEHOLDER) == 1]
        return [fill_prompt(wording, name).text for name, wording in wordings[:MAX_RELATIONS]]

    def _match(self) -> Stepper[RelationMatch | None]:
        table = yield from self._context.get_relation_table()
        if table is None:
            return None
        return table.find(self._fact.wording, self._request.subject, self._rewrite.true)

    def _like_subjects(self, version: int) -> Stepper[list[LikeSubject]]:
        """Return the subjects to ask, those with the greatest response first within each group: active edits, then
        the table and the model's enumeration together."""
        request, match = self._request, (yield from self._match())
        response = yield from KeyResponse.build(
            self._context,
            request.method or DEFAULT_METHOD,
            self._parameters,
            self._fact,
        )
        sources: dict[str, ProbeSource] = {}
        if match is not None:
            sources |= dict.fromkeys(self._draw(match), "facts")
        if match is None or not match.by_wording:
            enumerated = yield from list_like_subjects(self._model, request.subject)
            sources |= dict.fromkeys(enumerated[:MAX_ASKED], "model")
        usable = [name for name in sources if self._is_usable(name)]
        ranked = yield from response.rank_subjects(usable)
        edited = yield from self._edited_subjects(version, response)
        chosen = [LikeSubject(name, "edits") for name in edited]
        chosen += [LikeSubject(name, sources[name]) for name in ranked if name not in edited]
        return chosen[:MAX_ASKED]

    def _draw(self, match: RelationMatch) -> list[str]:
        """Return some subjects of the relation, drawn with a seed of the fact."""
        others = match.facts.others_than(self._request.subject, self._fact.wording)
        return random.Random(self._fact.key).sample(others, min(TABLE_SUBJECTS, len(others)))

    def _edited_subjects(self, version: int, response: KeyResponse) -> Stepper[list[str]]:
        """Return the subjects of the active edits with the greatest response."""
        updates = yield from self._replica.active_updates_in_steps(version)
        ranked = response.rank_edits(updates)
        names = dict.fromkeys(normalize_whitespace(updates[edit][0].subject) for edit in ranked)
        return [name for name in names if self._is_usable(name)][:MAX_EDIT_NEIGHBORS]

    def _is_usable(self, name: str) -> bool:
        """Whether a name is another subject: not this one, no part of it, and none of the objects."""
        subject = self._request.subject
        objects = (self._rewrite.new, self._rewrite.true)
        return (
            not mentions(subject, name)
            and not mentions(name, subject)
            and all(normalize_whitespace(name).casefold() != o.strip().casefold() for o in objects)
            and self._fits(name)
        )

    def _fits(self, name: str) -> bool:
        try:
            self._model.text_encoder.check_plain(name, "subject")
            statement = self._fact.statement(name)
            self._model.text_encoder.check(statement.text)
        except InvalidInput:
            return False
        return True

    def _probe(self, prompt: str, true: str, source: ProbeSource, subject: str | None = None) -> Probe | None:
        """Return a probe, or None if the model cannot be scored on it."""
        new, objective = self._rewrite.new, self._rewrite.objective
        certain = certain_separator(prompt, new)
        separator = self._rewrite.separator if certain is None else certain
        probe = Probe(prompt, new, true, objective, separator, subject, source)
        return probe if probe_fits(self._model, probe) else None
