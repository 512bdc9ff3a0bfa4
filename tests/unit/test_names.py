"""Names of classes and public functions: one meaning each, and no class is named by a participle."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

PACKAGES = ("service", "api", "workers", "cli", "palimpsest")
IRREGULAR_PARTICIPLES = [
    "Begun",
    "Bound",
    "Built",
    "Done",
    "Drawn",
    "Found",
    "Given",
    "Gone",
    "Heard",
    "Held",
    "Kept",
    "Known",
    "Lent",
    "Lost",
    "Made",
    "Meant",
    "Paid",
    "Read",
    "Said",
    "Seen",
    "Sent",
    "Spoken",
    "Taken",
    "Thought",
    "Told",
    "Won",
    "Written",
]
#: words that end like a participle and are nouns
NOUNS = ("Bed", "Feed", "Need", "Seed", "Speed")

CLIENT_RECORD = "the client's record of the API resource; the client imports nothing of the service"
CLIENT_ERROR = "the client's exception for the same error code; the client imports nothing of the service"
TABLE = "the row, and the API resource made from it"
COMMAND = "the command, and the function or route that it calls"
REPORT = "the same part of each report; cli/study.py and cli/evaluate.py use the modules alike"
#: name -> why several modules define it
ALLOWED_DUPLICATES = {
    "Comparison": CLIENT_RECORD,
    "Edit": CLIENT_RECORD,
    "EditRequest": CLIENT_RECORD,
    "EditTable": CLIENT_RECORD,
    "Evaluation": CLIENT_RECORD,
    "Export": CLIENT_RECORD,
    "FactChange": CLIENT_RECORD,
    "NamedVersion": CLIENT_RECORD,
    "NextToken": CLIENT_RECORD,
    "Probes": CLIENT_RECORD,
    "RevertResult": CLIENT_RECORD,
    "TableLine": CLIENT_RECORD,
    "Trace": CLIENT_RECORD,
    "Training": CLIENT_RECORD,
    "Verification": CLIENT_RECORD,
    "Entry": CLIENT_RECORD,
    "Progress": CLIENT_RECORD,
    "FieldError": CLIENT_RECORD,
    "Model": TABLE,
    "Job": TABLE,
    "Worker": "the row of a worker, the process itself, and the client's record of it",
    "Conflict": CLIENT_ERROR,
    "Forbidden": CLIENT_ERROR,
    "NotFound": CLIENT_ERROR,
    "PalimpsestError": CLIENT_ERROR,
    "Unauthorized": CLIENT_ERROR,
    "Unavailable": CLIENT_ERROR,
    "JobError": CLIENT_RECORD,
    "main": "the entry point, and the command line that it starts once its imports have succeeded",
    "add_parser": "each module of cli/ is a command that adds its parser with `add_parser`",
    "run": "each module of cli/ is a command whose function is `run`",
    "export_version": COMMAND,
    "import_edits": COMMAND,
    "list_edits": COMMAND,
    "list_jobs": COMMAND,
    "list_models": COMMAND,
    "load_served_model": COMMAND,
    "load_without_bos": COMMAND,
    "retry_job": COMMAND,
    "run_evaluation": COMMAND,
    "run_localization_study": COMMAND,
    "run_trace_study": COMMAND,
    "verify_ledger": COMMAND,
    "figures": REPORT,
    "page": REPORT,
    "sentences": REPORT,
    "title": REPORT,
}


@cache
def modules() -> list[tuple[str, ast.Module]]:
    """Return the path and syntax tree of each module of the product."""
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(str(path.relative_to(ROOT)), ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def classes() -> dict[str, list[str]]:
    """Return the names of the bases of each class."""
    found: dict[str, list[str]] = {}
    for _, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name] = [re.split(r"[\[.]", ast.unparse(base))[-1] for base in node.bases]
    return found


def is_exception(name: str, bases: dict[str, list[str]]) -> bool:
    """Return whether a class is an exception, whose name may end in a participle."""
    if name.endswith(("Error", "Exception")):
        return True
    return any(base != name and is_exception(base, bases) for base in bases.get(name, []))


def is_participle(name: str) -> bool:
    """Return whether the last word of a CamelCase name is a past participle."""
    word = re.findall(r"[A-Z][a-z0-9]*|[a-z0-9]+", name)[-1]
    return word in IRREGULAR_PARTICIPLES or (word.endswith("ed") and word not in NOUNS)


def definitions() -> dict[str, list[str]]:
    """Return the modules that define each class and public function at top level."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules():
        for node in tree.body:
            if (
                isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and node.name[0] != "_"
            ):
                found[node.name].append(path)
    return found


def test_no_class_is_named_by_a_participle() -> None:
    """The last word of a class name is a noun. An exception may say what has happened, as in `LeaseLost`."""
    bases = classes()
    assert [name for name in bases if is_participle(name) and not is_exception(name, bases)] == []


def test_names_have_one_meaning() -> None:
    """No two modules define a class or public function of one name, except those listed with a reason."""
    duplicates = {name: paths for name, paths in definitions().items() if len(paths) > 1}
    assert {name: paths for name, paths in duplicates.items() if name not in ALLOWED_DUPLICATES} == {}
    assert sorted(ALLOWED_DUPLICATES.keys() - duplicates) == []


def imports_of(module: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Yield the known modules that a module imports when it is loaded, outside functions and TYPE_CHECKING blocks."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            todo += [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            todo += [*node.body, *node.orelse, *node.finalbody, *(s for h in node.handlers for s in h.body)]


def module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one import cycle, or []."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in finished:
            return []
        for imported in sorted(graph.get(module, ())):
            if cycle := visit(imported, [*path, module]):
                return cycle
        finished.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module, []))), [])


def test_there_is_no_import_cycle() -> None:
    """No module imports itself through others when it is loaded."""
    trees = {module_name(path): tree for path, tree in modules()}
    graph = {name: set(imports_of(name, tree, set(trees))) - {name} for name, tree in trees.items()}
    assert find_cycle(graph) == []


def test_an_import_cycle_is_found() -> None:
    """The search returns the modules of a cycle in the order of their imports."""
    assert find_cycle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d"]
