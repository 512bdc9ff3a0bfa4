"""CounterFact (Meng et al. 2022): the published form, and the flat one of EasyEdit."""

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


def parse_counterfact(row: Any, place: int) -> Record:
    """Parse a record of CounterFact as published."""
    name = record_label(row, place)
    try:
        rewrite, true = row["requested_rewrite"], row["requested_rewrite"]["target_true"]["str"]
        record = Record(
            name,
            rewrite["subject"],
            rewrite["prompt"],
            rewrite["target_new"]["str"],
            true,
            tuple(row["paraphrase_prompts"]),
            tuple(NeighborProbe(p, true) for p in row["neighborhood_prompts"]),
            tuple(row.get("attribute_prompts", ())),
            tuple(row.get("generation_prompts", ())),
            tuple(row.get("reference_texts", ())),
            rewrite.get("relation_id", ""),
        )
    except (KeyError, TypeError) as error:
        raise malformed_record(name, "CounterFact", error) from None
    return validate_record(record)


def parse_flat_counterfact(row: Any, place: int) -> Record:
    """Parse a record of EasyEdit's flat form, in which the prompt spells the subject out."""
    name = record_label(row, place)
    try:
        record = Record(
            name,
            row["subject"],
            with_placeholder(row["prompt"], row["subject"]),
            row["target_new"],
            row["ground_truth"],
            optional_tuple(row.get("rephrase_prompt")),
            tuple(
                map(
                    NeighborProbe,
                    optional_tuple(row.get("locality_prompt")),
                    optional_tuple(row.get("locality_ground_truth")),
                )
            ),
        )
    except (KeyError, TypeError) as error:
        raise malformed_record(name, "flat CounterFact", error) from None
    return validate_record(record)
