"""Edits, traces and evaluations in notebooks: palimpsest.notebook, and the representations of jobs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from palimpsest import Edit, Evaluation, Export, Trace
from tests.support.application import EVALUATION_RESULT

HOSTILE = "<script>alert(1)</script>\"'&"
VOID = {"br", "img", "hr"}


class TagBalance(HTMLParser):
    """Collects the tags of a page, and requires that each is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def edit(text: str = "Rome", **fields: Any) -> Edit:
    probe = {"new": text, "true": "Paris", "prompt": f"{text} is in", "before": {"new": 0.1, "true": 0.8}}
    after = {"new": 0.9, "true": None}
    return Edit.from_json(
        {
            "id": "edit_1",
            "status": "applied",
            "subject": text,
            "prompt": "The {} is in",
            "target_new": text,
            "version": 3,
            "result": {
                "rewrite": probe | {"after": after, "text_before": " Paris", "text_after": text},
                "paraphrase": [probe | {"after": after}],
                "neighborhood": [probe | {"after": after}],
                "also_changed": [{"prompt": "x", "subject": text, "before": "a", "after": None}],
            },
        }
        | fields
    )


def trace(text: str = "Par") -> Trace:
    result = {
        "prompt": text,
        "tokens": [text, "is"],
        "answer": {"text": text},
        "high": 0.8,
        "low": 0.2,
        "kinds": {
            "mlp": {"scores": [[0.2, 0.5, 0.8], [0.1, 0.2, 0.2]]},
            "attn": {"scores": [[0.2, 0.2, 0.2], [0.2, 0.2, 0.5]]},
        },
    }
    return Trace.from_json({"id": "trace_1", "status": "done", "request": {"prompt": text}, "result": result})


def evaluation() -> Evaluation:
    request = {"method": HOSTILE, "mode": "single"}
    return Evaluation.from_json(
        {"id": "evaluation_1", "status": "done", "request": request, "result": EVALUATION_RESULT}
    )


PAGES: dict[str, Edit | Trace | Evaluation] = {
    "edit": edit(HOSTILE),
    "trace": trace(HOSTILE),
    "evaluation": evaluation(),
}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_closed_and_escapes_every_text(name: str) -> None:
    """Every tag is closed, a text of the service never becomes a tag, and nothing is loaded from elsewhere."""
    page = PAGES[name]._repr_html_()
    tags = TagBalance(page).tags
    assert tags <= {"div", "b", "span", "table", "caption", "tr", "td"}
    assert "&lt;script&gt;" in page and "src=" not in page and "href=" not in page


def test_edit_shows_probabilities_as_bars() -> None:
    """There is a bar for each probability before and after, and a dash for one that is unknown."""
    page = edit()._repr_html_()
    assert page.count("10.0 %") == 2 and page.count("90.0 %") == 2 and page.count("\u2013") == 2
    widths = [int(w) for w in re.findall(r"display:block;width:(\d+)px", page)]
    assert widths == [12, 108, 96, 12, 108, 96]
    assert "also changed: Rome: a to no answer" in page and "says: &#x27; Paris&#x27; before" in page


def test_edit_without_a_result_shows_its_reason() -> None:
    """A queued edit and a failed one have a page, too."""
    failed = edit(status="failed", result=None, version=None, error={"detail": "out of memory."})
    page = failed._repr_html_()
    assert "out of memory." in page and "<table" not in page
    TagBalance(page)


def test_heat_maps_of_a_trace_share_one_scale() -> None:
    """The darkest cell of all kinds has the full colour, a cell below the low score has none."""
    page = trace()._repr_html_()
    shares = [float(x) for x in re.findall(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", page)]
    assert shares == pytest.approx([0, 0.5, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0.5])
    assert "MLPs, layers 0 to 2" in page and "&#x27;Par&#x27;, layer 2: 0.800" in page
    running = Trace.from_json({"id": "trace_1", "status": "running", "request": {"prompt": "Paris is"}})
    assert "running" in running._repr_html_() and "<table" not in running._repr_html_()


def test_representation_is_one_short_line() -> None:
    """The representation names the id, the status and the fact, not every field."""
    assert repr(edit()) == "Edit('edit_1', applied, 'The Rome is in' \u2192 'Rome')"
    assert repr(edit(target_new=None, objective="erase")) == "Edit('edit_1', applied, erase 'The Rome is in')"
    assert repr(trace()) == "Trace('trace_1', done, 'Par')"
    assert repr(Export.from_json({"id": "export_1", "status": "queued", "kind": "export"})) == (
        "Export('export_1', queued, export)"
    )
