"""`palimpsest completion`: the scripts are valid, and the shells complete with them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cli.completion import SHELLS
from cli.main import main

#: the typed line, the words that must be offered, and the words that must not be offered
COMPLETIONS = [
    ("palimpsest ed", {"edit", "edits"}, {"revert"}),
    ("palimpsest edit --er", {"--erase"}, {"--amplify"}),
    ("palimpsest edits s", {"show"}, {"--status"}),
    ("palimpsest jobs retry --", {"--json", "--url"}, {"--exhausted"}),
    ("palimpsest evaluate --mode ", {"single", "sequence"}, {"--mode"}),
    ("palimpsest completion ", {"bash", "zsh", "fish"}, set[str]()),
    ("palimpsest import rec", {"records.jsonl"}, set[str]()),
    ("palimpsest evaluate x --out fol", {"folder"}, set[str]()),
]
#: what bash does when Tab is pressed at the end of the line
BASH_SCRIPT = """
source {script}; read -ra COMP_WORDS <<< "$1"; [[ $1 == *' ' ]] && COMP_WORDS+=("")
COMP_LINE=$1 COMP_POINT=${{#1}} COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
found=$(complete -p palimpsest); found=${{found##*-F }}; "${{found%% *}}" palimpsest; printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def workspace(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a file, a folder, and the script for every shell."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "records.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        (tmp_path / shell).write_text(capsys.readouterr().out, encoding="utf-8")
    return tmp_path


def require_shell(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed")
    return path


def run_shell(*line: str) -> str:
    completed = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_reads_its_script(workspace: Path, shell: str) -> None:
    """The shell parses its script without an error."""
    run_shell(require_shell(shell), "-n", str(workspace / shell))


@pytest.mark.parametrize(("typed", "offered", "kept"), COMPLETIONS)
def test_bash_completes(workspace: Path, typed: str, offered: set[str], kept: set[str]) -> None:
    """bash completes commands, flags, choices and files, and offers nothing that does not belong there."""
    found = set(
        run_shell(
            require_shell("bash"), "-c", BASH_SCRIPT.format(script=workspace / "bash"), "bash", typed
        ).split()
    )
    assert offered <= found and not kept & found


@pytest.mark.parametrize(("typed", "offered", "kept"), COMPLETIONS)
def test_fish_completes(workspace: Path, typed: str, offered: set[str], kept: set[str]) -> None:
    """fish completes the same words as bash."""
    ask = f"source {workspace / 'fish'}; complete -C '{typed}'"
    found = {
        line.split("\t")[0].rstrip("/") for line in run_shell(require_shell("fish"), "-c", ask).splitlines()
    }
    assert offered <= found and not kept & found


def test_zsh_registers_it(workspace: Path) -> None:
    """zsh has a completion function for the command after it evaluates the script."""
    ask = f'autoload -Uz compinit; compinit -u -D; eval "$(<{workspace / "zsh"})"; print ${{_comps[palimpsest]}}'
    assert run_shell(require_shell("zsh"), "-f", "-c", ask).strip() == "_shtab_palimpsest"


def test_help_shows_where_the_script_goes(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` has the command for each shell."""
    with pytest.raises(SystemExit):
        main(["completion", "--help"])
    shown = capsys.readouterr().out
    assert all(f"palimpsest completion {shell}" in shown for shell in SHELLS)
