"""What the buttons of the web page do: `chat/web.py`. Each gives what the page shows then."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL.Image import Image

from bridges.data.conversation import Turn, images_of
from bridges.data.pictures import BrokenPicture, open_picture
from bridges.inference.settings import NAMES, changed
from chat.show import stats
from chat.state import Chat, words_of

EMPTY: dict[str, Any] = {"text": "", "files": []}
Shown = tuple[Any, Any, Any]
"""The conversation, the field to write in, what the answer cost"""


@dataclass
class Tab:
    """Of a browser: its conversation, and whether its answer is to stop."""

    chat: Chat
    stopped: bool = False


def ask(tab: Tab, message: dict[str, Any], system: str, *values: object) -> Iterator[Shown]:
    """Say what was written, and give the answer as it comes. What cannot be said stays in the field."""
    text = message["text"].strip()
    try:
        said = [*map(uploaded, message["files"]), *([text] if text else [])]
        if not said:
            raise ValueError("nothing was written; write a message, or add a picture")
        set_up(tab.chat, system, values)
        tab.chat.ask(Turn("user", said))
        yield from speak(tab)
    except ValueError as error:
        yield refused(tab, error, message)


def regenerate(tab: Tab, system: str, *values: object) -> Iterator[Shown]:
    """Another answer to the last message; it differs where the temperature is above 0."""
    try:
        set_up(tab.chat, system, values)
        tab.chat.again(tab.chat.last_message())
        yield from speak(tab)
    except ValueError as error:
        yield refused(tab, error, gr.skip())


def speak(tab: Tab) -> Iterator[Shown]:
    """The answer that is due, until its end or until the tab stops it. Raises ValueError where there is no room."""
    session, tab.stopped, said = tab.chat.session, False, ""
    asked = list(session.turns)
    yield messages(asked), EMPTY, ""
    with closing(tab.chat.stream()) as pieces:
        for piece in pieces:
            said += piece
            yield messages([*asked, Turn("assistant", [said])]), gr.skip(), gr.skip()
            if tab.stopped:
                break
    full = f"; the context is full: the first {session.dropped} turns are no longer read" if session.dropped else ""
    yield messages(session.turns), gr.skip(), stats(tab.chat, "").replace("\n", " · ") + full
    session.read_ahead()  # the answer is shown; somebody types now


def undo(tab: Tab) -> Shown:
    """Take the last message and its answer back, into the field."""
    try:
        taken, *_ = tab.chat.session.undo()
    except ValueError as error:
        return refused(tab, error, gr.skip())
    files = [picture.info["path"] for picture in images_of([taken])]
    return messages(tab.chat.session.turns), {"text": words_of(taken), "files": files}, ""


def clear(tab: Tab) -> Shown:
    """Forget what was said, but not what is being typed: another tab's answer may come before this."""
    tab.chat.session.clear()
    return [], gr.skip(), ""


def halt(tab: Tab) -> None:
    """The token in hand is the answer's last."""
    tab.stopped = True


def refused(tab: Tab, error: ValueError, message: Any) -> Shown:
    """Say what is wrong; the conversation is as it was."""
    gr.Warning(escape(str(error)), title="Not sent")
    return messages(tab.chat.session.turns), message, ""


def set_up(chat: Chat, system: str, values: Sequence[object]) -> None:
    """Take the settings over. ValueError for one that means nothing."""
    settings = chat.settings
    for name, value in zip(NAMES, values, strict=True):
        settings = changed(settings, name, str(value))
    chat.settings = settings
    chat.begin_with(system.strip())


def uploaded(path: str) -> Image:
    """A picture that knows its file. Raises ValueError (BrokenPicture), which names it as its user does."""
    try:
        picture = open_picture(path)
    except BrokenPicture as error:  # where it lies on this machine is nobody's business
        raise BrokenPicture(str(error).replace(path, Path(path).name)) from error
    picture.info |= {"path": path, "name": Path(path).name}
    return picture


def messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """As gradio shows them; what the system says stands in a field of its own."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part} if isinstance(part, str) else {"path": part.info["path"]}
                for part in turn.content
            ],
        }
        for turn in turns
        if turn.role != "system"
    ]
