"""zsRE (Levy et al. 2017) in the form of MEND (Mitchell et al. 2022)."""

from __future__ import annotations

from typing import Any

from service.datasets.parsing import (
    malformed_record,
    optional_tuple,
    record_label,
    validate_record,
    with_placeholder,
)
from service.datasets.record import NeighborProbe, Record


def parse_zsre(row: Any, place: int) -> Record:
    """Parse a record: the first answer is the new object, and the unrelated question must keep its own answer."""
    name = record_label(row, place)
    try:
        record = Record(
            name,
            row["subject"],
            with_placeholder(row["src"], row["subject"]),
            row["answers"][0],
            None,
            optional_tuple(row.get("rephrase")),
            tuple(
                NeighborProbe(p + "?", t)
                for p, t in zip(
                    optional_tuple(row.get("loc")), optional_tuple(row.get("loc_ans")), strict=True
                )
            ),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise malformed_record(name, "zsRE", error) from None
    return validate_record(record)
