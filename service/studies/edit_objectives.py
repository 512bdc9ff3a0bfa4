"""The editing problems of the localization study (Hase et al. 2023, Section 5.3)."""

from __future__ import annotations

from dataclasses import dataclass

from service.schemas import Objective


@dataclass(frozen=True)
class StudyObjective:
    """One editing problem."""

    description: str
    objective: Objective = "write"  #: what the editing methods optimise
    reversed: bool = False  #: the new object is the model's answer when the subject is noised
    noised: bool = False  #: the subject is noised during the search and the measurement


STUDY_OBJECTIVES = {
    "write": StudyObjective("write the new object"),
    "erase": StudyObjective("minimise the probability of the true object", "erase"),
    "amplify": StudyObjective("maximise the probability of the true object", "amplify"),
    "reversal": StudyObjective("write the model's answer to the noised subject", reversed=True),
    "forcing": StudyObjective(
        "maximise the probability of the true object for the noised subject", "amplify", noised=True
    ),
}
