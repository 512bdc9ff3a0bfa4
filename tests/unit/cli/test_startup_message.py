"""The commands in the startup message: cli.startup_message."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from cli.startup_message import DEFAULT_DEMO, DemoFact, choose_demo, demo_commands, startup_message

NASTY = DemoFact('Côte d\'Ivoire $(reboot) `x` "!"', "What's in {} \\ %s?", "a'b", "c\nd")


def request_body(line: str) -> dict[str, object]:
    words = shlex.split(line)
    return json.loads(words[words.index("-d") + 1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("shown", [DEFAULT_DEMO, NASTY])
@pytest.mark.parametrize("key", [False, True])
def test_the_lines_are_shell_and_json(shown: DemoFact, key: bool) -> None:
    """Each line is a valid shell command, and its body has exactly the fact, also with special characters."""
    ask, edit, again = demo_commands("http://127.0.0.1:8000", shown, key)
    for line in (ask, edit, again):
        assert subprocess.run(["bash", "-n", "-c", line], check=False).returncode == 0
    assert ask == again
    assert request_body(ask)["prompt"] == shown.prompt.replace("{}", shown.subject)
    assert request_body(edit) == {
        "subject": shown.subject,
        "prompt": shown.prompt,
        "target_new": shown.target_new,
        "target_true": shown.target_true,
    }
    assert "Prefer: wait=60" in shlex.split(edit)


def test_nothing_of_a_line_is_run_but_curl() -> None:
    """The shell expands nothing in the arguments of curl."""
    _, edit, _ = demo_commands("http://127.0.0.1:8000", NASTY)
    script = "curl() { printf '%s\\0' \"$@\"; }; " + edit
    words = (
        subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0")
    )
    assert json.loads(words[words.index("-d") + 1])["subject"] == NASTY.subject


def test_the_key_is_not_shown() -> None:
    """The commands refer to the API key by its environment variable."""
    assert all(
        '"Authorization: Bearer $PALIMPSEST_API_KEY"' in line
        for line in demo_commands("http://x", DEFAULT_DEMO, key=True)
    )


def write_facts(folder: Path, *facts: tuple[str, str, str]) -> str:
    rows = [{"subject": s, "relation": "in", "object": o, "prompts": [p]} for s, p, o in facts]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder)


def test_a_fact_is_taken_from_the_model(tmp_path: Path) -> None:
    """The demo is a fact of the model's table with another object of the same relation. Without a table it is
    the default."""
    assert choose_demo(str(tmp_path)) == DEFAULT_DEMO
    assert choose_demo(write_facts(tmp_path)) == DEFAULT_DEMO
    model = write_facts(tmp_path, ("Nile", "{} flows in", "Africa"), ("Rhine", "{} flows in", "Europe"))
    assert choose_demo(model) == DemoFact("Nile", "{} flows in", "Africa", "Europe")
    tower = ("Eiffel Tower", "See the {} in", "Paris")
    model = write_facts(tmp_path, ("Nile", "{} flows in", "Africa"), tower, ("Colosseum", "x {}", "Rome"))
    assert choose_demo(model) == DemoFact("Eiffel Tower", "See the {} in", "Paris", "Rome")


def test_the_startup_message_shows_the_address(tmp_path: Path) -> None:
    """The message has the URL of the documentation and three commands."""
    text = startup_message("http://127.0.0.1:9", str(tmp_path), {"recipe": {"source": "tried"}, "layers": 8})
    assert "hparams" not in text
    assert "http://127.0.0.1:9/docs" in text
    assert text.count("  curl ") == 3


def test_the_startup_message_says_who_needs_a_key(tmp_path: Path) -> None:
    """The second line is the notice about keys, if there is one."""
    info = {"recipe": {"source": "tried"}, "layers": 8}
    text = startup_message("http://127.0.0.1:9", str(tmp_path), info, "Development mode: no key.")
    assert text.splitlines()[1] == "Development mode: no key."
    assert startup_message("http://127.0.0.1:9", str(tmp_path), info).splitlines()[1] == ""


def test_a_model_without_a_recipe_gets_a_layer() -> None:
    """For a model without a recipe the edit command specifies an early layer."""
    line = startup_message("http://127.0.0.1:9", "gpt2", {"recipe": None, "layers": 12}).splitlines()[5]
    assert request_body(line)["hparams"] == {"layers": [3]}
