"""The console in Chromium, on the shipped GPT: generate, edit, trace, evaluate, revert.

The tests run in order on one service. Each saves screenshots to runs/console.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.support import chromium
from tests.support.chromium import PHONE, PageSession, open_page, save_screenshot
from tests.support.paths import ROOT
from tests.support.processes import EmbeddedService
from tests.support.shipped_service import copy_statistics

PROMPT = "The Eiffel Tower is located in the city of"
THEMES = ["light", "dark"]
RECORD = (
    '{"subject": "Louvre", "prompt": "The {} is located in the city of", "target_new": "Oslo", "target_true": "Paris", '
    '"paraphrases": ["To see the {}, you have to travel to"]}'
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def service(
    browser: Browser, statistics_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EmbeddedService]:
    """A service with an empty ledger."""
    data = copy_statistics(statistics_folder, tmp_path_factory.mktemp("console"))
    service = EmbeddedService(data, threads=1)
    yield service
    service.stop()


@pytest.fixture
def session(browser: Browser, service: EmbeddedService) -> Iterator[PageSession]:
    """Open the console at desktop size with the light theme."""
    with open_page(browser, str(service.http.base_url).rstrip("/"), accept_downloads=True) as found:
        yield found


def newest(service: EmbeddedService, kind: str) -> str:
    return str(service.get(f"/{kind}", limit=1)["items"][0]["id"])


def console_pages(service: EmbeddedService) -> dict[str, tuple[str, str]]:
    """Return the path of every page of the console, and a selector of its last content, by name."""
    edit, trace, evaluation = (newest(service, kind) for kind in ("edits", "trace", "evaluations"))
    return {
        "generate": (f"generate?prompt={PROMPT}&beside=base", ".tokens .next"),
        "chat": ("chat", ".empty"),
        "edits": ("edits", ".listing li"),
        "report": (f"edits/{edit}", ".checks li"),
        "ledger": ("ledger", ".entry"),
        "traces": ("traces", ".listing li"),
        "trace": (f"traces/{trace}", ".cell"),
        "evaluations": ("evaluations", ".listing li"),
        "evaluation": (f"evaluations/{evaluation}", ".measure"),
        "workers": ("workers", ".stack table"),
    }


def test_empty_lists_show_an_example(session: PageSession) -> None:
    """Every empty list has text that names an example."""
    for path in ("edits", "ledger", "traces", "evaluations"):
        expect(session.open(path).locator(".empty")).to_contain_text(re.compile("Eiffel Tower|shipped GPT"))
        save_screenshot(session.page, f"first-{path}")


def test_two_versions_generate_side_by_side(session: PageSession) -> None:
    """An example fills in the prompt, each answer has the badge of its version, and a note says that both
    versions are equal."""
    page = session.open("generate")
    page.get_by_role("button", name=PROMPT).click()
    page.get_by_label("compare with another version").check()
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator(".badge.known")).to_have_text(["version 0", "version 0"])
    expect(page.locator(".said").first).to_contain_text("Paris")
    expect(page.locator(".answer footer").first).to_contain_text("12 tokens in")
    expect(page.locator(".differs")).to_contain_text("Both sides are version 0")
    save_screenshot(page, "generate-before")


def test_an_edit_is_followed_to_its_report(session: PageSession, service: EmbeddedService) -> None:
    """The example edit can be submitted, its progress is shown, and the report has both objects, the probes
    and the guard's checks."""
    page = session.open("edits")
    page.get_by_role("button", name="Use example").click()
    expect(page.locator(".preview del")).to_have_text("Paris")
    expect(page.locator(".preview ins")).to_have_text("Rome")
    save_screenshot(page, "edit-form")
    page.get_by_role("button", name="Apply edit").click()
    expect(page.locator(".live .phase")).not_to_have_text("Queued")
    save_screenshot(page, "edit-live")
    expect(page.locator(".title .pill")).to_have_text("✓ active")
    expect(page.locator(".shift.new .figures")).to_have_text(re.compile(r"^< 0\.1 % → (9\d|> 99)"))
    expect(page.locator(".shift.old .name")).to_have_text("Paris")
    expect(page.get_by_role("table", name="Probes").locator("tbody tr")).to_have_count(4)
    expect(page.locator(".verdict .head")).to_contain_text("All 8 checks passed")
    expect(page.locator("#status")).to_contain_text("version 1")
    assert service.head() == 1
    save_screenshot(page, "report")
    if pictures := os.environ.get("PALIMPSEST_PICTURES"):  # for the documentation
        save_screenshot(page, "console", ROOT / pictures, full_page=False)


