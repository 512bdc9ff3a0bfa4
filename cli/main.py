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
from cli.flags import add_setting_flags, positive_int, read_settings
from cli.overview import overview
from cli.terminal import err, print_json, strip_control_chars
from service.errors import Misconfigured, PalimpsestError, error_document
from service.schemas import MethodName
from service.settings import Settings

METHOD_NAMES = get_args(MethodName)
Command = Callable[[argparse.Namespace, Client], int]


class RootParser(argparse.ArgumentParser):
    """The parser of the first word, whose help is the overview of all commands."""

    def format_help(self) -> str:
        return overview()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = RootParser(prog="palimpsest", allow_abbrev=False)
    parser.set_defaults(json=False)  # of commands that have no such flag, too
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser
    )
    _add_process_commands(commands)
    _add_edit_command(commands)
    _add_list_commands(commands)
    _add_jobs_commands(commands)
    _add_keys_commands(commands)
    _add_trace_commands(commands)
    _add_generate_commands(commands)
    _add_tune_command(commands)
    _add_evaluate_command(commands)
    _add_export_commands(commands)
    _add_study_commands(commands)
    _add_completion_command(commands)
    return parser


#: the commands that start a process of the service: each is a module of its own, imported only when it is given
PROCESS_COMMANDS = {
    "serve": "start the service in one process",
    "api": "start the HTTP door alone; workers find it through Redis",
    "worker": "start one worker",
    "migrate": "bring the database to this release",
}


def _add_process_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, words in PROCESS_COMMANDS.items():
        parser = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        add_setting_flags(parser, Settings)
        parser.set_defaults(run=partial(_run_module, name))
        if name == "migrate":
            parser.add_argument(
                "--to",
                metavar="REVISION",
                default="head",
                help="another revision, older ones too (default: head)",
            )
            _add_json_flag(parser)


def _run_module(name: str, args: argparse.Namespace) -> int:
    return int(import_module(f"cli.{name}").run(args))


def _add_edit_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    edit = _add_client_command(
        commands, "edit", "make the model say a new object for a subject", edits.submit_edit
    )
    edit.add_argument("subject", metavar="SUBJECT", help="for example 'Eiffel Tower'")
    edit.add_argument("prompt", metavar="PROMPT", help="with one {} for the subject: 'The {} is located in'")
    edit.add_argument("target", metavar="TARGET", nargs="?", help="the new object, for example 'Rome'")
    objective_group = edit.add_mutually_exclusive_group()
    for name, words in (
        ("erase", "make the true object improbable"),
        ("amplify", "make the true object more probable"),
    ):
        objective_group.add_argument(f"--{name}", dest="objective", action="store_const", const=name, help=f"{words}; no TARGET")  # fmt: skip
    edit.add_argument("--true", metavar="OBJECT", help="the object it says now, to be measured too")
    edit.add_argument("--on-conflict", choices=["report", "supersede", "reject"], help="where an active edit says the same in other words (default: report)")  # fmt: skip
    edit.add_argument("--dry-run", action="store_true", help="measure the edit and throw it away")
    edit.add_argument(
        "--paraphrase", metavar="PROMPT", action="append", help="another wording to measure; repeatable"
    )
    edit.add_argument("--hparam", metavar="NAME=VALUE", action="append", help="a hyperparameter; repeatable")


