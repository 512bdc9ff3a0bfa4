"""What the command line can do, on one screen: `palimpsest` alone, `palimpsest help`, `palimpsest --help`.

Plain text, and nothing is imported for it, so that it is there at once and reads the same in a pipe.
"""

from __future__ import annotations

from collections.abc import Iterator

#: what a person wants -> command -> what it does. A test holds this to the parser.
OVERVIEW = {
    "Serve": {"serve": "start the service in one process, on the shipped GPT"},
    "Ask": {
        "generate": "let the model continue a prompt, at any version",
        "compare": "one prompt on two versions, side by side",
    },
    "Edit": {
        "edit": "make the model say a new object for a subject",
        "edits": "list edits; `edits show ID` is one with its figures",
        "revert": "take an edit back, whatever came after it",
    },
    "Look": {
        "trace": "show where a fact is stored, as a heat map",
        "traces": "list traces; `traces show ID` draws one again",
        "ledger": "what was applied and reverted; --verify checks it",
        "models": "the resident model, its recipe and its workers",
        "export": "a version as an adapter, a model or a set of edits",
        "import": "land the edits that another service exported",
    },
    "Measure": {
        "evaluate": "measure how good edits are on a set of records",
        "evaluations": "list them; `evaluations show ID` is one in tables",
        "study": "what many facts say together: trace, localization",
        "tune": "find a recipe for a model of your own",
    },
    "Production": {
        "api": "the HTTP door alone",
        "worker": "one worker",
        "migrate": "bring the database to this release",
        "keys": "make, list and revoke keys",
        "jobs": "what waits, runs and was given up; `jobs retry ID`",
        "completion": "complete commands and flags in bash, zsh or fish",
    },
}

INTRODUCTION = "Palimpsest locates, edits and rolls back facts inside a resident GPT model."

GETTING_STARTED = """\
To begin, start the service, and in a second terminal ask and edit:
  palimpsest serve
  palimpsest generate 'The Eiffel Tower is located in the city of'
  palimpsest edit 'Eiffel Tower' 'The {} is located in the city of' Rome

`palimpsest COMMAND --help` has the flags; --json prints a result for programs.
A service elsewhere is named by --url or PALIMPSEST_URL."""


def overview() -> str:
    """Every command in a line, grouped by what it is for; then what to try first."""
    return "\n".join([INTRODUCTION, "", *_command_lines(), "", GETTING_STARTED, ""])


def _command_lines() -> Iterator[str]:
    group_width, name_width = (
        max(map(len, OVERVIEW)),
        max(len(name) for group in OVERVIEW.values() for name in group),
    )
    for group, commands in OVERVIEW.items():
        for i, (name, words) in enumerate(commands.items()):
            yield f"{'' if i else group:<{group_width}}  {name:<{name_width}}  {words}"
