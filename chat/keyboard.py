"""Lines from the keyboard: with a history, and completion of commands, settings and paths."""

import re
from collections.abc import Iterator

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console

from bridges.inference.settings import NAMES
from chat.commands import COMMANDS
from chat.state import Chat

LAST_WORD = re.compile(r"""(?:^|\s)(?P<at>@?)(?:(?P<quote>["'])(?P<quoted>[^"']*)|(?P<plain>(?:\\.|[^\s"'\\])*))$""")
TAKE_PATHS = {"/image", "/save", "/load", "/export", "/compare", "/bridge"}


def typed(console: Console, chat: Chat | None = None) -> Iterator[str]:
    """Lines from the keyboard, until Ctrl-D, or Ctrl-C twice. The `chat` may have begun the next one."""
    session = PromptSession(
        "> ",
        history=history(),
        completer=Completions(),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        output=create_output(always_prefer_tty=True),
    )
    leaving = False
    while True:
        draft, going_on = (chat.draft, chat.lines is not None) if chat else ("", False)
        try:
            line = session.prompt("… " if going_on else "> ", default=draft)
        except EOFError:
            return
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = True
            if chat:
                chat.draft = ""
            console.print("Ctrl-C again leaves, and so does Ctrl-D", style="dim")
        else:
            leaving = False
            if chat:
                chat.draft = ""
            yield line


def history() -> History:
    """What was typed in earlier chats."""
    try:
        path = user_state_path("mm-bridges", ensure_exists=True) / "history"
        path.touch(mode=0o600)
    except OSError:  # a home that cannot be written costs the history, not the chat
        return InMemoryHistory()
    return FileHistory(path)


class Completions(Completer):
    """Commands; after one of TAKE_PATHS and after an @, paths; after /set, settings."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        word = LAST_WORD.search(text)
        command = text.split()[0] if text.split() else ""
        if not re.search(r"\s", text) and not text.startswith("@"):
            yield from (Completion(f"{name} ", -len(text)) for name in COMMANDS if name.startswith(text))
        elif command == "/set" and len(text.split(" ")) == 2:
            begun = text.split(" ")[1]
            yield from (Completion(f"{name} ", -len(begun)) for name in NAMES if name.startswith(begun))
        elif word and (command in TAKE_PATHS or (word["at"] and command not in COMMANDS)):
            quoted = word["quote"] is not None
            begun = word["quoted"] if quoted else re.sub(r"\\(.)", r"\1", word["plain"])
            for found in PathCompleter(expanduser=True).get_completions(Document(begun), complete_event):
                rest = found.text + ("/" if found.display_text.endswith("/") else "")
                yield Completion(rest if quoted else re.sub(r"([\s'\"\\])", r"\\\1", rest), display=found.display)
