"""The page in a real browser: Chromium, headless, where it and the extras are there."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse
from urllib.request import urlopen

import pytest
from PIL import Image

from bridges.cli import main

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytest_plugins = ["talking"]

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
SHORT, LONG = 12, 1200
SaidBy = Callable[[list[list[str | Path]], int], list[str]]


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a page that is served, with short answers."""
    pytest.importorskip("gradio", reason="the extra [web] is not installed")
    folder = tmp_path_factory.mktemp("web")
    log, port = folder / "log", free_port()
    arguments = ["--web", "--port", str(port), "--max_new_tokens", str(SHORT)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with (
        log.open("w") as into,
        subprocess.Popen(
            [sys.executable, "-m", "chat", str(checkpoint), *arguments],
            cwd=ROOT,
            env=environment,
            stderr=into,
            stdout=into,
        ) as served,
    ):
        try:
            while "the chat is at" not in log.read_text():
                assert served.poll() is None, log.read_text()
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            served.send_signal(signal.SIGINT)
            try:
                served.wait(30)
            finally:
                served.kill()
    assert served.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    left = [path for path in folder.rglob("*") if path.is_file() and path != log]
    assert left == [], "uploaded pictures go when the page does"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with api.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: "Browser", address: str) -> "Iterator[Callable[[], Page]]":
    """Opens another one."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})

    def opened() -> "Page":
        page = context.new_page()
        page.goto(address)
        page.get_by_role("textbox").first.wait_for()
        return page

    yield opened
    context.close()


def ask(page: "Page", text: str, files: list[Path] | None = None) -> None:
    if files:
        page.set_input_files("input[type=file]", [str(path) for path in files])
        page.locator(".thumbnail-item").nth(len(files) - 1).wait_for()
    page.get_by_placeholder("Write a message").fill(text)
    page.keyboard.press("Enter")


def cost(page: "Page", *words: str) -> None:
    """Wait until an answer is whole, and cost just that."""
    for some in words:
        page.locator("#cost", has_text=some).wait_for()


def said(page: "Page") -> list[str]:
    """By the model."""
    return [text.strip() for text in page.locator(".bot.message").all_inner_texts()]


def put(page: "Page", name: str, value: object) -> None:
    """A setting."""
    if not page.get_by_label(name).is_visible():
        page.get_by_role("button", name="Settings").click()
    page.get_by_label(name).fill(str(value))


def test_pictures_and_questions_are_answered_as_a_session_answers_them(
    tab: "Callable[[], Page]", said_by: SaidBy, picture_files: list[Path]
) -> None:
    page, asked = tab(), []
    page.on("request", lambda request: asked.append(urlparse(request.url)))
    page.reload()
    expected = said_by([[*picture_files, "What is in them?"], ["And now?"]], SHORT)
    ask(page, "What is in them?", picture_files)
    cost(page, "pictures: 2 encoded, 0 known before")
    assert said(page) == expected[:1]
    assert page.locator(".user img").count() == 2
    ask(page, "And now?")
    cost(page, "pictures: 0 encoded, 2 known before", f", {SHORT} in all")
    assert said(page) == expected
    picture = Image.open(io.BytesIO(page.screenshot()))
    assert len(picture.getcolors(1 << 24) or []) > 100
    page.get_by_role("button", name="Regenerate").click()
    cost(page, "prompt: 0 tokens read")
    assert said(page) == expected, "at temperature 0"
    page.get_by_role("button", name="Undo").click()
    page.locator(".bot.message").nth(1).wait_for(state="detached")
    assert said(page) == expected[:1]
    assert page.get_by_placeholder("Write a message").input_value() == "And now?"
    page.get_by_role("button", name="Undo").click()
    page.locator(".thumbnail-item").nth(1).wait_for()
    assert said(page) == []
    page.get_by_placeholder("Write a message").press("Enter")
    cost(page, "pictures: 0 encoded, 2 known before")
    assert said(page) == expected[:1]
    page.get_by_placeholder("Write a message").fill("Hello")
    page.get_by_role("button", name="Clear").click()
    page.locator("#cost", has_text="known before").wait_for(
        state="hidden"
    )  # the conversation goes, what is typed stays
    page.get_by_placeholder("Write a message").press("Enter")
    cost(page, " read, 0 known before")
    assert said(page) == said_by([["Hello"]], SHORT)
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob")} == {"127.0.0.1"}


def test_an_answer_is_stopped_and_the_talk_goes_on(tab: "Callable[[], Page]") -> None:
    page = tab()
    put(page, "max_new_tokens", LONG)
    ask(page, "Hello")
    page.locator(".bot.message", has_text=re.compile("[^ ]{4}")).wait_for()
    page.get_by_role("button", name="Stop").click()
    cost(page, "tokens a second")
    [stopped] = said(page)
    assert len(stopped) < LONG
    put(page, "max_new_tokens", SHORT)
    ask(page, "Go on")
    page.locator("#cost", has_text=re.compile(r"read, [1-9]\d* known before")).wait_for()  # of the second answer
    cost(page, f", {SHORT} in all")
    assert said(page)[0] == stopped


def test_each_tab_has_a_conversation_of_its_own_and_one_that_is_closed_holds_up_nobody(
    tab: "Callable[[], Page]", said_by: SaidBy
) -> None:
    one, other = tab(), tab()
    put(one, "max_new_tokens", LONG)
    ask(one, "Hello")
    one.locator(".bot.message", has_text=re.compile("[^ ]{4}")).wait_for()
    ask(other, "Bye")
    other.locator(".user.message").wait_for(state="hidden")
    one.close()
    cost(other, f", {SHORT} in all")
    assert said(other) == said_by([["Bye"]], SHORT)


def test_what_cannot_be_sent_is_told_and_stays_in_the_field(
    tab: "Callable[[], Page]", picture_files: list[Path], tmp_path: Path
) -> None:
    page, note = tab(), tmp_path / "note.png"
    note.write_text("not a picture")
    ask(page, "What is it?", [note])
    page.get_by_text("cannot open note.png: not a picture").wait_for()
    there = "text => [...document.querySelectorAll('textarea')].some(field => field.value == text)"
    page.wait_for_function(there, arg="What is it?")  # it comes back a moment after the warning
    page.reload()
    put(page, "temperature", -1)
    ask(page, "Hello")
    page.get_by_text("temperature -1.0 is below 0").wait_for()
    put(page, "temperature", 0)
    page.get_by_role("button", name="Undo").click()
    page.get_by_text("nothing was said").wait_for()
    assert said(page) == []


def test_the_page_is_this_machine_s_own_and_loads_nothing_from_elsewhere(address: str) -> None:
    with urlopen(address) as answer:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        config = answer.read().decode()
    assert '"analytics_enabled":false' in config
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.2", urlparse(address).port or 0)):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--web"),
        (["--port", "80"], "--web"),
        (["--web", "--prompt", "Hi"], "given in the page"),
        (["--web", "--image", "x.png"], "given in the page"),
        (["--web", "--port", "TAKEN"], "choose another --port"),
        (["--web"], "mm-bridges[web]"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "[web]" in message:  # as if it was not installed
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "chat.web", raising=False)
        monkeypatch.delattr("chat.web", raising=False)
    elif "--web" in arguments:
        pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        places = {"TAKEN": str(taken.getsockname()[1])}
        with pytest.raises(SystemExit) as left:
            main(["chat", str(checkpoint), *(places.get(a, a) for a in arguments)])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("bridges: ") == 1
