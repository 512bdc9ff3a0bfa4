"""Every page of the console in every mode of its resource, in Chromium, with results that the shipped GPT computed.

A page that a result breaks shows an error box in the place of its content, so each test waits for the last content.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support import chromium
from tests.support.chromium import PageSession, open_page, save_screenshot
from tests.support.processes import FAST_EDIT_OPTIONS, EmbeddedService
from tests.support.shipped_service import copy_statistics

Resource = dict[str, Any]
FACT = {"subject": "Louvre", "prompt": "The {} is located in the city of"}
RECORD = FACT | {
    "target_new": "Oslo",
    "target_true": "Paris",
    "paraphrases": ["To see the {}, you have to travel to"],
    "neighborhood": [{"prompt": "The Eiffel Tower is located in the city of", "target": "Paris"}],
}
EVALUATIONS: dict[str, Resource] = {
    "single": {},
    "single without damage": {"damage": False},
    "single with texts": {"generation": True, "damage_texts": 2},
    "single erase": {"objective": "erase"},
    "single amplify": {"objective": "amplify"},
    "single ft": {"method": "ft-l", "hparams": {"steps": 2}},
    "sequence": {"mode": "sequence", "checkpoints": [1, 2], "damage_texts": 4},
    "sequence erase": {"mode": "sequence", "checkpoints": [1, 2], "objective": "erase", "damage": False},
    "sequence edited": {"mode": "sequence", "checkpoints": [2], "search_model": "edited", "damage": False},
}
EDITS: dict[str, Resource] = {
    "applied": {},
    "dry run": {"dry_run": True},
    "rejected": {"guard": {"max_norm": 0.01}},
    "erase": {"objective": "erase", "target_new": None},
    "amplify": {"objective": "amplify", "target_new": None},
    "gated": {"hparams": {"form": "gated", **FAST_EDIT_OPTIONS["hparams"]}},
    "memit": {"method": "memit"},
    "ft": {"method": "ft-l", "hparams": {"steps": 2}},
    "without probes": {"probes": {}},
}
TRACES: dict[str, Resource] = {
    "all": {},
    "hidden": {"kinds": ["hidden"], "severed": False},
    "mlp and attention": {"kinds": ["mlp", "attn"], "severed": False},
    "severed": {"kinds": ["hidden"], "severed": True},
}
#: what a page shows where a value has another type than its script expects
BROKEN = re.compile(r"undefined|NaN|\[object|is not a function|null")


@pytest.fixture(scope="module")
def service(statistics_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedService]:
    """A service with a ledger of its own."""
    running = EmbeddedService(copy_statistics(statistics_folder, tmp_path_factory.mktemp("modes")), threads=1)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


@pytest.fixture
def session(browser: Browser, service: EmbeddedService) -> Iterator[PageSession]:
    with open_page(browser, str(service.http.base_url).rstrip("/")) as found:
        yield found


@pytest.fixture
def ended(service: EmbeddedService) -> Callable[[str, Resource], Resource]:
    """Return a function that posts a job, waits for its end, and returns it."""

    def post(path: str, body: Resource) -> Resource:
        answer = service.http.post(path, json=body, headers={"Prefer": "wait=280"})
        assert answer.is_success, answer.text
        return dict(answer.json())

    return post


def expect_no_broken_text(page: Page) -> None:
    """Expect no error box and no value that a script could not format."""
    expect(page.get_by_role("alert")).to_have_count(0)
    words = page.evaluate("[...document.querySelectorAll('main')].map((one) => one.innerText).join(' ')")
    assert not BROKEN.search(words), words


@pytest.mark.parametrize("mode", EVALUATIONS)
def test_an_evaluation_of_every_mode_is_shown(
    session: PageSession, ended: Callable[[str, Resource], Resource], mode: str
) -> None:
    """The page of an evaluation has its measures, its figures and its details in every mode, with every objective."""
    others = [RECORD, RECORD | {"subject": "Colosseum", "target_true": "Rome"}]
    plan = {"hparams": FAST_EDIT_OPTIONS["hparams"], "damage_texts": 2} | EVALUATIONS[mode]
    asked = plan | {"records": others if plan.get("mode") else others[:1]}
    evaluation = ended("/evaluations", asked)
    assert evaluation["status"] == "done", evaluation["error"]
    page = session.open(f"evaluations/{evaluation['id']}")
    expect(page.get_by_role("heading", name="Details")).to_be_visible()
    expect(page.locator(".measure").first).to_be_visible()
    assert page.get_by_text("Loss on plain text").count() == int(plan.get("damage", True))
    explained = page.get_by_role("table", name="All measures").locator("tbody tr td:first-child small")
    assert all(explained.all_inner_texts())
    expect_no_broken_text(page)
    save_screenshot(page, f"evaluation-{mode.replace(' ', '-')}")


def test_evaluations_are_compared_in_one_page(session: PageSession, service: EmbeddedService) -> None:
    """The page of an evaluation downloads its comparison with others, with the differences from it."""
    items = service.http.get("/evaluations").json()["items"]
    newest, other, *_ = (e for e in items if e["status"] == "done" and e["request"]["mode"] == "sequence")
    page = session.open(f"evaluations/{newest['id']}")
    page.get_by_label("Other evaluations").select_option(other["id"])
    with page.expect_download() as download:
        page.get_by_role("button", name="Download comparison").click()
    shown = Path(download.value.path()).read_text(encoding="utf-8")
    assert "Methods and measures" in shown and "Differences from" in shown
    save_screenshot(page, "evaluation-comparison")


@pytest.mark.parametrize("mode", EDITS)
def test_an_edit_of_every_mode_is_shown(
    session: PageSession, ended: Callable[[str, Resource], Resource], mode: str
) -> None:
    """The report of an edit has its figures and details in every status, with every objective, form and kind of
    method."""
    body = FACT | {"target_new": "Oslo", **FAST_EDIT_OPTIONS} | EDITS[mode]
    edit = ended("/edits", {name: value for name, value in body.items() if value is not None})
    assert edit["status"] in ("applied", "dry_run_passed", "rejected"), edit["error"]
    page = session.open(f"edits/{edit['id']}")
    expect(page.get_by_role("heading", name="Details")).to_be_visible()
    expect_no_broken_text(page)
    save_screenshot(page, f"report-{mode.replace(' ', '-')}")


@pytest.mark.parametrize("mode", TRACES)
def test_a_trace_of_every_mode_is_shown(
    session: PageSession, ended: Callable[[str, Resource], Resource], mode: str
) -> None:
    """The page of a trace has its maps and its details with every choice of kinds."""
    trace = ended("/trace", FACT | {"samples": 2} | TRACES[mode])
    assert trace["status"] == "done", trace["error"]
    page = session.open(f"traces/{trace['id']}")
    expect(page.get_by_role("heading", name="Details")).to_be_visible()
    for tab in page.locator(".map .choice input").all():
        tab.check()
        expect(page.locator(".stage svg").first).to_be_visible()
    expect_no_broken_text(page)


def test_lists_of_every_mode_are_shown(session: PageSession) -> None:
    """The lists and the page of the workers show the jobs of all modes."""
    for name, last in (("edits", ".listing li"), ("ledger", ".entry"), ("traces", ".listing li"),
                       ("evaluations", ".listing li"), ("workers", ".stack table")):  # fmt: skip
        page = session.open(name)
        page.locator(last).first.wait_for()
        expect_no_broken_text(page)


def test_a_paraphrase_is_marked_by_what_the_model_says(
    session: PageSession, service: EmbeddedService, ended: Callable[[str, Resource], Resource]
) -> None:
    """Each paraphrase shows the text that this version generates after it, and follows the edit only if the text begins
    with the new object, however probable that is."""
    weak = {"hparams": {"contexts": 2, "steps": 3}, "guard": {"enabled": False}}
    edit = ended(
        "/edits", FACT | weak | {"subject": "Colosseum", "target_new": "Madrid", "on_conflict": "supersede"}
    )
    assert edit["status"] == "applied", edit["error"]
    paraphrases = edit["result"]["paraphrase"]
    assert len(paraphrases) >= 3
    session.open(f"edits/{edit['id']}")
    for probe in paraphrases:
        (text,) = service.generate_texts([probe["prompt"]], version=edit["version"], max_new_tokens=8)
        assert probe["text_after"] == text
        assert probe["follows"] == text.lstrip().startswith("Madrid")
        row = session.page.get_by_role("row").filter(has_text=probe["prompt"])
        expect(row).to_contain_text(f"the model says “{text.strip()}”")
        expect(row).to_contain_text("✓ follows" if probe["follows"] else "✗ does not follow")
