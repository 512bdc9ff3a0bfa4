"""`palimpsest study` on the shipped model: cli.study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cli.main import main
from cli.study import parse_layers
from service.errors import InvalidInput

Captured = pytest.CaptureFixture[str]


def test_a_trace_study_from_the_command_line(tmp_path: Path, capsys: Captured) -> None:
    """Sentences and a table go to stdout; the folder has the data, the figures, the report and a run for each fact."""
    asked = ["study", "trace", "facts", "--limit", "2", "--samples", "1", "--out", str(tmp_path)]
    assert main(asked) == 0
    shown = capsys.readouterr()
    assert "2 facts were scored and 2 traced" in shown.out and "last subject token" in shown.out
    names = {p.name for p in tmp_path.iterdir()}
    figures = {f"{name}.{kind}" for name in ("maps", "lines", "severed") for kind in ("png", "svg")}
    assert names == {"study.json", "report.html", "runs", *figures}
    study = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert study["facts"] == len(list((tmp_path / "runs").iterdir())) == 2
    assert study["noise"]["factor"] == 3 and study["noise"]["subjects"] > 100
    assert "<svg" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_neuron_study_from_the_command_line(tmp_path: Path, capsys: Captured) -> None:
    """Sentences and the table of neurons go to stdout; the folder has the data, the figures, the report and a run for
    each fact."""
    asked = [
        "study",
        "neurons",
        "facts",
        "--limit",
        "2",
        "--nodes",
        "4",
        "--wordings",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert main(asked) == 0
    assert "2 facts were scored and 2 attributed" in capsys.readouterr().out
    names = {p.name for p in tmp_path.iterdir()}
    figures = {f"{name}.{kind}" for name in ("layers", "switches") for kind in ("png", "svg")}
    assert names == {"study.json", "report.html", "runs", *figures}
    study = json.loads((tmp_path / "study.json").read_text(encoding="utf-8"))
    assert study["facts"] == len(list((tmp_path / "runs").iterdir())) == 2
    assert 0 <= study["completeness_error"] < 1


def test_a_missing_study_file_is_reported(tmp_path: Path, capsys: Captured) -> None:
    """A missing file exits with 2 before the model is loaded."""
    assert main(["study", "trace", "nothing.json", "--out", str(tmp_path)]) == 2
    assert "there is no file 'nothing.json'" in capsys.readouterr().err


def test_a_localisation_study_from_the_command_line(tmp_path: Path, capsys: Captured) -> None:
    """Sentences and both tables go to stdout; the folder has the data, the figures and the report."""
    folder = tmp_path / "study"
    given = {
        "--limit": "2",
        "--samples": "1",
        "--layers": "1",
        "--methods": "rome",
        "--hparam": "rome.contexts=1",
    }
    tools = {"--data-dir": str(tmp_path / "data"), "--covariance-tokens": "1000", "--out": str(folder)}
    flags = [word for pair in (given | tools).items() for word in pair]
    assert main(["study", "localization", "facts", "--hparam", "steps=3", *flags]) == 0
    shown = capsys.readouterr().out
    assert "2 facts were scored" in shown and "R² both" in shown and "layer of the strongest trace" in shown
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "study.json", "report.html", "runs", "layers.png", "layers.svg", "explained.png", "explained.svg",
    }  # fmt: skip
    (one,) = json.loads((folder / "study.json").read_text(encoding="utf-8"))["studies"]
    assert one["parameters"]["contexts"] == 1 and one["parameters"]["steps"] == 3


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--methods", "rome,roma"], "'roma' is not one of rome"),
        (["--objectives", "forget"], "'forget' is not one of write"),
        (["--hparam", "ft-l.steps=3"], "'ft-l' is not one of the methods rome, ft"),
    ],
)
def test_invalid_study_options_are_reported_before_loading(
    flags: list[str], words: str, tmp_path: Path, capsys: Captured
) -> None:
    """Invalid names are reported before the model is loaded."""
    assert main(["study", "localization", "facts", "--out", str(tmp_path), *flags]) == 1
    assert words in capsys.readouterr().err


def test_parse_layers() -> None:
    """`--layers` is a comma-separated list, sorted without duplicates; layers that do not exist are rejected."""
    assert parse_layers("all", 3) == (0, 1, 2) and parse_layers("2,0,2", 3) == (0, 2)
    for wrong in ("3", "-1,2", "x", ""):
        with pytest.raises(InvalidInput, match="use all, or numbers from 0 to 2"):
            parse_layers(wrong, 3)


@pytest.mark.parametrize("flag", ["--limit", "--samples", "--window"])
@pytest.mark.parametrize("value", ["0", "-3", "two"])
def test_counts_are_at_least_one(flag: str, value: str, tmp_path: Path, capsys: Captured) -> None:
    """Counts must be integers of at least 1."""
    with pytest.raises(SystemExit):
        main(["study", "trace", "facts", "--out", str(tmp_path), f"{flag}={value}"])
    assert "is not an integer of at least 1" in capsys.readouterr().err
