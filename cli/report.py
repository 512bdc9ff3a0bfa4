"""`palimpsest report`: stored evaluations beside each other, as one page and as CSV."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from cli.client import add_connection_flags, run_with_client
from cli.evaluate import load_result
from cli.flags import add_command, add_json_flag
from cli.terminal import err, format_list, out, print_json, strip_control_chars
from palimpsest import Client
from service.errors import InvalidInput

EVALUATION_ID = "evaluation_"  #: the beginning of the id of an evaluation of the service


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "report",
        run,
        description="Show stored evaluations beside each other: a table of methods and measures, the differences from the first one "
        "with paired intervals, and a self-contained page with figures.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="EVALUATION",
        help="folder of `palimpsest evaluate --out`, or id of an evaluation of the service",
    )
    parser.add_argument(
        "--out", metavar="FILE", default="report.html", help="the page (default: report.html)"
    )
    parser.add_argument("--csv", metavar="FILE", help="also write every measure as CSV")
    add_json_flag(parser)
    add_connection_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Read the results, print the table, and write the files."""
    from service.evaluation import leaderboard

    results = read_results(args)
    columns, rows = leaderboard.leaderboard(results)
    if args.json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return write_files(args, results)
    shown = [[cell if not isinstance(cell, float) else f"{cell:.3f}" for cell in row] for row in rows]
    transposed = list(zip(columns[1:], *[row[1:] for row in shown], strict=True))
    out.print(format_list(("measure", *(strip_control_chars(str(row[0])) for row in shown)), transposed))
    return write_files(args, results)


def write_files(args: argparse.Namespace, results: list[dict[str, Any]]) -> int:
    """Write the page, and the CSV if it is wanted."""
    from service.evaluation import leaderboard, report

    write(Path(args.out), report.page(results))
    if args.csv:
        write(Path(args.csv), leaderboard.csv_of(results))
    return 0


def read_results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the result of each folder and of each evaluation of the service."""
    results: dict[str, dict[str, Any]] = {}
    ids = [s for s in args.sources if s.startswith(EVALUATION_ID) and not Path(s).exists()]
    if ids:

        def fetch(_args: argparse.Namespace, client: Client) -> int:
            results.update({id_: finished_result(client, id_) for id_ in ids})
            return 0

        run_with_client(fetch, args)
    return [results[s] if s in results else load_result(Path(s)) for s in args.sources]


def finished_result(client: Client, id_: str) -> dict[str, Any]:
    """Return the result of an evaluation of the service. Raise InvalidInput if it has none."""
    evaluation = client.get_evaluation(id_)
    result: dict[str, Any] | None = evaluation.raw["result"]
    if result is None:
        raise InvalidInput(f"{id_} is {evaluation.status}: only an evaluation that is done has a result.")
    return result


def write(path: Path, text: str) -> None:
    """Write a file, and print its path on stderr."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"{str(path)!r} cannot be written: {error}") from None
    err.print(strip_control_chars(f"Wrote {path}."))
