"""The overview of all commands: `palimpsest`, `palimpsest help`, `palimpsest --help`.

Plain text without imports, so that it prints at once and reads the same in a pipe.
"""

from __future__ import annotations

from collections.abc import Iterator

#: group -> command -> summary. A test compares it with the parser.
OVERVIEW = {
    "Serve": {
        "serve": "run API and worker in one process, on the shipped GPT",
        "fetch": "put a public model into the folder of models",
    },
    "Generate": {
        "generate": "continue a prompt, with any version",
        "compare": "continue a prompt with two versions, side by side",
        "chat": "talk with a chat model, with any version",
    },
    "Edit": {
        "edit": "change a fact; --file FILE.csv changes many",
        "edits": "list edits; `edits show ID` shows one with its details",
        "revert": "revert an edit, several or a batch",
        "import": "apply edits that another service exported",
    },
    "Inspect": {
        "trace": "show where a fact is stored, as a heat map",
        "traces": "list traces; `traces show ID` draws one again",
        "ledger": "list applied and reverted edits; --verify checks it",
        "versions": "names of versions; `versions diff A B` compares two",
        "models": "show the served model, its recipe and its workers",
        "export": "save a version as an adapter, a model or a set of edits",
    },
    "Evaluate": {
        "evaluate": "measure the quality of edits on a set of records",
        "evaluations": "list evaluations; `evaluations show ID` shows one",
        "report": "show stored evaluations beside each other",
        "study": "trace or edit many facts and aggregate the results",
        "tune": "find a recipe for a model of your own",
        "train": "train the learned part of the method serac",
    },
    "Operate": {
        "api": "run an API process",
        "worker": "run a worker process",
        "mcp": "tools for an assistant (Model Context Protocol)",
        "migrate": "migrate the database to this release",
        "keys": "create, list and revoke API keys",
        "prune": "delete expired jobs and idempotency keys",
        "audit": "verify the ledger offline; show or replace its key",
        "jobs": "list jobs; `jobs cancel ID` and `jobs retry ID`",
        "completion": "print a completion script for bash, zsh or fish",
    },
}

INTRODUCTION = "Palimpsest locates, edits and reverts facts in a GPT model while it serves."

GETTING_STARTED = """\
Start the service, then generate and edit in a second terminal:
  palimpsest serve
  palimpsest generate 'The Eiffel Tower is located in the city of'
  palimpsest edit 'Eiffel Tower' 'The {} is located in the city of' Rome

`palimpsest COMMAND --help` lists the options of a command; --json prints its
result for programs. --url or PALIMPSEST_URL sets the address of the service."""


def overview() -> str:
    """Return the commands with their summaries, by group, and the first commands to try."""
    return "\n".join([INTRODUCTION, "", *_command_lines(), "", GETTING_STARTED, ""])


def _command_lines() -> Iterator[str]:
    group_width, name_width = (
        max(map(len, OVERVIEW)),
        max(len(name) for group in OVERVIEW.values() for name in group),
    )
    for group, commands in OVERVIEW.items():
        for i, (name, summary) in enumerate(commands.items()):
            yield f"{'' if i else group:<{group_width}}  {name:<{name_width}}  {summary}"


def summary_of(command: str) -> str:
    """Return the summary of a command."""
    return next(commands[command] for commands in OVERVIEW.values() if command in commands)