def _add_list_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    revert = _add_client_command(commands, "revert", "take an edit back", edits.revert_edit)
    revert.add_argument("id", metavar="ID", help="as `palimpsest edits` shows it")
    list_parser = _add_client_command(commands, "edits", "list edits, newest first", edits.list_edits)
    list_parser.add_argument("--status", help="only those that are queued, running, applied, rejected, ...")
    list_parser.add_argument("--subject", help="only those of this subject")
    list_parser.add_argument("--limit", type=positive_int, default=20, help="how many (default: 20)")
    _add_show_command(
        list_parser,
        "one edit: what it did, and what the guard held it to",
        edits.show_edit,
        "palimpsest edits",
    )
    ledger = _add_client_command(commands, "ledger", "what was applied and reverted", edits.show_ledger)
    ledger.add_argument("--verify", action="store_true", help="check hashes, factors and replicas")
    _add_client_command(
        commands, "models", "the resident model, its recipe and its workers", models.list_models
    )
    words = "list the evaluations of the service, newest first"
    list_parser = _add_client_command(
        commands, "evaluations", words, _lazy_command("cli.evaluations", "list_evaluations")
    )
    list_parser.add_argument("--limit", type=positive_int, default=20, help="how many (default: 20)")
    show = _lazy_command("cli.evaluations", "show_evaluation")
    _add_show_command(list_parser, "one evaluation in words and tables", show, "palimpsest evaluations")


def _add_show_command(
    list_parser: argparse.ArgumentParser, help_text: str, command: Command, list_command: str
) -> argparse.ArgumentParser:
    """Below a list: one of its items."""
    verbs = list_parser.add_subparsers(title="commands", metavar="COMMAND")
    show = _add_client_command(verbs, "show", help_text, command)
    show.add_argument("id", metavar="ID", help=f"as `{list_command}` shows it")
    return show


def _lazy_command(module: str, name: str) -> Command:
    """A command whose module imports much, imported when it is given."""
    return lambda args, client: int(getattr(import_module(module), name)(args, client))


def _add_jobs_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    list_parser = _add_client_command(
        commands, "jobs", "list jobs of every kind, newest first", jobs.list_jobs
    )
    list_parser.add_argument("--dead", action="store_true", help="only those that were given up")
    list_parser.add_argument("--status", help="only those that are queued, running, failed, ...")
    list_parser.add_argument("--kind", help="only those of one kind: edit, trace, export or evaluation")
    list_parser.add_argument("--limit", type=positive_int, default=20, help="how many (default: 20)")
    verbs = list_parser.add_subparsers(title="commands", metavar="COMMAND")
    retry = _add_client_command(verbs, "retry", "let a failed job wait again", jobs.retry_job)
    retry.add_argument("id", metavar="ID", help="as `palimpsest jobs` shows it")


def _add_keys_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    list_parser = verbs.add_parser(
        "list", help="every key, with its scopes and its last use", allow_abbrev=False
    )
    revoke = verbs.add_parser("revoke", help="let a key open nothing any more", allow_abbrev=False)
    revoke.add_argument("name", metavar="NAME", help="as `palimpsest keys list` shows it")
    for verb in (create, list_parser, revoke):
        _add_json_flag(verb)
        add_setting_flags(verb.add_argument_group("database"), Settings, "data_dir", "database_url")
        verb.set_defaults(run=partial(_run_module, "keys"))


def _add_trace_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    trace = _add_client_command(commands, "trace", "show where a fact is stored", traces.submit_trace)
    trace.add_argument("prompt", metavar="PROMPT", help="with the subject, or with {} for it")
    trace.add_argument("subject", metavar="SUBJECT")
    trace.add_argument("--target", help="the answer to trace; the model's own when left out")
    trace.add_argument("--kinds", help="some of hidden,mlp,attn (default: all)")
    trace.add_argument("--samples", type=int, help="noise samples")
    trace.add_argument("--window", type=int, help="layers put back at once for mlp and attn")
    trace.add_argument("--severed", action="store_true", help="trace with MLP and attention paths cut, too")
    trace.add_argument("--version", type=speech.parse_version, default="head", help="head, base or a number")
    list_parser = _add_client_command(commands, "traces", "list traces, newest first", traces.list_traces)
    list_parser.add_argument("--limit", type=positive_int, default=20, help="how many (default: 20)")
    show = _add_show_command(list_parser, "draw a trace again", traces.show_trace, "palimpsest traces")
    for parser in (trace, show):
        parser.add_argument(
            "--save", metavar="FILE", help="keep the heat map as picture.svg or picture.png, too"
        )


