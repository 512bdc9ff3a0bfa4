"""service.kit.template_renderer."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from service.errors import InvalidInput, Unavailable
from service.kit import template_renderer
from service.kit.template_renderer import TemplateRenderer

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    """A renderer with a short limit of processor time."""
    renderer = TemplateRenderer(cpu_seconds=0.2)
    yield renderer
    renderer.close()


def process_of(renderer: TemplateRenderer) -> subprocess.Popen[bytes]:
    assert renderer._process is not None
    return renderer._process


def test_a_text_is_rendered_with_its_variables(renderer: TemplateRenderer) -> None:
    """A text of any characters and of many lines comes back whole."""
    text = "São 🗼\n\u2028\x00" * 20_000
    assert renderer.render("{{ text }}\n{{ n }}", {"text": text, "n": None}) == f"{text}\nNone"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses the messages: roles must alternate"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}", "MemoryError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_a_template_that_fails_is_an_error_of_its_request(
    renderer: TemplateRenderer, source: str, reason: str
) -> None:
    """Each failure names its reason and the field of the request, and the next text is rendered."""
    with pytest.raises(InvalidInput, match=reason) as failed:
        renderer.render(source, {}, "messages")
    assert failed.value.field == "messages"
    assert renderer.render("{{ 1 + 1 }}", {}) == "2"


def test_a_template_without_an_end_is_stopped(renderer: TemplateRenderer) -> None:
    """A template that needs more processor time than its limit is an error, and the next text is rendered."""
    with pytest.raises(InvalidInput, match=r"in 0\.2 s of processor time"):
        renderer.render(ENDLESS, {})
    assert renderer.render("a", {}) == "a"


def test_a_template_that_never_ends_holds_no_threads() -> None:
    """After three renderings in a row that exceeded the limits every other one is refused at once, until the pause is
    over; a rendering that succeeds starts the count again."""
    renderer = TemplateRenderer(cpu_seconds=0.1)
    for source in (ENDLESS, ENDLESS, "a", ENDLESS):
        with suppress(InvalidInput):
            renderer.render(source, {})
    assert renderer.render("b", {}) == "b"
    for _ in range(3):
        with pytest.raises(InvalidInput):
            renderer.render(ENDLESS, {})
    with pytest.raises(Unavailable, match="several times in a row"):
        renderer.render("b", {})
    renderer._paused_until = time.monotonic()
    assert renderer.render("b", {}) == "b"
    renderer.close()


def test_a_process_that_ended_starts_again(renderer: TemplateRenderer) -> None:
    """After its process was killed, a renderer renders."""
    renderer.render("a", {})
    process_of(renderer).kill()
    process_of(renderer).wait()
    assert renderer.render("b", {}) == "b"


def test_the_process_survives_an_interrupt(renderer: TemplateRenderer) -> None:
    """Ctrl-C, which the terminal sends to all processes of a service, does not end a rendering."""
    renderer.render("a", {})
    process = process_of(renderer)
    os.kill(process.pid, signal.SIGINT)
    assert renderer.render("b", {}) == "b"
    assert process_of(renderer) is process


def test_the_process_has_no_secrets(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the process has the path of modules alone."""
    renderer.close()
    monkeypatch.setenv("PALIMPSEST_API_KEY", "secret")
    renderer.render("a", {})
    with open(f"/proc/{process_of(renderer).pid}/environ", "rb") as file:
        assert [line.split(b"=")[0] for line in file.read().split(b"\0") if line] == [b"PYTHONPATH"]


def test_waiting_texts_have_a_maximum(renderer: TemplateRenderer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that waits too long for another one is refused as unavailable."""
    monkeypatch.setattr(template_renderer, "QUEUE_SECONDS", 0.01)
    with renderer._lock, pytest.raises(Unavailable, match="try again"):
        renderer.render("a", {})


def test_threads_get_their_own_texts(renderer: TemplateRenderer) -> None:
    """Threads that render at the same time get the text of their own variables."""
    found: dict[int, str] = {}

    def run(number: int) -> None:
        found[number] = renderer.render("{{ n }}", {"n": number})

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) for n in range(8)}


def test_the_process_ends_with_its_renderer() -> None:
    """A renderer that is not used any more leaves no process."""
    renderer = TemplateRenderer()
    renderer.render("a", {})
    process = process_of(renderer)
    del renderer
    gc.collect()
    assert process.returncode is not None
