"""What the edits of a study are to do with a fact (Hase et al. 2023, Section 5.3; methods F.1)."""

from __future__ import annotations

from dataclasses import dataclass

from service.schemas import Objective


@dataclass(frozen=True)
class StudyObjective:
    """One of the editing problems."""

    description: str
    objective: Objective = "write"  #: what the editors know it as
    reversed: bool = False  #: the new object is what the model says when the subject is noised
    noised: bool = False  #: the subject is noised while the edit is found, and while it is measured


STUDY_OBJECTIVES = {
    "write": StudyObjective("write the new object"),
    "erase": StudyObjective("make the true object improbable", "erase"),
    "amplify": StudyObjective("make the true object more probable", "amplify"),
    "reversal": StudyObjective("write what is said of the noised subject", reversed=True),
    "forcing": StudyObjective("make the true object said of the noised subject", "amplify", noised=True),
}