def _add_study_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = (
        "trace or edit many facts and say what they show together; computed here, without a running service"
    )
    study = commands.add_parser("study", help=words, description=words, allow_abbrev=False)
    verbs = study.add_subparsers(title="studies", metavar="STUDY", dest="verb", required=True)
    trace = verbs.add_parser("trace", help="where facts are carried, by token and layer", allow_abbrev=False)
    trace.add_argument("--window", type=positive_int, help="layers put back at once for mlp and attn (default: a fifth, at most 10)")  # fmt: skip
    trace.add_argument("--whole", action="store_true", help="leave out the severed paths")
    add_setting_flags(trace.add_argument_group("recipe"), Settings, "data_dir")
    localization = verbs.add_parser(
        "localization", help="whether tracing says where to edit", allow_abbrev=False
    )
    add = localization.add_argument
    add("--layers", metavar="N,N,...", default="all", help="edited layers (default: all)")
    add("--methods", metavar="NAME,...", default="rome,ft", help="how to edit (default: rome,ft)")
    add("--objectives", metavar="NAME,...", default="write", help="some of write,erase,amplify,reversal,forcing (default: write)")  # fmt: skip
    add("--hparam", metavar="[METHOD.]NAME=VALUE", action="append", help="a hyperparameter of one method or of all; repeatable")  # fmt: skip
    add_setting_flags(
        localization.add_argument_group("statistics"), Settings, "data_dir", "corpus", "covariance_tokens"
    )
    for verb in (trace, localization):
        _add_json_flag(verb)
        verb.add_argument(
            "source", metavar="FILE", help="records or known facts; `facts`: the table beside the model"
        )
        verb.add_argument("--out", metavar="FOLDER", required=True, help="for runs, figures and report")
        verb.add_argument("--limit", type=positive_int, help="facts that are asked (default: all)")
        verb.add_argument(
            "--samples", type=positive_int, default=10, help="noise samples of a trace (default: 10)"
        )
        verb.add_argument("--noise", default="3sigma", help="a deviation, or a multiple of the subjects' (default: 3sigma)")  # fmt: skip
        verb.add_argument("--seed", type=int, default=0, help="of the order of the facts (default: 0)")
        add_setting_flags(verb.add_argument_group("model"), Settings, "model", "device", "dtype", "threads")
        verb.set_defaults(run=partial(_run_module, "study"))


def _add_tune_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = "find a recipe for a model by editing facts that it knows; gone on with when it was interrupted"
    tune = commands.add_parser("tune", help=words, description=words, allow_abbrev=False)
    add = tune.add_argument
    add("model", metavar="MODEL", help="folder or hub name")
    add(
        "--facts",
        metavar="FILE",
        help="records that hold facts (docs/evaluation.md; default: the table beside the model, else the shipped one)",
    )
    add("--half", choices=["all", "tune", "test"], default="all", help="facts at even (tune) or odd (test) places of the seed's order (default: all)")  # fmt: skip
    add("--limit", dest="most", type=positive_int, default=48, help="facts that are edited (default: 48)")
    add("--many", type=int, default=200, help="facts that are edited at once, to see how strong edits may be; 0: not (default: 200)")  # fmt: skip
    add(
        "--methods",
        metavar="NAME,...",
        help=f"other methods to tune, too: {','.join(METHOD_NAMES[1:])}",
    )
    add("--seed", type=int, default=0, help="of the facts' order (default: 0)")
    _add_json_flag(tune)
    model_settings = ("device", "dtype", "threads", "data_dir", "corpus", "covariance_tokens")
    add_setting_flags(tune.add_argument_group("model"), Settings, *model_settings)
    tune.set_defaults(run=partial(_run_module, "tune"), distinct=True, limit=None)


def _add_evaluate_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
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
    model_settings = ("model", "device", "dtype", "threads", "data_dir", "corpus", "covariance_tokens")
    add_setting_flags(evaluate.add_argument_group("model"), Settings, *model_settings)
    add("--service", action="store_true", help="as a job of the running service, instead of here")
    add_setting_flags(evaluate.add_argument_group("service"), ClientSettings)
    _add_json_flag(evaluate)
    evaluate.set_defaults(run=_run_evaluate)