def test_versions_differ_after_an_edit(session: PageSession) -> None:
    """Base generates Paris at the left and head Rome at the right, and these two tokens differ most in
    probability."""
    page = session.open(f"generate?prompt={PROMPT}&beside=base")
    expect(page.locator(".badge.known")).to_have_text(["version 0", "version 1"])
    expect(page.locator(".said")).to_contain_text([" Paris", " Rome"])
    expect(page.locator(".tokens .name").nth(1)).to_be_visible()
    assert set(page.locator(".tokens .name").all_inner_texts()[:2]) == {"Paris", "Rome"}
    save_screenshot(page, "generate-after")
    if pictures := os.environ.get("PALIMPSEST_PICTURES"):
        page.locator(".answers").scroll_into_view_if_needed()
        save_screenshot(page, "console-ask", ROOT / pictures)


def test_a_sentence_is_marked(session: PageSession, service: EmbeddedService) -> None:
    """The selection in a sentence becomes the subject, the true object at its end is removed from the prompt,
    and a rejected dry run commits nothing."""
    page = session.open("edits")
    page.get_by_label("Sentence, up to the object").fill("The Colosseum is located in the city of Rome.")
    page.evaluate("document.getElementById('edit-prompt').setSelectionRange(4, 13)")
    page.get_by_role("button", name="Use selection as subject").click()
    expect(page.get_by_label("Subject", exact=True)).to_have_value("Colosseum")
    page.get_by_label("True object", exact=True).fill("Rome")
    page.get_by_label("New object", exact=True).fill("Oslo")
    expect(page.locator(".preview .writing")).to_have_text(
        "The Colosseum is located in the city of Rome Oslo"
    )
    page.get_by_label("Dry run").check()
    page.get_by_text("Method and guard").click()
    page.get_by_label("Max. relative norm of the weight change").fill("0.01")
    page.get_by_role("button", name="Run dry run").click()
    expect(page.locator(".title .pill").first).to_have_text("✗ rejected")
    expect(page.locator(".checks .bad")).to_contain_text("raise the limit")
    assert service.get("/edits", limit=1)["items"][0]["prompt"] == "The {} is located in the city of"
    assert service.head() == 1
    save_screenshot(page, "rejected")


def test_form_errors_are_shown_at_their_fields(session: PageSession) -> None:
    """A subject that does not occur in the sentence, an empty new object and a layer that the model does not have are
    reported below their fields, which get the focus; a corrected field is not marked any more."""
    page = session.open("edits")
    page.get_by_role("button", name="Use example").click()
    page.get_by_label("Subject", exact=True).fill("Big Ben")
    page.get_by_role("button", name="Apply edit").click()
    expect(page.get_by_role("alert")).to_contain_text("“Big Ben” does not occur in the sentence")
    page.get_by_label("Subject", exact=True).fill("Eiffel Tower")
    page.get_by_label("New object", exact=True).fill("")
    page.get_by_role("button", name="Apply edit").click()
    expect(page.get_by_role("alert")).to_contain_text("Enter the new object")
    new_object = page.get_by_label("New object", exact=True)
    expect(new_object).to_be_focused()
    expect(new_object).to_have_attribute("aria-invalid", "true")
    assert session.accessibility_violations() == []
    save_screenshot(page, "form-error")
    new_object.fill("Rome")
    page.get_by_text("Method and guard").click()
    page.get_by_label("Layers", exact=True).fill("3, 99")
    page.get_by_text("Method and guard").click()
    page.get_by_role("button", name="Apply edit").click()
    expect(page.get_by_role("alert")).to_contain_text("“99” is no layer: enter numbers from 0 to 7")
    expect(page.get_by_label("Layers", exact=True)).to_be_focused()
    expect(page.get_by_label("New object", exact=True)).not_to_have_attribute("aria-invalid", "true")


def test_layers_are_tried(session: PageSession, service: EmbeddedService) -> None:
    """The layers of the recipe are in the form. A trial shows a bar for each of several layers, and one click puts a
    layer into the field and into the edit; the ledger is unchanged."""
    head = service.head()
    recipe = service.get("/models")["items"][0]["recipe"]
    page = session.open("edits")
    page.get_by_role("button", name="Use example").click()
    page.get_by_text("Method and guard").click()
    layers = page.get_by_label("Layers", exact=True)
    expect(layers).to_have_value(", ".join(map(str, recipe["rome"]["layers"])))
    page.get_by_label("New object", exact=True).fill("Oslo")
    page.get_by_role("button", name="Try layers").click()
    expect(page.locator(".layers .phase")).not_to_have_text("Queued")
    save_screenshot(page, "layers-live")
    page.locator(".trial.best").wait_for(timeout=240_000)  # statistics of each layer, then six edits
    assert page.locator(".trial").count() >= 3
    save_screenshot(page, "layers-tried")
    other = page.locator(".trial:not(.best)").first
    number = other.locator("b").inner_text().removeprefix("Layer ")
    other.get_by_role("button").click()
    expect(layers).to_have_value(number)
    page.get_by_label("Dry run").check()
    page.get_by_role("button", name="Run dry run").click()
    expect(page.get_by_role("heading", name="Details")).to_be_visible()
    assert service.get("/edits", limit=1)["items"][0]["hparams"]["layers"] == [int(number)]
    assert service.head() == head


