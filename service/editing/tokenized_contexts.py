"""The texts of one edit as tokens: the statement with its object, bare, after contexts and restated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from service.editing.restatement import Restatement, tokenize_restatement
from service.kit.separator import Separator, separator
from service.kit.text import Statement, token_span
from service.models.loading import LoadedModel
from service.models.token_batch import TokenizedStatement, tokenize_statement


@dataclass(frozen=True)
class TokenizedContexts:
    """The statements of one edit as tokens. Row 0 is the bare prompt; rows after contexts and the restatement, if there
    is one, follow."""

    prompts: list[TokenizedStatement]
    targets: list[list[int]]
    #: the bare subject and, when the key is averaged over it, the subject after each context
    bare_subjects: list[TokenizedStatement]
    restatement: Restatement | None = None  #: that of the last row

    @property
    def size(self) -> int:
        return len(self.prompts)

    @property
    def continuations(self) -> int:
        """The number of rows that are continued with the object alone."""
        return self.size - (self.restatement is not None)

    def later_mentions(self) -> list[tuple[int, int]]:
        """Return the row and the position of the edited token of every further mention of the subject that is edited,
        too."""
        return [] if self.restatement is None else [(self.size - 1, self.restatement.later_mention)]

    @property
    def kl_reference_row(self) -> int:
        """The row whose next-token distribution after the subject the KL term preserves: the bare prompt when it
        begins with the subject, else an additional row."""
        return (
            0
            if self.prompts[0].ids_through_subject == self.bare_subjects[0].ids_through_subject
            else self.size
        )

    @property
    def kl_reference_column(self) -> int:
        """The position of the subject's last token in that row, from the edited token on."""
        subject = self.bare_subjects[0]
        return subject.last_subject_index - subject.edited_index

    def texts(self) -> list[TokenizedStatement]:
        """Return the prompts, each with its object without the last token, and the bare subject when
        `kl_reference_row` needs it."""
        with_targets = [
            replace(p, ids=p.ids + t[:-1]) for p, t in zip(self.prompts, self.targets, strict=True)
        ]
        return (
            with_targets
            if self.kl_reference_row == 0
            else [*with_targets, self.bare_subjects[0].through_subject()]
        )


def _context_prefixes(contexts: Sequence[str]) -> list[str]:
    """Return the empty prefix, and the contexts as sentences."""
    return ["", *(f"{c}. " if c else "" for c in contexts)]


def tokenize_contexts(
    model: LoadedModel,
    statement: Statement,
    target: str,
    contexts: Sequence[str],
    with_bare_subjects: bool = False,
    chosen: Separator | None = None,
    restated: bool = False,
    tokens_after: int = 0,
) -> TokenizedContexts:
    """Tokenize prompt and object together, bare and after each context that fits the model's positions; with
    `with_bare_subjects` also the subject after each context, and with `restated` the restatement. `chosen` separates
    prompt and object; None: the usual separator. `tokens_after`: the subject's tokens after the edited one."""
    prompts, targets = [], []
    for prefix in _context_prefixes(contexts):
        prefixed = statement.with_context(prefix)
        sep = separator(prefixed.text, target) if chosen is None else chosen
        ids, offsets = model.encode(prefixed.text + sep + target)
        if prefix and len(ids) > model.max_positions:
            continue
        start = token_span(offsets, (len(prefixed.text), len(prefixed.text + sep + target)))[0]
        subject_span = token_span(offsets[:start], prefixed.span)
        prompts.append(TokenizedStatement(ids[:start], subject_span, tokens_after))
        targets.append(ids[start:])
    restatement = None
    if restated:
        sep = separator(statement.text, target) if chosen is None else chosen
        restatement = tokenize_restatement(model, statement, sep, target, tokens_after)
    if restatement is not None:
        prompts.append(restatement.prompt)
        targets.append(restatement.target)
    begin, end = statement.span
    subject = statement.text[begin:end]
    subject_statement = Statement(subject, (0, len(subject)))
    prefixes = _context_prefixes(contexts) if with_bare_subjects else [""]
    return TokenizedContexts(
        prompts,
        targets,
        [
            tokenize_statement(model, subject_statement.with_context(prefix), tokens_after)
            for prefix in prefixes
        ],
        restatement,
    )
