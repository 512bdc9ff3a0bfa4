"""What a newcomer pastes must work."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from cli.startup_message import EIFFEL, Demonstration, curls, demonstration, welcome

NASTY = Demonstration('Côte d\'Ivoire $(reboot) `x` "!"', "What's in {} \\ %s?", "a'b", "c\nd")


def body(line: str) -> dict[str, object]:
    words = shlex.split(line)
    return json.loads(words[words.index("-d") + 1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("shown", [EIFFEL, NASTY])
@pytest.mark.parametrize("key", [False, True])
def test_the_lines_are_shell_and_json(shown: Demonstration, key: bool) -> None:
    """Each line is one valid command whatever is in the fact, and its body says exactly that fact."""
    ask, edit, again = curls("http://127.0.0.1:8000", shown, key)
    for line in (ask, edit, again):
        assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0
    assert ask == again
    assert body(ask)["prompt"] == shown.prompt.replace("{}", shown.subject)
    assert body(edit) == {
        "subject": shown.subject,
        "prompt": shown.prompt,
        "target_new": shown.target_new,
        "target_true": shown.target_true,
    }
    assert "Prefer: wait=60" in shlex.split(edit)


def test_nothing_of_a_line_is_run_but_curl() -> None:
    """With curl replaced by printf, the shell hands over the words untouched."""
    _, edit, _ = curls("http://127.0.0.1:8000", NASTY)
    script = "curl() { printf '%s\\0' \"$@\"; }; " + edit
    words = (
        subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")
    )
    assert json.loads(words[words.index("-d") + 1])["subject"] == NASTY.subject


def test_the_key_is_not_shown() -> None:
    """A line names the variable of the key; the key itself stays out of terminals and histories."""
    assert all(
        '"Authorization: Bearer $PALIMPSEST_API_KEY"' in line for line in curls("http://x", EIFFEL, key=True)
    )


def write(folder: Path, *facts: tuple[str, str, str]) -> str:
    rows = [{"subject": s, "relation": "in", "object": o, "prompts": [p]} for s, p, o in facts]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder)


def test_a_fact_is_taken_from_the_model(tmp_path: Path) -> None:
    """Beside a table of facts the demonstration is one of them, with another object of the same relation."""
    assert demonstration(str(tmp_path)) == EIFFEL
    assert demonstration(write(tmp_path)) == EIFFEL
    model = write(tmp_path, ("Nile", "{} flows in", "Africa"), ("Rhine", "{} flows in", "Europe"))
    assert demonstration(model) == Demonstration("Nile", "{} flows in", "Africa", "Europe")
    tower = ("Eiffel Tower", "See the {} in", "Paris")
    model = write(tmp_path, ("Nile", "{} flows in", "Africa"), tower, ("Colosseum", "x {}", "Rome"))
    assert demonstration(model) == Demonstration("Eiffel Tower", "See the {} in", "Paris", "Rome")


def test_the_welcome_says_where(tmp_path: Path) -> None:
    """The address, its documentation and three commands are in the welcome."""
    text = welcome("http://127.0.0.1:9", str(tmp_path), {"recipe": {"source": "tried"}, "layers": 8})
    assert "hparams" not in text
    assert "http://127.0.0.1:9/docs" in text
    assert text.count("  curl ") == 3


def test_a_model_without_a_recipe_gets_a_layer() -> None:
    """The edit line works on a model for which no recipe is known: it names an early layer."""
    line = welcome("http://127.0.0.1:9", "gpt2", {"recipe": None, "layers": 12}).splitlines()[5]
    assert body(line)["hparams"] == {"layers": [3]}