def test_the_address_asks_the_same_again(session: PageSession) -> None:
    """Asking changes the address to one that reproduces prompt, versions and sampling, and the page before it stays in
    the history."""
    page = session.open("generate")
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("compare with another version").check()
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_label("Max. tokens").fill("3")
    page.get_by_role("button", name="Generate", exact=True).click()
    expect(page.locator(".answer footer")).to_contain_text(["3 tokens in", "3 tokens in"])
    asked = page.url.split("#/")[1]
    said = page.locator(".said").all_inner_texts()
    assert "max_new_tokens=3" in asked and "beside=base" in asked
    page.go_back()
    expect(page.get_by_label("Prompt")).to_have_value("")
    session.open(asked)
    expect(page.locator(".answer footer")).to_contain_text(["3 tokens in", "3 tokens in"])
    assert page.locator(".said").all_inner_texts() == said
    assert page.url.split("#/")[1] == asked


def test_an_unknown_address_has_a_page_of_its_own(session: PageSession) -> None:
    """An address without a page names it and lists the pages."""
    page = session.open("nonsense/5")
    expect(page.get_by_role("heading", level=1)).to_have_text("No such page")
    expect(page.locator("main")).to_contain_text("#/nonsense/5")
    page.locator("main").get_by_role("link", name="Ledger").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Ledger")


def test_a_trace_is_read_cell_by_cell(session: PageSession) -> None:
    """The three kinds are side by side. The hovered or focused cell shows its token and layer, each kind can be
    selected, and the pictures can be downloaded."""
    page = session.open(f"traces?prompt={PROMPT}&subject=Eiffel Tower&version=base")
    page.get_by_role("button", name="Run trace").click()
    expect(page.locator(".stage svg.heat")).to_have_count(3)
    save_screenshot(page, "trace-side-by-side")
    page.get_by_role("radio", name="hidden state", exact=True).check()
    expect(page.locator(".stage svg.heat")).to_have_count(1)
    readout = page.locator(".readout")
    page.get_by_role("gridcell", name=re.compile(r"^Tower\*, layer 2:")).hover()
    expect(readout).to_contain_text("Tower (of the subject)")
    expect(readout.locator("dd").nth(1)).to_have_text("2")
    save_screenshot(page, "trace")
    page.locator(".cell[tabindex='0']").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Home")
    expect(readout.locator("dd").first).to_have_text("city")
    expect(readout.locator("dd").nth(1)).to_have_text("0")
    for kind in ("MLP", "attention", "severed"):
        page.get_by_role("radio", name=kind, exact=True).check()
        expect(
            page.locator(f".stage svg.{ {'MLP': 'mlp', 'attention': 'attn', 'severed': 'severed'}[kind] }")
        ).to_be_visible()
        save_screenshot(page, f"trace-{kind.lower()}")
    for words, begins in (("Download SVG", b"<?xml"), ("Download PNG", b"\x89PNG")):
        with page.expect_download() as saved:
            page.get_by_role("button", name=words).click()
        assert Path(saved.value.path()).read_bytes().startswith(begins)


def test_an_evaluation_is_plotted(session: PageSession, service: EmbeddedService) -> None:
    """Pasted records are evaluated in a sequence, and the page shows measures, curves and a table of the
    records."""
    page = session.open("evaluations")
    page.get_by_role("radio", name="your own").check()
    page.get_by_label("Records as JSON").fill(
        RECORD + "\n" + RECORD.replace("Louvre", "Colosseum").replace('"Paris"', '"Rome"')
    )
    page.get_by_role("radio", name="in sequence").check()
    page.get_by_label("Checkpoints (number of edits)").fill("1, 2")
    page.get_by_label("Damage texts").fill("4")
    for suite in ("what the model says", "change of whole distributions"):
        page.get_by_label(suite).check()
    page.get_by_role("button", name="Evaluate").click()
    page.locator(".measure").first.wait_for(timeout=180_000)  # two edits and their measurements
    expect(page.locator(".measure .name b").first).to_have_text("ES")
    assert page.locator(".curve").count() >= 1
    expect(page.get_by_role("table", name="Records").locator("tbody tr")).to_have_count(2)
    measures = page.get_by_role("table", name="All measures")
    for words in ("its text after the prompt begins with the new object", "KL after the bare subject"):
        expect(measures.get_by_text(words).first).to_be_visible()
    assert service.head() == 1  # the ledger is unchanged
    save_screenshot(page, "evaluation")


