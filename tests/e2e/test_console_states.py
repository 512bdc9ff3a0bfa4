"""The console with an API key, a stopped stream, failed jobs, and user text that contains markup."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from tests.support import chromium
from tests.support.application import TOWER, FakeWorker, TestApp, serving
from tests.support.chromium import PHONE, open_page, save_screenshot
from tests.support.local_server import wait_until

MARKUP = "<img src=//a.b>"  #: as markup it would ask another host, which no visit may


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium.open_browser() as browser:
        yield browser


def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Browser, tmp_path: Path) -> None:
    """The page loads without an API key. A dialog asks for one, rejects a wrong one, and keeps a valid one in session
    storage."""
    test_app = TestApp(tmp_path, api_key="open-sesame-open")
    with serving(test_app) as address, open_page(browser, address, allowed="401") as found:
        page = found.open("ledger")
        box = page.get_by_role("dialog")
        expect(box).to_contain_text("API key required")
        assert found.accessibility_violations() == []
        save_screenshot(page, "key-box", full_page=False)
        box.get_by_label("API key").fill("wrong")
        box.get_by_role("button", name="Use key").click()
        expect(box.get_by_role("alert")).to_contain_text("unknown or revoked")
        box.get_by_label("API key").fill("open-sesame-open")
        box.get_by_role("button", name="Use key").click()
        expect(page.locator(".empty")).to_contain_text("The ledger is empty")
        assert page.evaluate(
            "[sessionStorage.length, Object.keys(localStorage).includes('palimpsest.key')]"
        ) == [1, False]
        page.get_by_role("link", name="Edit", exact=True).click()
        expect(page.locator(".empty")).to_contain_text("No edits yet")
        assert "sesame" not in page.url
        page.get_by_role("button", name="Forget key").click()
        expect(page.locator("#status")).to_have_text("needs a key")
        assert page.evaluate("sessionStorage.length") == 0


def test_a_dismissed_key_dialog_is_not_shown_again(browser: Browser, tmp_path: Path) -> None:
    """After the dialog is dismissed the page shows the error, and background requests do not open it again."""
    test_app = TestApp(tmp_path, api_key="open-sesame-open")
    with serving(test_app) as address, open_page(browser, address, allowed="401") as found:
        page = found.open("traces")
        page.get_by_role("button", name="Not now").click()
        expect(page.get_by_role("alert")).to_contain_text("Send an API key")
        page.wait_for_timeout(300)
        expect(page.get_by_role("dialog")).to_be_hidden()


def test_nothing_is_asked_of_a_model_that_is_being_loaded(browser: Browser, tmp_path: Path) -> None:
    """Until a worker serves, every form says what it waits for, shows progress and has its button disabled; then the
    form can be sent, without a reload."""
    test_app = TestApp(tmp_path, register=False)
    with serving(test_app) as address, open_page(browser, address, allowed="503") as found:
        for path, button in (("edits", "Apply edit"), ("traces", "Run trace"), ("evaluations", "Evaluate"), ("generate", "Generate")):  # fmt: skip
            page = found.open(path)
            expect(page.locator(".starting")).to_contain_text("The model is being loaded")
            expect(page.locator(".starting progress")).to_be_visible()
            expect(page.get_by_role("button", name=button, exact=True)).to_be_disabled()
        save_screenshot(page, "starting")
        assert found.accessibility_violations() == []
        test_app.register()
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
        expect(page.locator(".starting")).to_be_hidden()


def test_a_streamed_generation_can_be_stopped(browser: Browser, tmp_path: Path) -> None:
    """The text generated before Stop stays visible with its version."""
    test_app = TestApp(tmp_path)
    worker = test_app.start_fake_worker()
    worker.may_finish.clear()
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("generate?prompt=The Eiffel Tower is in")
        expect(page.locator(".said")).to_have_text(" Pa")
        expect(page.locator(".badge")).to_have_text("version 0")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".answer footer")).to_have_text("stopped")
        expect(page.get_by_role("button", name="Generate", exact=True)).to_be_enabled()
        expect(page.get_by_role("button", name="Stop")).to_be_hidden()
        worker.may_finish.set()


def test_user_text_is_never_rendered_as_markup(browser: Browser, tmp_path: Path) -> None:
    """Markup in a subject, a prompt or an object is shown as text on every page."""
    test_app = TestApp(tmp_path)
    test_app.start_fake_worker()
    request = TOWER | {"subject": MARKUP, "target_new": MARKUP}
    with serving(test_app) as address, open_page(browser, address) as found:
        with httpx.Client(base_url=address, timeout=60) as http:
            edit = http.post("/edits", json=request, headers={"Prefer": "wait=20"}).json()
        assert edit["status"] == "applied"
        for path in ("edits", f"edits/{edit['id']}", "ledger", "workers"):
            page = found.open(path)
            expect(page.get_by_text(MARKUP).first).to_be_visible()
            assert page.locator("main img").count() == 0


@pytest.mark.parametrize(("label", "separator"), [("a space", " "), ("nothing", ""), (None, None)])
def test_the_separator_of_an_edit_is_chosen(
    browser: Browser, tmp_path: Path, label: str | None, separator: str | None
) -> None:
    """The field of the edit form says what stands between sentence and object, and the form of a similar edit has the
    same value."""
    test_app = TestApp(tmp_path)
    test_app.start_fake_worker()
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("edits")
        page.get_by_role("button", name="Use example").click()
        page.get_by_text("Method and guard").click()
        field = page.get_by_label("Between sentence and object")
        if label is not None:
            field.select_option(label=label)
        page.get_by_role("button", name="Apply edit").click()
        page.get_by_role("link", name="Similar edit").click()
        expect(field).to_have_value({" ": "space", "": "none", None: ""}[separator])
        (edit,) = httpx.get(f"{address}/edits", timeout=60).json()["items"]
        assert edit["separator"] == separator


@pytest.mark.parametrize("form", ["gated", None])
def test_the_form_of_an_edit_is_chosen(browser: Browser, tmp_path: Path, form: str | None) -> None:
    """The field of the edit form says whether the edit is gated; left alone, the service decides. The form of a similar
    edit has the same value."""
    test_app = TestApp(tmp_path)
    test_app.start_fake_worker()
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("edits")
        page.get_by_role("button", name="Use example").click()
        page.get_by_text("Method and guard").click()
        field = page.get_by_label("Form", exact=True)
        field.select_option(form or "")
        page.get_by_role("button", name="Apply edit").click()
        page.get_by_role("link", name="Similar edit").click()
        expect(field).to_have_value(form or "")
        (edit,) = httpx.get(f"{address}/edits", timeout=60).json()["items"]
        assert edit["form"] == form


def test_a_fact_is_edited_and_traced_in_a_chat(browser: Browser, tmp_path: Path) -> None:
    """The forms send a sentence as a message of the user with the beginning of an answer; the report shows the message
    of the subject, and its links fill the forms with the conversation again."""
    test_app = TestApp(tmp_path, positions=512)
    test_app.start_fake_worker()
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("edits")
        page.get_by_label("Sentence, up to the object").fill("Where is the Eiffel Tower?")
        page.get_by_label("Subject", exact=True).fill("Eiffel Tower")
        page.get_by_role("textbox", name="New object").fill("Rome")
        page.get_by_label("In a chat").check()
        page.get_by_label("Beginning of the model's answer").fill("The Eiffel Tower is in")
        assert found.accessibility_violations() == []
        save_screenshot(page, "edit-in-chat")
        page.get_by_role("button", name="Apply edit").click()
        expect(page.locator("header .writing")).to_contain_text("The Eiffel Tower is in")
        page.get_by_role("link", name="Similar edit").click()
        expect(page.get_by_label("Beginning of the model's answer")).to_have_value("The {} is in")
        expect(page.get_by_label("Sentence, up to the object")).to_have_value("Where is the {}?")
        page.go_back()
        page.get_by_role("link", name="Trace", exact=True).click()
        page.get_by_role("button", name="Run trace").click()
        expect(page.locator("h1")).to_contain_text("The Eiffel Tower is in")
        edited = httpx.get(f"{address}/edits", timeout=60).json()["items"][0]
        traced = httpx.get(f"{address}/trace", timeout=60).json()["items"][0]["request"]
    marked = [
        {"role": "user", "content": "Where is the {}?"},
        {"role": "assistant", "content": "The {} is in"},
    ]
    for request in (edited, traced):
        assert request["messages"] == marked and request["continue_final_message"] is True


def test_a_model_without_a_template_edits_sentences_only(browser: Browser, tmp_path: Path) -> None:
    """Without a chat template the edit form has no field for a chat."""
    test_app = TestApp(tmp_path, chat_template=None)
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("edits")
        page.get_by_role("button", name="Use example").click()
        page.wait_for_load_state("networkidle")
        expect(page.get_by_label("In a chat")).to_be_hidden()


def test_a_failed_job_can_be_retried(browser: Browser, tmp_path: Path) -> None:
    """A failed edit shows its error, and a button retries it."""
    test_app = TestApp(tmp_path)
    test_app.start_fake_worker()
    with serving(test_app) as address, open_page(browser, address) as found:
        with httpx.Client(base_url=address, timeout=60) as http:
            edit = http.post(
                "/edits", json=TOWER | {"target_new": "Atlantis"}, headers={"Prefer": "wait=20"}
            ).json()

            def ended_again() -> bool:
                return http.get(f"/edits/{edit['id']}").json()["ended"] not in (None, edit["ended"])

            page = found.open(f"edits/{edit['id']}")
            expect(page.locator(".problem")).to_contain_text("there is no such place")
            page.get_by_role("button", name="Retry").click()
            wait_until(ended_again)  # the page shows the error of the first attempt until then
        expect(page.locator(".problem")).to_contain_text("there is no such place")
        page = found.open("workers")
        page.get_by_role("radio", name="failed").check()
        expect(page.get_by_role("button", name="Retry")).to_be_visible()


MARKED = "The capital is <i>Oslo</i>."


def chat_worker(test_app: TestApp) -> FakeWorker:
    """Start a worker whose base and newest version answer differently; a conversation asks them by number."""
    client = TestClient(test_app.app)
    worker = test_app.start_fake_worker()
    client.post("/edits", json=TOWER, headers={"prefer": "wait=20"})
    base, head = (0, "The capital is Tokyo, a city."), (1, MARKED)
    worker.texts = {"base": base, 0: base, "head": head, 1: head}
    return worker


def test_a_conversation_is_compared_word_by_word(browser: Browser, tmp_path: Path) -> None:
    """Base is left and head right, words of one side alone are marked, each side is asked with its own answers, and the
    address asks the same versions with the same parameters again. The page is accessible and fits a phone."""
    test_app = TestApp(tmp_path, positions=512)
    worker = chat_worker(test_app)
    with serving(test_app) as address:
        with open_page(browser, address) as found:
            page = found.open("chat")
            page.get_by_role("button", name="What is the capital of Japan?").click()
            page.get_by_text("System message and sampling").click()
            page.get_by_label("System message").fill("Be brief.")
            page.get_by_label("Seed").fill("7")
            page.get_by_role("button", name="Send").click()
            expect(page.locator("del.word")).to_have_text(["Tokyo, a city."])
            expect(page.locator("ins.word")).to_have_text(["<i>Oslo</i>."])
            page.get_by_label("Message", exact=True).fill("And its size?")
            page.keyboard.press("Control+Enter")
            expect(page.locator(".turn")).to_have_count(2)
            expect(page.locator(".answer footer")).to_contain_text(["1 token in"] * 4)
            expect(page.get_by_role("link", name="Address of this conversation")).to_be_visible()
            asked = page.url.split("#/")[1]
            assert found.accessibility_violations() == []
            save_screenshot(page, "chat")
        first, sides = worker.calls[:2], worker.calls[2:4]
        assert {call["version"] for call in first} == {"base", "head"}
        assert {call["version"] for call in sides} == {0, 1}
        assert first[0]["tokens"] == first[1]["tokens"] and sides[0]["tokens"] != sides[1]["tokens"]
        assert all(call["seed"] == 7 for call in worker.calls)
        with open_page(browser, address, **PHONE | {"color_scheme": "dark"}) as found:
            page = found.open(asked)
            expect(page.locator("ins.word")).to_have_text(["<i>Oslo</i>."] * 2)
            assert found.accessibility_violations() == []
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
            save_screenshot(page, "chat-phone-dark")
    number_of = {"base": 0, "head": 1, 0: 0, 1: 1}
    asked_calls = [(number_of[call["version"]], call["tokens"], call["seed"]) for call in worker.calls]
    assert sorted(asked_calls[4:]) == sorted(asked_calls[:4])


def test_a_conversation_begins_again_and_keeps_a_failed_question(browser: Browser, tmp_path: Path) -> None:
    """A question that fails stays in the field and is no part of the conversation; a stopped answer has no address; a
    new conversation has no turns and the versions can be chosen again."""
    test_app = TestApp(tmp_path, positions=512)
    worker = chat_worker(test_app)
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("chat")
        worker.call_error = {"code": "unavailable", "title": "", "detail": "The worker stops."}
        page.get_by_label("Message", exact=True).fill("Hi")
        page.get_by_role("button", name="Send").click()
        expect(page.get_by_role("alert")).to_have_text(["The worker stops."] * 2)
        expect(page.get_by_label("Message", exact=True)).to_have_value("Hi")
        worker.call_error = None
        worker.may_finish.clear()
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".turn").last.locator(".answers")).to_contain_text("The")
        page.keyboard.press("Escape")
        expect(page.locator(".turn").last.locator("footer")).to_have_text(["stopped"] * 2)
        expect(page.get_by_role("link", name="Address of this conversation")).to_be_hidden()
        worker.may_finish.set()
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.get_by_role("group", name="Left")).to_be_visible()
        assert worker.calls[0]["tokens"] == worker.calls[-1]["tokens"]


def test_a_model_without_a_template_has_no_chat_page(browser: Browser, tmp_path: Path) -> None:
    """Without a chat template the page says so and links to the page for prompts."""
    test_app = TestApp(tmp_path, chat_template=None)
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("chat")
        expect(page.locator(".empty")).to_contain_text("The model tiny has no chat template")
        page.get_by_role("link", name="Generate text").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Generate text")


def test_words_are_compared(browser: Browser, tmp_path: Path) -> None:
    """The runs of each text make the text; common words are a longest common subsequence, also in scripts without
    spaces, and texts that are too long for it are compared at their ends."""
    test_app = TestApp(tmp_path)
    cases = {
        ("a b c d", "a x c d"): ([["a", True], [" b", False], [" c d", True]], [["a", True], [" x", False], [" c d", True]]),
        ("same", " same"): ([["same", True]], [[" same", True]]),
        ("", "new\n"): ([], [["new\n", False]]),
        ("首都は東京", "首都はオスロ"): ([["首都は", True], ["東京", False]], [["首都は", True], ["オスロ", False]]),
        ("x one two y", "x two one y"): None,
        ("a " + "b " * 3000 + "z", "a " + "c " * 3000 + "z"): None,
    }  # fmt: skip
    with serving(test_app) as address, open_page(browser, address) as found:
        page = found.open("workers")
        script = "async (texts) => (await import('./console/difference.js')).compareWords(...texts)"
        for texts, expected in cases.items():
            runs = page.evaluate(script, list(texts))
            assert ["".join(text for text, _ in side) for side in runs] == list(texts)
            if expected is not None:
                assert runs == [list(side) for side in expected]
            one, other = (["".join(text.split()) for text, is_common in side if is_common] for side in runs)
            assert "".join(one) == "".join(other)