def _run_evaluate(args: argparse.Namespace) -> int:
    """Here, or as a job of the running service."""
    if args.service:
        return _run_with_client(import_module("cli.evaluations").submit_evaluation, args)
    return _run_module("evaluate", args)


def _add_export_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    words = (
        "a version for use elsewhere: as a LoRA adapter, as a whole model, or as edits for another service"
    )
    export = commands.add_parser("export", help=words, description=words, allow_abbrev=False)
    export.add_argument("--version", type=speech.parse_version, default="head", help="head, base or a number (default: head)")  # fmt: skip
    export.add_argument(
        "--format",
        choices=["peft", "model", "safetensors", "edits"],
        default="peft",
        help="a LoRA adapter; the whole model as from_pretrained loads it, made here from the base model and the database; the edited "
        "weights alone; or a set of edits for `palimpsest import` (default: peft)",
    )
    export.add_argument("--out", metavar="PATH", required=True, help="a new folder; a file for safetensors and edits")  # fmt: skip
    add_setting_flags(export.add_argument_group("service"), ClientSettings)
    model_settings = ("model", "device", "dtype", "threads", "data_dir", "database_url")
    add_setting_flags(export.add_argument_group("where the whole model is made"), Settings, *model_settings)
    _add_json_flag(export)
    export.set_defaults(run=_run_export)
    words = "land the edits of a file that another service exported, as they were found"
    import_parser = commands.add_parser("import", help=words, description=words, allow_abbrev=False)
    import_parser.add_argument("file", metavar="FILE", help="made by `palimpsest export --format edits`")
    _add_json_flag(import_parser)
    add_setting_flags(import_parser.add_argument_group("service"), ClientSettings)
    import_parser.set_defaults(
        run=lambda args: _run_with_client(import_module("cli.export").import_edits, args)
    )


def _run_export(args: argparse.Namespace) -> int:
    """By the running service; the whole model here."""
    if args.format == "model":
        return _run_module("export", args)
    return _run_with_client(import_module("cli.export").export_version, args)


def _add_generate_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    generate = _add_client_command(commands, "generate", "let the model continue a prompt", speech.generate)
    generate.add_argument(
        "--version", type=speech.parse_version, default="head", help="head, base or a number"
    )
    compare = _add_client_command(commands, "compare", "one prompt on two versions", speech.compare)
    compare.add_argument(
        "--versions", type=speech.parse_version, nargs=2, default=["base", "head"], metavar=("A", "B"),
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


def _add_completion_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from cli.completion import INSTALL_HELP, SHELLS

    words = "print the script with which a shell completes commands and flags"
    completion = commands.add_parser(
        "completion",
        help=words,
        description=words,
        epilog=INSTALL_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(run=partial(_run_module, "completion"))


def _add_json_flag(parser: argparse.ArgumentParser) -> None:
    """The flag for programs. Without a default of its own: in `jobs --json retry ID` the second parser must not take it back."""
    parser.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print one JSON value on stdout, for programs; docs/terminal.md",
    )


def _add_client_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, help_text: str, command: Command
) -> argparse.ArgumentParser:
    """A command that speaks to a running service."""
    parser = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
    _add_json_flag(parser)
    add_setting_flags(parser.add_argument_group("service"), ClientSettings)
    parser.set_defaults(run=partial(_run_with_client, command))
    return parser


def _run_with_client(command: Command, args: argparse.Namespace) -> int:
    client = Client(read_settings(args, ClientSettings))
    try:
        return command(args, client)
    finally:
        client.close()


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 1: refused, failed, or no service there. 2: the command or the configuration is wrong. 130: Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        return int(args.run(args))
    except PalimpsestError as error:
        if args.json:
            print_json({"error": {**error_document(error), **error.extra}})
        err.print(f"palimpsest: {strip_control_chars(error.detail)}")
        return 2 if isinstance(error, Misconfigured) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `palimpsest ledger | head`: the reader has had enough
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
