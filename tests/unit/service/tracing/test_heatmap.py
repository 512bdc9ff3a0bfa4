"""A trace as a picture."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from service.kit.plotting import SVG
from service.tracing import heatmap

ODD = [
    *(
        "<s>",
        " $\\alpha_1$",
        " _x_ ",
        "東京 (1/2)",
        "東京 (2/2)",
        "\n",
        " </text><script>",
        " &amp;",
        "\u202e\x07",
    ),
    *("  ", " 🗼", " عربي", "]]>", "{}%s", " " + "long" * 20, " of"),
]


def traced(tokens: list[str], layers: int = 6, severed: bool = True, kinds: str = "hidden mlp attn") -> Any:
    rows = [[0.1 + 0.01 * t + 0.02 * m for m in range(layers)] for t in range(len(tokens))]
    kind = {"scores": rows, "best": {"token": len(tokens) - 1, "layer": layers - 1, "score": rows[-1][-1]}}
    return {
        "prompt": "".join(tokens),
        "tokens": tokens,
        "subject": {"text": "".join(tokens[1:3]).strip(), "tokens": [1, 3]},
        "answer": {"text": tokens[-1].strip(), "tokens": tokens[-1:], "ids": [1]},
        "high": 0.9,
        "low": 0.05,
        "total_effect": 0.85,
        "kinds": dict.fromkeys(kinds.split(), kind),
        "severed": {"token": 2, "scores": dict.fromkeys(("none", "mlp", "attn"), rows[2])}
        if severed
        else None,
        "window": 10,
        "samples": 10,
        "noise": {"level": 0.3, "factor": 3.0, "sigma": 0.1},
    }


PLAIN = traced(["The", " Eiffel", " Tower", " is", " in"])


def texts(drawing: str) -> list[str]:
    root = ElementTree.fromstring(drawing)
    return [element.text or "" for element in root.iter(f"{{{SVG}}}text")]


def test_corrupted_tokens_have_asterisks() -> None:
    """The subject's tokens carry an asterisk and no others do."""
    said = texts(heatmap.svg(PLAIN))
    assert {"The", "Eiffel*", "Tower*", "is", "in"} <= set(said)


def test_the_words_of_the_figure() -> None:
    """Three maps, each with its title, its axis and its scale of p(answer)."""
    said = texts(heatmap.svg(PLAIN))
    assert said.count("p(in)") == 3
    assert {f"Impact of restoring {what}" for what in ("state", "MLP", "attention")} <= set(said)
    assert "centre of the interval of 10 restored MLP layers" in said


def test_any_token_is_drawn_as_it_is() -> None:
    """Dollar signs, underscores, markup and any script reach the reader unread; controls become codes."""
    said = texts(heatmap.svg(traced(ODD)))
    for label in (
        "$\\alpha_1$*",
        "東京 (1/2)",
        "</text><script>",
        "&amp;",
        "🗼",
        "عربي",
        "]]>",
        "{}%s",
        "↵",
        "␣␣",
    ):
        assert label in said
    assert "U+202EU+0007" in said
    assert "long" * 20 not in said


@pytest.mark.parametrize("trace", [PLAIN, traced(ODD), traced(["a", "b", "c"], severed=False, kinds="mlp")])
def test_png(trace: Any) -> None:
    """The PNG is a picture on white, and no glyph is missed: a warning would be an error here."""
    image = imread(io.BytesIO(heatmap.png(trace)))
    assert image.shape[0] > 300 and image.shape[1] > 600
    assert (image[0, 0, :3] == 1).all()
    assert image.min() < 0.3


def test_colours() -> None:
    """The maps are purple, green and red, in this order from left to right."""
    trace = traced(["a", "b", "c"], severed=False)
    image = imread(io.BytesIO(heatmap.png(trace)))[..., :3]
    width = image.shape[1] // 3
    strongest = []
    for i in range(3):
        part = image[:, i * width : (i + 1) * width]
        coloured = part[(part.max(-1) - part.min(-1)) > 0.3]
        strongest.append("rgb"[coloured.mean(0).argmax()])
    assert strongest == ["b", "g", "r"]


def test_the_same_trace_gives_the_same_picture() -> None:
    """SVG and PNG depend on the trace alone."""
    assert heatmap.svg(PLAIN) == heatmap.svg(PLAIN)
    assert heatmap.png(PLAIN) == heatmap.png(PLAIN)


def test_no_effect_at_all() -> None:
    """A trace without noise, where all is equal, is drawn too."""
    flat = traced(["a", "b", "c"])
    flat["kinds"] = {"hidden": {"scores": [[0.5] * 6] * 3, "best": {"token": 0, "layer": 0, "score": 0.5}}}
    flat |= {
        "low": 0.5,
        "high": 0.5,
        "total_effect": 0.0,
        "noise": {"level": 0.0, "factor": None, "sigma": None},
    }
    ElementTree.fromstring(heatmap.svg(flat))
    assert "–" in heatmap.page(flat)


def test_large_traces_stay_within_reason() -> None:
    """A long text of a deep model gives a picture of bounded size."""
    image = imread(io.BytesIO(heatmap.png(traced([" x"] * 400, 48, kinds="mlp", severed=False), dpi=40)))
    assert image.shape[0] < 2000


def test_the_page() -> None:
    """The page is whole in itself, says the figures in words, and nothing in a token is markup to it."""
    said = heatmap.page(traced(ODD))
    assert said.startswith("<!doctype html>")
    assert "<script" not in said and "http-equiv" not in said and "src=" not in said
    assert "0.900" in said and "0.050" in said and "total effect" in said
    assert "&lt;script&gt;" in said and "<svg" in said and "<?xml" not in said


def test_neither_torch_nor_global_state() -> None:
    """Drawing needs neither torch nor pyplot."""
    code = "import sys, service.tracing.heatmap; sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
