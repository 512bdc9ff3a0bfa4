"""Records in a CSV file: one a row, with a header. A mapping says which column has which field.

A field without a mapping is read from the column of its name. An error names the line and the column.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.datasets.record import Record
from service.datasets.user_records import UserRecord, parse_user_record
from service.errors import InvalidInput
from service.kit.csv_text import restore
from service.kit.validation_messages import validation_messages

SEPARATORS = (",", ";", "\t")  #: of cells; spreadsheets write semicolons where a comma is the decimal sign
#: ending of a file of records -> what separates its cells; None: one of SEPARATORS
SUFFIXES = {".csv": None, ".tsv": "\t"}
MAX_LISTED = 40  #: columns that an error lists, and characters of each
REQUIRED = ("subject", "prompt", "target_new")
#: the neighbour of a row: its prompt and its own object
NEIGHBOR_PROMPT, NEIGHBOR_TARGET = "neighborhood.prompt", "neighborhood.target"
#: the fields that a column can have; several columns can have paraphrases
FIELDS = (*REQUIRED, "target_true", "relation", "paraphrases", NEIGHBOR_PROMPT, NEIGHBOR_TARGET)


@dataclass(frozen=True)
class LineFault:
    """What is wrong with a line: the field and the column at fault, where it is one, and what to change."""

    detail: str
    field: str | None = None
    column: str | None = None


@dataclass(frozen=True)
class CsvLine:
    """A line below the header: its record as the file has it, and parsed; or what is wrong with it."""

    number: int  #: in the file; the header is line 1
    row: dict[str, Any]
    record: Record | None = None
    fault: LineFault | None = None

    def require_row(self, file: str) -> dict[str, Any]:
        """Return the row. Raise InvalidInput, with its line and column, if it is not a record."""
        if self.fault is None:
            return self.row
        where = f"line {self.number} of {file}" + (
            f", column {self.fault.column!r}" if self.fault.column else ""
        )
        raise InvalidInput(f"{where}: {self.fault.detail}", "records")


def read_csv_rows(path: Path, mapping: Mapping[str, Sequence[str]] | None = None) -> list[dict[str, Any]]:
    """Return the rows of a file as users' records. `mapping`: field -> its columns."""
    return [line.require_row(path.name) for line in read_csv_lines(path, mapping)]


def read_csv_lines(path: Path, mapping: Mapping[str, Sequence[str]] | None = None) -> Iterator[CsvLine]:
    """Yield the lines of a file below its header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise InvalidInput(f"the records {str(path)!r} cannot be read: {error}", "records") from None
    return parse_csv_lines(text, path.name, SUFFIXES[path.suffix.lower()], mapping)


def parse_csv_lines(
    text: str, file: str, separator: str | None = None, mapping: Mapping[str, Sequence[str]] | None = None
) -> Iterator[CsvLine]:
    """Yield the lines of a text below its header. `file` is what an error calls it; without a separator it is the one
    of SEPARATORS that the header has most often."""
    text = text.removeprefix("\ufeff")
    first = text.partition("\n")[0]
    separator = separator or max(SEPARATORS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise InvalidInput(f"line 1 of {file} is not CSV: {error}.", "records") from None
    return _Table(header, _columns_of(file, header, mapping or {})).lines(reader)


def _columns_of(
    file: str, header: Sequence[str], mapping: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Return the columns of each field that the file has. Raise InvalidInput if a column or a required field is
    missing."""
    listed = ", ".join(repr(name[:MAX_LISTED]) for name in header[:MAX_LISTED]) or "none"
    if len(header) > MAX_LISTED:
        listed += f" and {len(header) - MAX_LISTED} more"
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
                f"line 1 of {file} names no column {field!r}: its columns are {listed}. Rename one, or say which one has it with "
                f"--column {field}=NAME.",
                "records",
            )
    return columns


@dataclass(frozen=True)
class _Table:
    """The header of a file, and the columns of the fields."""

    header: Sequence[str]
    columns: Mapping[str, Sequence[str]]

    def lines(self, reader: Any) -> Iterator[CsvLine]:
        """Yield the lines below the header. Empty ones are skipped; nothing can be read after one that is not CSV."""
        place = 0
        while True:
            number, place = (
                reader.line_num + 1,
                place + 1,
            )  # a row with line breaks in a cell has several lines
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield CsvLine(reader.line_num, {}, fault=LineFault(f"it is not CSV: {error}."))
                return
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) == len(self.header):
                yield self._line(dict(zip(self.header, cells, strict=True)), number, place)
            else:
                detail = f"it has {len(cells)} cells, and the header has {len(self.header)}."
                yield CsvLine(number, {}, fault=LineFault(detail))

    def _line(self, cells: Mapping[str, str], number: int, place: int) -> CsvLine:
        """Return a line with its record, or with what is wrong and the column where one is at fault."""
        row = self._row(cells)
        try:
            UserRecord.model_validate(row)
            return CsvLine(number, row, parse_user_record(row, place))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            (message,) = validation_messages([{**first, "loc": ("record", *first["loc"])}])
            field = message["field"]
            return CsvLine(number, row, fault=LineFault(message["detail"], field, self._column_of(field)))
        except InvalidInput as error:
            return CsvLine(number, row, fault=LineFault(error.detail.removeprefix(f"record {place}: ")))

    def _row(self, cells: Mapping[str, str]) -> dict[str, Any]:
        def value(field: str) -> str:
            return self._text(cells, self.columns[field][0]) if field in self.columns else ""

        row: dict[str, Any] = {field: value(field) for field in REQUIRED}
        row |= {field: value(field) for field in ("target_true", "relation") if value(field)}
        paraphrases = [self._text(cells, column) for column in self.columns.get("paraphrases", ())]
        row["paraphrases"] = [text for text in paraphrases if text]
        if value(NEIGHBOR_PROMPT):
            row["neighborhood"] = [{"prompt": value(NEIGHBOR_PROMPT), "target": value(NEIGHBOR_TARGET)}]
        return row

    @staticmethod
    def _text(cells: Mapping[str, str], column: str) -> str:
        """Return the text of a cell, also of one that the service neutralized for spreadsheets."""
        return restore(cells[column]).strip()

    def _column_of(self, field: str) -> str | None:
        """Return the column of a field, such as `neighborhood.0.target` or `paraphrases.1`."""
        name, *rest = field.split(".")
        key = f"{name}.{rest[-1]}" if name == "neighborhood" and rest else name
        columns = self.columns.get(key, ())
        return columns[0] if columns else None
