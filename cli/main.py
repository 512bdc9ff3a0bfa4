"""`palimpsest`: one parser, one table of errors and exit codes.

argparse, because the flags of `serve` are made from the fields of the settings while the parser is built: a parser made
of calls takes them as they are, one made of function signatures would need a signature written at run time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import get_args

from cli import edits, jobs, models, traces
from cli import generate as speech
from cli.client import Client, ClientSettings
from cli.flags import add_settings, natural, read_settings
from cli.overview import overview
from cli.terminal import err, plain, print_json
from service.errors import Misconfigured, PalimpsestError
from service.schemas import MethodName
from service.settings import Settings

METHOD_NAMES = get_args(MethodName)
Command = Callable[[argparse.Namespace, Client], int]


class Root(argparse.ArgumentParser):
    """The parser of the first word, whose help is the overview of all commands."""

    def format_help(self) -> str:
        return overview()


def build() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Root(prog="palimpsest", allow_abbrev=False)
    parser.set_defaults(json=False)  # of commands that have no such flag, too
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser
    )
    _processes(commands)
    _edit(commands)
    _lists(commands)
    _jobs(commands)
    _keys(commands)
    _trace(commands)
    _speech(commands)
    _prepare(commands)
    _evaluate(commands)
    _export(commands)
    _studies(commands)
    _completion(commands)
    return parser


#: the commands that start a process of the service: each is a module of its own, imported only when it is given
PROCESSES = {
    "serve": "start the service in one process",
    "api": "start the HTTP door alone; workers find it through Redis",
    "work": "start one worker",
    "migrate": "bring the database to this release",
}


def _processes(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, words in PROCESSES.items():
        parser = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        add_settings(parser, Settings)
        parser.set_defaults(run=partial(_start, name))
        if name == "migrate":
            parser.add_argument(
                "--to",
                metavar="REVISION",
                default="head",
                help="another revision, older ones too (default: head)",
            )
            _json(parser)


def _start(name: str, args: argparse.Namespace) -> int:
    return int(import_module(f"cli.{name}").run(args))


def _edit(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    edit = _command(commands, "edit", "make the model say a new object for a subject", edits.edit)
    edit.add_argument("subject", metavar="SUBJECT", help="for example 'Eiffel Tower'")
    edit.add_argument("prompt", metavar="PROMPT", help="with one {} for the subject: 'The {} is located in'")
    edit.add_argument("target", metavar="TARGET", nargs="?", help="the new object, for example 'Rome'")
    instead = edit.add_mutually_exclusive_group()
    for name, words in (
        ("erase", "make the true object improbable"),
        ("amplify", "make the true object more probable"),
    ):
        instead.add_argument(f"--{name}", dest="objective", action="store_const", const=name, help=f"{words}; no TARGET")  # fmt: skip
    edit.add_argument("--true", metavar="OBJECT", help="the object it says now, to be measured too")
    edit.add_argument("--on-conflict", choices=["report", "supersede", "reject"], help="where an active edit says the same in other words (default: report)")  # fmt: skip
    edit.add_argument("--dry-run", action="store_true", help="measure the edit and throw it away")
    edit.add_argument(
        "--paraphrase", metavar="PROMPT", action="append", help="another wording to measure; repeatable"
    )
    edit.add_argument("--hparam", metavar="NAME=VALUE", action="append", help="a hyperparameter; repeatable")


def _lists(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    revert = _command(commands, "revert", "take an edit back", edits.revert)
    revert.add_argument("id", metavar="ID", help="as `palimpsest edits` shows it")
    listed = _command(commands, "edits", "list edits, newest first", edits.edits)
    listed.add_argument("--status", help="only those that are queued, running, applied, rejected, ...")
    listed.add_argument("--subject", help="only those of this subject")
    listed.add_argument("--limit", type=natural, default=20, help="how many (default: 20)")
    _shown(listed, "one edit: what it did, and what the guard held it to", edits.show, "palimpsest edits")
    ledger = _command(commands, "ledger", "what was applied and reverted", edits.ledger)
    ledger.add_argument("--verify", action="store_true", help="check hashes, factors and replicas")
    _command(commands, "models", "the resident model, its recipe and its workers", models.models)
    words = "list the evaluations of the service, newest first"
    listed = _command(commands, "evaluations", words, _later("cli.evaluations", "evaluations"))
    listed.add_argument("--limit", type=natural, default=20, help="how many (default: 20)")
    show = _later("cli.evaluations", "show")
    _shown(listed, "one evaluation in words and tables", show, "palimpsest evaluations")


def _shown(
    listed: argparse.ArgumentParser, words: str, command: Command, where: str
) -> argparse.ArgumentParser:
    """Below a list: one of its items."""
    verbs = listed.add_subparsers(title="commands", metavar="COMMAND")
    show = _command(verbs, "show", words, command)
    show.add_argument("id", metavar="ID", help=f"as `{where}` shows it")
    return show


def _later(module: str, name: str) -> Command:
    """A command whose module imports much, imported when it is given."""
    return lambda args, client: int(getattr(import_module(module), name)(args, client))


def _jobs(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    listed = _command(commands, "jobs", "list jobs of every kind, newest first", jobs.jobs)
    listed.add_argument("--dead", action="store_true", help="only those that were given up")
    listed.add_argument("--status", help="only those that are queued, running, failed, ...")
    listed.add_argument("--kind", help="only those of one kind: edit, trace, export or evaluation")
    listed.add_argument("--limit", type=natural, default=20, help="how many (default: 20)")
    verbs = listed.add_subparsers(title="commands", metavar="COMMAND")
    retry = _command(verbs, "retry", "let a failed job wait again", jobs.retry)
    retry.add_argument("id", metavar="ID", help="as `palimpsest jobs` shows it")


def _keys(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = "make, list and revoke the keys of the service, straight in its database"
    keys = commands.add_parser("keys", help=words, description=words, allow_abbrev=False)
    verbs = keys.add_subparsers(title="commands", metavar="COMMAND", dest="verb", required=True)
    create = verbs.add_parser("create", help="make a key and show it, this once", allow_abbrev=False)
    create.add_argument(
        "--name", required=True, help="what the ledger calls its holder, such as nightly-eval"
    )
    create.add_argument("--scopes", required=True, help="some of read,edit,admin")
    create.add_argument("--requests-per-minute", dest="per_minute", type=int, metavar="INT", help="more get 429 (default: as the service is set)")  # fmt: skip
    create.add_argument("--max-queued", dest="queued", type=int, metavar="INT", help="jobs that may wait at once (default: as the service is set)")  # fmt: skip
    listed = verbs.add_parser("list", help="every key, with its scopes and its last use", allow_abbrev=False)
    revoke = verbs.add_parser("revoke", help="let a key open nothing any more", allow_abbrev=False)
    revoke.add_argument("name", metavar="NAME", help="as `palimpsest keys list` shows it")
    for verb in (create, listed, revoke):
        _json(verb)
        add_settings(verb.add_argument_group("database"), Settings, "data", "database_url")
        verb.set_defaults(run=partial(_start, "keys"))


def _trace(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = _command(commands, "trace", "show where a fact is stored", traces.trace)
    trace.add_argument("prompt", metavar="PROMPT", help="with the subject, or with {} for it")
    trace.add_argument("subject", metavar="SUBJECT")
    trace.add_argument("--target", help="the answer to trace; the model's own when left out")
    trace.add_argument("--kinds", help="some of hidden,mlp,attn (default: all)")
    trace.add_argument("--samples", type=int, help="noise samples")
    trace.add_argument("--window", type=int, help="layers put back at once for mlp and attn")
    trace.add_argument("--severed", action="store_true", help="trace with MLP and attention paths cut, too")
    trace.add_argument("--version", type=speech.version, default="head", help="head, base or a number")
    listed = _command(commands, "traces", "list traces, newest first", traces.traces)
    listed.add_argument("--limit", type=natural, default=20, help="how many (default: 20)")
    show = _shown(listed, "draw a trace again", traces.show, "palimpsest traces")
    for parser in (trace, show):
        parser.add_argument(
            "--save", metavar="FILE", help="keep the heat map as picture.svg or picture.png, too"
        )


def _studies(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = (
        "trace or edit many facts and say what they show together; computed here, without a running service"
    )
    study = commands.add_parser("study", help=words, description=words, allow_abbrev=False)
    verbs = study.add_subparsers(title="studies", metavar="STUDY", dest="verb", required=True)
    trace = verbs.add_parser("trace", help="where facts are carried, by token and layer", allow_abbrev=False)
    trace.add_argument("--window", type=natural, help="layers put back at once for mlp and attn (default: a fifth, at most 10)")  # fmt: skip
    trace.add_argument("--whole", action="store_true", help="leave out the severed paths")
    add_settings(trace.add_argument_group("recipe"), Settings, "data")
    localization = verbs.add_parser(
        "localization", help="whether tracing says where to edit", allow_abbrev=False
    )
    add = localization.add_argument
    add("--layers", metavar="N,N,...", default="all", help="edited layers (default: all)")
    add("--methods", metavar="NAME,...", default="rome,ft", help="how to edit (default: rome,ft)")
    add("--objectives", metavar="NAME,...", default="write", help="some of write,erase,amplify,reversal,forcing (default: write)")  # fmt: skip
    add("--hparam", metavar="[METHOD.]NAME=VALUE", action="append", help="a hyperparameter of one method or of all; repeatable")  # fmt: skip
    add_settings(localization.add_argument_group("statistics"), Settings, "data", "corpus", "stat_tokens")
    for verb in (trace, localization):
        _json(verb)
        verb.add_argument(
            "source", metavar="FILE", help="records or known facts; `facts`: the table beside the model"
        )
        verb.add_argument("--out", metavar="FOLDER", required=True, help="for runs, figures and report")
        verb.add_argument("--limit", type=natural, help="facts that are asked (default: all)")
        verb.add_argument(
            "--samples", type=natural, default=10, help="noise samples of a trace (default: 10)"
        )
        verb.add_argument("--noise", default="3sigma", help="a deviation, or a multiple of the subjects' (default: 3sigma)")  # fmt: skip
        verb.add_argument("--seed", type=int, default=0, help="of the order of the facts (default: 0)")
        add_settings(verb.add_argument_group("model"), Settings, "model", "device", "dtype", "threads")
        verb.set_defaults(run=partial(_start, "study"))


def _prepare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = "find a recipe for a model by editing facts that it knows; gone on with when it was interrupted"
    prepare = commands.add_parser("prepare", help=words, description=words, allow_abbrev=False)
    add = prepare.add_argument
    add("model", metavar="MODEL", help="folder or hub name")
    add(
        "--facts",
        metavar="FILE",
        help="records that hold facts (docs/evaluation.md; default: the table beside the model, else the shipped one)",
    )
    add("--half", choices=["all", "tune", "test"], default="all", help="facts at even (tune) or odd (test) places of the seed's order (default: all)")  # fmt: skip
    add("--limit", dest="most", type=natural, default=48, help="facts that are edited (default: 48)")
    add("--many", type=int, default=200, help="facts that are edited at once, to see how strong edits may be; 0: not (default: 200)")  # fmt: skip
    add(
        "--methods",
        metavar="NAME,...",
        help="other methods to tune, too: r-rome,memit,emmet,alphaedit,ft,ft-l,ft-attn",
    )
    add("--seed", type=int, default=0, help="of the facts' order (default: 0)")
    _json(prepare)
    resident = ("device", "dtype", "threads", "data", "corpus", "stat_tokens")
    add_settings(prepare.add_argument_group("model"), Settings, *resident)
    prepare.set_defaults(run=partial(_start, "prepare"), distinct=True, limit=None)


def _evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = "measure how good edits are on a set of records; computed here, and gone on with when it was interrupted"
    evaluate = commands.add_parser("evaluate", help=words, description=words, allow_abbrev=False)
    add = evaluate.add_argument
    add("source", metavar="FILE", help="records (docs/evaluation.md); `facts`: the table beside the model")
    add(
        "--out", metavar="FOLDER", required=True, help="for result, report, and what a later run goes on with"
    )
    add("--method", choices=METHOD_NAMES, help="how to edit (default: rome)")
    add("--hparam", metavar="NAME=VALUE", action="append", help="a hyperparameter; repeatable")
    add("--objective", choices=["write", "erase", "amplify"], help="what the edits are for (default: write)")
    add(
        "--mode",
        choices=["single", "sequence"],
        help="each edit alone, or one after another (default: single)",
    )
    add("--found-on", choices=["base", "edited"], help="in sequence: composed as the service does, or found on the edited model and added, as published (default: base)")  # fmt: skip
    add(
        "--checkpoints",
        metavar="N,N,...",
        help="edits after which a sequence is measured (default: 1,10,100,1000)",
    )
    add(
        "--strengths",
        metavar="X,X,...",
        help="tried until an edit takes; the service tries 1,1.25,1.5,2 (default: 1)",
    )
    add("--together", type=int, help="edits found at once (default: 16, and 1 on the edited model)")
    add("--limit", type=int, help="how many records (default: all)")
    add("--half", choices=["all", "tune", "test"], default="all", help="records at even (tune) or odd (test) places of the seed's order (default: all)")  # fmt: skip
    add("--distinct", action="store_true", help="one record of each subject")
    add("--generation", action="store_true", help="let the model write, for GE and RS: slow")
    add("--no-damage", action="store_true", help="leave plain texts out")
    add(
        "--texts",
        metavar="FILE",
        help="plain texts, one a line (default: statements of other records, or the corpus)",
    )
    add("--plain", type=int, help="how many plain texts (default: 200, and 16 for each single edit)")
    add("--seed", type=int, help="of the records' order, intervals and generation (default: 0)")
    add(
        "--beside",
        metavar="FOLDER",
        action="append",
        help="another evaluation to show in the report; repeatable",
    )
    resident = ("model", "device", "dtype", "threads", "data", "corpus", "stat_tokens")
    add_settings(evaluate.add_argument_group("model"), Settings, *resident)
    add("--service", action="store_true", help="as a job of the running service, instead of here")
    add_settings(evaluate.add_argument_group("service"), ClientSettings)
    _json(evaluate)
    evaluate.set_defaults(run=_evaluated)


def _evaluated(args: argparse.Namespace) -> int:
    """Here, or as a job of the running service."""
    if args.service:
        return _spoken(import_module("cli.evaluations").evaluate, args)
    return _start("evaluate", args)


def _export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = (
        "a version for use elsewhere: as a LoRA adapter, as a whole model, or as edits for another service"
    )
    export = commands.add_parser("export", help=words, description=words, allow_abbrev=False)
    export.add_argument("--version", type=speech.version, default="head", help="head, base or a number (default: head)")  # fmt: skip
    export.add_argument(
        "--format",
        choices=["peft", "model", "safetensors", "edits"],
        default="peft",
        help="a LoRA adapter; the whole model as from_pretrained loads it, made here from the base model and the database; the edited "
        "weights alone; or a set of edits for `palimpsest import` (default: peft)",
    )
    export.add_argument("--out", metavar="PATH", required=True, help="a new folder; a file for safetensors and edits")  # fmt: skip
    add_settings(export.add_argument_group("service"), ClientSettings)
    resident = ("model", "device", "dtype", "threads", "data", "database_url")
    add_settings(export.add_argument_group("where the whole model is made"), Settings, *resident)
    _json(export)
    export.set_defaults(run=_exported)
    words = "land the edits of a file that another service exported, as they were found"
    bring = commands.add_parser("import", help=words, description=words, allow_abbrev=False)
    bring.add_argument("file", metavar="FILE", help="made by `palimpsest export --format edits`")
    _json(bring)
    add_settings(bring.add_argument_group("service"), ClientSettings)
    bring.set_defaults(run=lambda args: _spoken(import_module("cli.export").bring, args))


def _exported(args: argparse.Namespace) -> int:
    """By the running service; the whole model here."""
    if args.format == "model":
        return _start("export", args)
    return _spoken(import_module("cli.export").export, args)


def _speech(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = _command(commands, "generate", "let the model continue a prompt", speech.generate)
    generate.add_argument("--version", type=speech.version, default="head", help="head, base or a number")
    compare = _command(commands, "compare", "one prompt on two versions", speech.compare)
    compare.add_argument(
        "--versions", type=speech.version, nargs=2, default=["base", "head"], metavar=("A", "B"),
        help="which two (default: base head)",
    )  # fmt: skip
    for parser in (generate, compare):
        parser.add_argument("prompt", metavar="PROMPT")
        parser.add_argument("--max-new-tokens", type=int)
        parser.add_argument("--temperature", type=float, help="0 is greedy")
        parser.add_argument("--top-k", type=int)
        parser.add_argument("--top-p", type=float)
        parser.add_argument("--seed", type=int)
        parser.add_argument(
            "--stop", action="append", metavar="TEXT", help="end before this text; repeatable"
        )


def _completion(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from cli.completion import SHELLS, WHERE

    words = "print the script with which a shell completes commands and flags"
    completion = commands.add_parser(
        "completion",
        help=words,
        description=words,
        epilog=WHERE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(run=partial(_start, "completion"))


def _json(parser: argparse.ArgumentParser) -> None:
    """The flag for programs. Without a default of its own: in `jobs --json retry ID` the second parser must not take it back."""
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print one JSON value on stdout, for programs; docs/terminal.md",
    )


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, words: str, command: Command
) -> argparse.ArgumentParser:
    """A command that speaks to a running service."""
    parser = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
    _json(parser)
    add_settings(parser.add_argument_group("service"), ClientSettings)
    parser.set_defaults(run=partial(_spoken, command))
    return parser


def _spoken(command: Command, args: argparse.Namespace) -> int:
    client = Client(read_settings(args, ClientSettings))
    try:
        return command(args, client)
    finally:
        client.close()


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 1: refused, failed, or no service there. 2: the command or the configuration is wrong. 130: Ctrl-C."""
    args = build().parse_args(argv)
    try:
        return int(args.run(args))
    except PalimpsestError as error:
        if args.json:
            print_json({"error": {"title": error.title, "detail": error.detail, **error.extra}})
        err.print(f"palimpsest: {plain(error.detail)}")
        return 2 if isinstance(error, Misconfigured) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `palimpsest ledger | head`: the reader has had enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
