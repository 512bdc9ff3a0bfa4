"""Lines of CSV that a spreadsheet shows as they are, and the cells that such a line was made of.

A spreadsheet runs a cell that begins with a sign such as `=` as a formula. Such a cell gets an apostrophe in front,
which a spreadsheet takes as "this is text". Every cell stands in quotes, so that no separator of another country
divides one.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

#: the beginning of a cell that a spreadsheet would run, also in full width; or of one that looks neutralized already
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def encode_line(cells: Sequence[Any]) -> str:
    """Return a line of CSV (RFC 4180). None is an empty cell; a text is neutralized, and a number stays a number."""
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL).writerow(map(_shown, cells))
    return line.getvalue()


def _shown(cell: Any) -> Any:
    if isinstance(cell, bool):
        return str(cell).lower()
    return neutralize(cell) if isinstance(cell, str) else cell


def neutralize(text: str) -> str:
    """Return a text with an apostrophe in front if a spreadsheet would run it as a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def restore(cell: str) -> str:
    """Return the text that `neutralize` made a cell of. Other cells stay as they are."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
