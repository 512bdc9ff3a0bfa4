"""Records in a CSV file: one a row, with a header. A mapping says which column has which field.

A field without a mapping is read from the column of its name. An error names the line and the column.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.datasets.user_records import UserRecord, parse_user_record
from service.errors import InvalidInput
from service.kit.validation_messages import validation_messages

SUFFIXES = {".csv": ",", ".tsv": "\t"}  #: ending of a file -> what separates its cells
REQUIRED = ("subject", "prompt", "target_new")
#: the neighbour of a row: its prompt and its own object
NEIGHBOR_PROMPT, NEIGHBOR_TARGET = "neighborhood.prompt", "neighborhood.target"
#: the fields that a column can have; several columns can have paraphrases
FIELDS = (*REQUIRED, "target_true", "relation", "paraphrases", NEIGHBOR_PROMPT, NEIGHBOR_TARGET)


def read_csv_rows(path: Path, mapping: Mapping[str, Sequence[str]] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a file as users' records. `mapping`: field -> its columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=SUFFIXES[path.suffix.lower()], strict=True)
            header = next(reader, [])
            table = _Table(path.name, header, _columns_of(path.name, header, mapping or {}))
            return list(table.records(reader))
    except (OSError, UnicodeError) as error:
        raise InvalidInput(f"the records {str(path)!r} cannot be read: {error}", "records") from None
    except csv.Error as error:
        raise InvalidInput(f"line {reader.line_num} of {path.name} is not CSV: {error}.", "records") from None


def _columns_of(
    file: str, header: Sequence[str], mapping: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the columns of each field that the file has. Raise InvalidInput if a column or a required field is
    missing."""
    listed = ", ".join(map(repr, header)) or "none"
    for field, names in mapping.items():
        if field not in FIELDS:
            raise InvalidInput(
                f"there is no field {field!r} of records: known are {', '.join(FIELDS)}.", "records"
            )
        for name in names:
            if name not in header:
                raise InvalidInput(
                    f"line 1 of {file} has no column {name!r}: its columns are {listed}.", "records"
                )
    columns = {field: [field] for field in FIELDS if field in header} | {
        f: list(n) for f, n in mapping.items()
    }
    for field in REQUIRED:
        if field not in columns:
            raise InvalidInput(
                f"line 1 of {file} names no column {field!r}: its columns are {listed}. Say which one has it with --column "
                f"{field}=NAME.",
                "records",
            )
    return columns


@dataclass(frozen=True)
class _Table:
    """The header of a file, and the columns of the fields."""

    file: str
    header: Sequence[str]
    columns: Mapping[str, Sequence[str]]

    def records(self, reader: Any) -> Iterator[dict[str, Any]]:
        """Yield the records of the rows below the header. Empty lines are skipped."""
        line = reader.line_num + 1  # of the next row; one with line breaks in a cell has several
        for place, cells in enumerate(reader, 1):
            if any(cell.strip() for cell in cells):
                if len(cells) != len(self.header):
                    raise self._error(
                        line, None, f"it has {len(cells)} cells, and the header has {len(self.header)}."
                    )
                yield self._checked(dict(zip(self.header, cells, strict=True)), line, place)
            line = reader.line_num + 1

    def _checked(self, cells: Mapping[str, str], line: int, place: int) -> dict[str, Any]:
        """Return the record of a row. Raise InvalidInput with its line, and the column where one is at fault."""
        record = self._record(cells)
        try:
            UserRecord.model_validate(record)
            parse_user_record(record, place)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            (message,) = validation_messages([{**first, "loc": ("record", *first["loc"])}])
            raise self._error(line, message["field"], message["detail"]) from None
        except InvalidInput as error:
            raise self._error(line, None, error.detail.removeprefix(f"record {place}: ")) from None
        return record

    def _record(self, cells: Mapping[str, str]) -> dict[str, Any]:
        def value(field: str) -> str:
            return cells[self.columns[field][0]].strip() if field in self.columns else ""

        record: dict[str, Any] = {field: value(field) for field in REQUIRED}
        record |= {field: value(field) for field in ("target_true", "relation") if value(field)}
        paraphrases = [cells[column].strip() for column in self.columns.get("paraphrases", ())]
        record["paraphrases"] = [text for text in paraphrases if text]
        if value(NEIGHBOR_PROMPT):
            record["neighborhood"] = [{"prompt": value(NEIGHBOR_PROMPT), "target": value(NEIGHBOR_TARGET)}]
        return record

    def _error(self, line: int, field: str | None, detail: str) -> InvalidInput:
        where = f"line {line} of {self.file}"
        if field is not None and (column := self._column_of(field)):
            where += f", column {column!r}"
        return InvalidInput(f"{where}: {detail}", "records")

    def _column_of(self, field: str) -> str | None:
        """Return the column of a field, such as `neighborhood.0.target` or `paraphrases.1`."""
        name, *rest = field.split(".")
        key = f"{name}.{rest[-1]}" if name == "neighborhood" and rest else name
        columns = self.columns.get(key, ())
        return columns[0] if columns else None