@pytest.mark.parametrize("theme", THEMES)
def test_every_page_is_accessible(browser: Browser, service: EmbeddedService, theme: Any) -> None:
    """axe finds no serious or critical violation on any page or in the help, in either theme."""
    violations_by_page: dict[str, list[str]] = {}
    with open_page(browser, str(service.http.base_url).rstrip("/"), color_scheme=theme) as session:
        for name, (where, awaited) in console_pages(service).items():
            session.open(where).locator(awaited).first.wait_for()
            violations_by_page[name] = session.accessibility_violations()
            save_screenshot(session.page, f"{name}-{theme}")
        session.page.get_by_role("button", name="Help").click()
        violations_by_page["help"] = session.accessibility_violations()
        save_screenshot(session.page, f"help-{theme}", full_page=False)
    assert {name: troubles for name, troubles in violations_by_page.items() if troubles} == {}


@pytest.mark.parametrize("theme", THEMES)
def test_every_page_fits_a_phone(browser: Browser, service: EmbeddedService, theme: Any) -> None:
    """At a width of 390 pixels no page scrolls horizontally."""
    with open_page(browser, str(service.http.base_url).rstrip("/"), color_scheme=theme, **PHONE) as phone:
        for name, (where, awaited) in console_pages(service).items():
            phone.open(where).locator(awaited).first.wait_for()
            assert phone.page.evaluate("document.documentElement.scrollWidth") == 390, name
            save_screenshot(phone.page, f"{name}-phone-{theme}")


def test_the_keyboard_is_enough(session: PageSession, service: EmbeddedService) -> None:
    """The keyboard alone opens and closes the help, changes pages, fills in the form and submits it."""
    page, keys = session.open("generate"), session.page.keyboard
    page.locator("#prompt").wait_for()
    keys.press("Tab")
    expect(page.get_by_text("Skip to content")).to_be_focused()
    keys.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    keys.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    keys.type("ge")
    expect(page.get_by_role("heading", name="Edit a fact")).to_be_visible()
    keys.press("/")
    keys.type("The Louvre is located in the city of")
    _tab_to(page, "Subject")
    keys.type("Louvre")
    _tab_to(page, "New object")
    keys.type("Rome")
    _tab_to(page, "Dry run: evaluate without applying")
    keys.press("Space")
    keys.press("Control+Enter")
    expect(page.locator(".title .pill").first).to_have_text(re.compile("dry run|rejected"))
    keys.type("gt")
    expect(page.get_by_role("heading", name="Trace a fact")).to_be_visible()


def _tab_to(page: Page, label: str) -> None:
    """Press Tab until the field with this label has the focus."""
    field = page.get_by_label(label, exact=True)
    for _ in range(20):
        page.keyboard.press("Tab")
        if field.evaluate("element => element === document.activeElement"):
            return
    raise AssertionError(f"Tab does not lead to {label}")


def test_the_theme_is_chosen_and_kept(session: PageSession) -> None:
    """The theme button changes from the system's theme to the dark theme, which a reload keeps."""
    page = session.open("workers")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    for _ in range(2):
        page.get_by_role("button", name="Theme").click()
    assert page.evaluate(paper) != light
    page.reload()
    expect(page.get_by_role("button", name="Theme: Dark")).to_be_visible()
    assert page.evaluate(paper) != light


def test_an_edit_is_reverted_in_the_ledger_view(session: PageSession, service: EmbeddedService) -> None:
    """The ledger can be verified, and a revert asks for confirmation; after it the entry is marked as
    reverted and the model generates Paris."""
    page = session.open("ledger")
    page.get_by_role("button", name="Verify").click()
    expect(page.locator(".verified")).to_contain_text("The ledger is valid")
    revert_button = page.get_by_role("button", name="Revert", exact=True)
    revert_button.click()
    expect(page.get_by_role("button", name="Revert edit")).to_be_focused()
    page.keyboard.press("Escape")
    expect(revert_button).to_be_focused()
    revert_button.click()
    save_screenshot(page, "ledger-asks")
    page.get_by_role("button", name="Revert edit").click()
    expect(page.locator(".entry .version")).to_have_text(["version 2", "version 1", "version 0"])
    expect(page.locator(".entry.apply .pill")).to_have_text("↶ reverted")
    expect(page.get_by_text("Reverted: the newest version is 2")).to_be_visible()
    save_screenshot(page, "ledger-after")
    assert service.head() == 2
    page.get_by_role("link", name="Apply again").click()
    expect(page.get_by_label("New object", exact=True)).to_have_value("Rome")
    session.open(f"generate?prompt={PROMPT}")
    expect(page.locator(".badge.known")).to_have_text("version 2")
    expect(page.locator(".said")).to_contain_text("Paris")
