"""The errors of the parser: what is wrong, and a similar word that is right."""

from __future__ import annotations

import pytest

from cli.main import main

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["edt"], "there is no command 'edt': did you mean 'edit'?"),
        (["jobs", "retri", "edit_1"], "there is no command 'retri': did you mean 'retry'?"),
        (["xyzzy"], "there is no command 'xyzzy'; `palimpsest --help` lists them"),
        (["jobs", "xyzzy"], "there is no command 'xyzzy': use retry, cancel"),
        (["edit", "a", "b", "c", "--hparm", "steps=2"], "'--hparm', 'steps=2': did you mean '--hparam'?"),
        (["edit", "a", "b", "c", "--hparm=steps=2"], "'--hparm=steps=2': did you mean '--hparam'?"),
        (["export", "--out", "x", "--format", "peff"], "'peff' is not one of peft, model, safetensors, edits: did you mean 'peft'?"),
        (["trace", "a", "b", "--xyzzy"], "there is no option or argument '--xyzzy'\n"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_named_with_a_similar_one(capsys: Captured, words: list[str], said: str) -> None:
    """A wrong command, flag or choice exits with 2, and the message suggests what is similar to it."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_an_abbreviated_flag_is_no_flag(capsys: Captured) -> None:
    """A flag of a command below another one cannot be abbreviated either."""
    with pytest.raises(SystemExit):
        main(["keys", "create", "--name", "x", "--scope", "read"])
    assert "--scopes" in capsys.readouterr().err
