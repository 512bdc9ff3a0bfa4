"""Tests of service.tracing.heatmap."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.image import imread

from service.kit.plotting import SVG_NAMESPACE
from service.tracing import heatmap

UNUSUAL_TOKENS = [
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


def trace_json(
    tokens: list[str], layers: int = 6, severed: bool = True, kinds: str = "hidden mlp attn"
) -> Any:
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


PLAIN = trace_json(["The", " Eiffel", " Tower", " is", " in"])


def svg_texts(drawing: str) -> list[str]:
    root = ElementTree.fromstring(drawing)
    return [element.text or "" for element in root.iter(f"{{{SVG_NAMESPACE}}}text")]


def test_corrupted_tokens_have_asterisks() -> None:
    """Only the subject's tokens have an asterisk."""
    labels = svg_texts(heatmap.trace_svg(PLAIN))
    assert {"The", "Eiffel*", "Tower*", "is", "in"} <= set(labels)


def test_figure_titles_and_axes() -> None:
    """Three maps, each with its title, its axis and its scale of p(answer)."""
    labels = svg_texts(heatmap.trace_svg(PLAIN))
    assert labels.count("p(in)") == 3
    assert {f"Impact of restoring {what}" for what in ("state", "MLP", "attention")} <= set(labels)
    assert "centre of the interval of 10 restored MLP layers" in labels


def test_any_token_is_drawn_as_it_is() -> None:
    """Dollar signs, underscores, markup and any script are drawn literally; control characters become codes."""
    labels = svg_texts(heatmap.trace_svg(trace_json(UNUSUAL_TOKENS)))
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
        assert label in labels
    assert "U+202EU+0007" in labels
    assert "long" * 20 not in labels


@pytest.mark.parametrize(
    "trace", [PLAIN, trace_json(UNUSUAL_TOKENS), trace_json(["a", "b", "c"], severed=False, kinds="mlp")]
)
def test_png(trace: Any) -> None:
    """The PNG has a white background and no missing glyph (a warning is an error)."""
    image = imread(io.BytesIO(heatmap.trace_png(trace)))
    assert image.shape[0] > 300 and image.shape[1] > 600
    assert (image[0, 0, :3] == 1).all()
    assert image.min() < 0.3


def test_colours() -> None:
    """The maps are purple, green and red, in this order from left to right."""
    trace = trace_json(["a", "b", "c"], severed=False)
    image = imread(io.BytesIO(heatmap.trace_png(trace)))[..., :3]
    width = image.shape[1] // 3
    strongest = []
    for i in range(3):
        part = image[:, i * width : (i + 1) * width]
        coloured = part[(part.max(-1) - part.min(-1)) > 0.3]
        strongest.append("rgb"[coloured.mean(0).argmax()])
    assert strongest == ["b", "g", "r"]


def test_the_same_trace_gives_the_same_picture() -> None:
    """SVG and PNG are deterministic functions of the trace."""
    assert heatmap.trace_svg(PLAIN) == heatmap.trace_svg(PLAIN)
    assert heatmap.trace_png(PLAIN) == heatmap.trace_png(PLAIN)


def test_no_effect_at_all() -> None:
    """A trace without noise, whose scores are all equal, can be drawn."""
    flat = trace_json(["a", "b", "c"])
    flat["kinds"] = {"hidden": {"scores": [[0.5] * 6] * 3, "best": {"token": 0, "layer": 0, "score": 0.5}}}
    flat |= {
        "low": 0.5,
        "high": 0.5,
        "total_effect": 0.0,
        "noise": {"level": 0.0, "factor": None, "sigma": None},
    }
    ElementTree.fromstring(heatmap.trace_svg(flat))
    assert "–" in heatmap.trace_page(flat)


def test_large_traces_stay_within_reason() -> None:
    """The picture of a long text and a deep model has a bounded size."""
    image = imread(
        io.BytesIO(heatmap.trace_png(trace_json([" x"] * 400, 48, kinds="mlp", severed=False), dpi=40))
    )
    assert image.shape[0] < 2000


def test_the_page() -> None:
    """The page is self-contained, states the figures in words, and escapes the tokens."""
    html = heatmap.trace_page(trace_json(UNUSUAL_TOKENS))
    assert html.startswith("<!doctype html>")
    assert "<script" not in html and "http-equiv" not in html and "src=" not in html
    assert "0.900" in html and "0.050" in html and "total effect" in html
    assert "&lt;script&gt;" in html and "<svg" in html and "<?xml" not in html


def test_neither_torch_nor_global_state() -> None:
    """Drawing imports neither torch nor pyplot."""
    code = "import sys, service.tracing.heatmap; sys.exit(bool({'torch', 'matplotlib.pyplot'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
