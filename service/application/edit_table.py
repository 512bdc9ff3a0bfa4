"""Tables of edits: a list as CSV or as JSON, line by line, and a CSV text as requests that are checked line by line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Any

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.application.validation import resolve_methods, validate_edit
from service.datasets.csv_records import CsvLine, LineFault, parse_csv_lines
from service.db.models import Job, Model
from service.errors import InvalidInput
from service.jobs.views import ResourceDict
from service.kit.csv_text import encode_line
from service.kit.text import normalize_whitespace
from service.kit.text_encoder import TextEncoder
from service.kit.validation_messages import validation_messages
from service.schemas import MAX_EDITS, EditRequest

#: the columns of a list, and the field of an edit that each has
COLUMNS = (
    "id", "status", "batch", "subject", "prompt", "objective", "target_new", "target_true", "method", "form", "dry_run",
    "actor", "created", "ended", "version", "reverted_version",
)  # fmt: skip
MEASURED = ("probability_before", "probability_after", "reason")  #: the columns after them


def csv_lines(edits: Iterable[ResourceDict]) -> Iterator[str]:
    """Yield the header and one line for each edit."""
    yield encode_line((*COLUMNS, *MEASURED))
    for edit in edits:
        yield encode_line([*(edit.get(name) for name in COLUMNS), *_measured(edit)])


def _measured(edit: ResourceDict) -> list[Any]:
    """Return the probability of the object before and after the edit, and why the edit was not applied."""
    result = edit.get("result") or {}
    rewrite = result.get("rewrite") or {}
    probabilities = [(rewrite.get(when) or {}).get("new") for when in ("before", "after")]
    return [*probabilities, result.get("reason") or (edit.get("error") or {}).get("detail")]


# reading


class EditTableReader:
    """Reads a CSV text as requests for edits of the served model."""

    def __init__(self, session: Session, model: Model, encoder: TextEncoder) -> None:
        self._session, self._model, self._encoder = session, model, encoder

    def read(self, text: str, columns: Mapping[str, Sequence[str]]) -> ResourceDict:
        """Return {"items": lines with a request, an error and a note each, "valid", "seconds_per_edit"}.

        Raises InvalidInput if the header lacks a column, or if there are too many lines.
        """
        try:
            lines = list(islice(parse_csv_lines(text, "the table", mapping=columns), MAX_EDITS + 1))
        except InvalidInput as error:
            raise InvalidInput(error.detail, "csv") from None
        if not lines:
            raise InvalidInput("the table has a header and no lines: add one for each edit.", "csv")
        if len(lines) > MAX_EDITS:
            raise InvalidInput(
                f"the table has more than {MAX_EDITS} edits: divide it, and give every part the same batch.",
                "csv",
            )
        read = [(line, *self._request(line)) for line in lines]
        valid = {line.number: request for line, request, fault in read if request and not fault}
        notes = self._notes(valid)
        items = [
            {
                "line": line.number,
                "edit": stated_request(line),
                "error": fault and {"field": fault.field, "column": fault.column, "detail": fault.detail},
                "note": notes.get(line.number),
            }
            for line, _, fault in read
        ]
        return {
            "items": items,
            "valid": len(valid),
            "seconds_per_edit": seconds_per_edit(self._session, self._model),
        }

    def _request(self, line: CsvLine) -> tuple[EditRequest | None, LineFault | None]:
        """Return the request that a line states, or what is wrong with it."""
        fields = stated_request(line)
        if line.fault is not None or fields is None:
            return None, line.fault
        try:
            (request,) = resolve_methods([EditRequest.model_validate(fields)], self._model)
            validate_edit(request, self._model, self._encoder)
        except ValidationError as error:
            (message, *_) = validation_messages(
                {**e, "loc": ("edit", *e["loc"])}
                for e in error.errors(include_url=False, include_input=False)
            )
            return None, LineFault(message["detail"], message["field"])
        except InvalidInput as error:
            return None, LineFault(error.detail, error.field or None)
        return request, None

    def _notes(self, requests: Mapping[int, EditRequest]) -> dict[int, str]:
        """Return what supersedes what, by line: a later line an earlier one, and a line an active edit."""
        notes, first_line = dict[int, str](), dict[str, int]()
        active = self._active_edits([request.subject for request in requests.values()])
        for number, request in requests.items():
            key = request.fact.key
            if key in first_line:
                notes[number] = f"states the same fact as line {first_line[key]}: the later one counts"
            elif key in active:
                notes[number] = f"supersedes the active edit {active[key]}"
            first_line.setdefault(key, number)
        return notes

    def _active_edits(self, subjects: Sequence[str]) -> dict[str, str]:
        """Return the ids of the active edits of these subjects, by the key of their facts."""
        names = {normalize_whitespace(subject) for subject in subjects}
        query = select(Job.fact_key, Job.id).where(
            Job.model == self._model.fingerprint,
            Job.kind == "edit",
            Job.status == "applied",
            Job.subject.in_(names),
        )
        return {str(key): job_id for key, job_id in self._session.execute(query)}


def stated_request(line: CsvLine) -> dict[str, Any] | None:
    """Return the fields of the request that a line states; None if it is no record."""
    if line.record is None:
        return None
    row, record = line.row, line.record
    fields = {"subject": record.subject, "prompt": record.prompt, "target_new": record.target_new}
    if record.target_true is not None:
        fields["target_true"] = record.target_true
    probes = {"paraphrase": row.get("paraphrases"), "neighborhood": row.get("neighborhood")}
    return fields | {"probes": {kind: given or "auto" for kind, given in probes.items()}}


RECENT_EDITS = 50  #: applied edits that an estimate looks at


def seconds_per_edit(session: Session, model: Model) -> float | None:
    """Return how long workers were busy with the newest applied edits, for each of them; None if there are none."""
    newest = (
        select(Job.started, Job.ended)
        .where(Job.model == model.fingerprint, Job.kind == "edit", Job.version.is_not(None))
        .order_by(Job.id.desc())
        .limit(RECENT_EDITS)
    )
    times = [(row.started, row.ended) for row in session.execute(newest) if row.started and row.ended]
    return busy_seconds(times) / len(times) if times else None


def busy_seconds(times: Iterable[tuple[datetime, datetime]]) -> float:
    """Return the seconds in which at least one of these periods, given by begin and end, lasted."""
    total, busy_until = 0.0, None
    for begin, end in sorted(times):
        start = begin if busy_until is None else max(begin, busy_until)
        total += max(0.0, (end - start).total_seconds())
        busy_until = end if busy_until is None else max(busy_until, end)
    return total
