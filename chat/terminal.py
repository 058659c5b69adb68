"""The chat at a terminal, or at the end of a pipe."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import cast

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle
from rich.console import Console
from rich.text import Text

from bridges.data.conversation import Turn
from bridges.data.pictures import open_picture
from bridges.interrupt import interruptible
from chat.commands import COMMANDS, Chat, obey

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LAST_WORD = re.compile(r"""\s(?:(?P<quote>["'])(?P<quoted>[^"']*)|(?P<plain>(?:\\.|[^\s"'\\])*))$""")


def run(
    checkpoint: str,
    images: Sequence[str] = (),
    prompt: str | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> None:
    """Talk with the model of a checkpoint folder. `images` go with the first message; `prompt` is the only one.

    Without a terminal, lines are read from standard input, and nothing but the answers is written to standard output.
    Raises ValueError where the checkpoint, a picture, a setting or (with `prompt`) the length is wrong, and
    KeyboardInterrupt when there is no terminal at which to go on.
    """
    at_terminal = sys.stdin.isatty()
    to_reader = at_terminal and sys.stdout.isatty() and prompt is None
    console = Console(
        stderr=not to_reader,
        force_terminal=None if at_terminal else False,
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="replace")  # a terminal need not know every character
    pictures = [open_picture(path) for path in images]
    chat = load_chat(console, checkpoint, temperature, top_p, seed, max_new_tokens)
    notice = chat.attach(images, pictures)
    try:
        if prompt is not None:
            answer(chat, prompt)
            return
        if at_terminal:
            greet(chat, console)
        if images:
            console.print(notice, style="dim")
        talk(chat, typed(console) if at_terminal else piped(), console, goes_on=at_terminal)
    except BrokenPipeError:  # the reader of the answers, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_chat(
    console: Console, checkpoint: str, temperature: float, top_p: float, seed: int, max_new_tokens: int
) -> Chat:
    """The model, on the accelerator where there is one, while a spinner says what is loaded."""
    with console.status(Text(f"loading {checkpoint}")) as status:
        import torch  # takes seconds: the spinner turns already

        from bridges.checkpoint import load, read_config
        from bridges.inference.decoding import sampler
        from bridges.inference.session import Session

        choose = sampler(temperature, top_p, seed)
        towers = read_config(Path(checkpoint))["towers"]
        status.update(Text(f"loading {checkpoint}: {towers['vision']['name']} and {towers['language']['name']}"))
        assembled = load(checkpoint)
        assembled.model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        return Chat(Session(assembled), choose, max_new_tokens)


def greet(chat: Chat, console: Console) -> None:
    model, _, recipe = chat.session.assembled
    towers = f"{model.vision.name} and {model.language.name}"
    console.print(f"{recipe.bridge['name']} between {towers}, {model.bridge.num_slots} slots an image")
    console.print("/image PATH shows it a picture, /help lists what else there is", style="dim")


def talk(chat: Chat, lines: Iterable[str], console: Console, goes_on: bool = False) -> None:
    """Obey and answer line by line. An error is a line, never the end; Ctrl-C is the end unless the talk `goes_on`."""
    for line in lines:
        if not line.strip():
            continue
        told: str | None = ""
        try:
            told = obey(chat, line)
            if told is None:
                answer(chat, line.strip())
            else:
                console.print(told, style="dim")
        except EOFError:
            return
        except ValueError as error:
            not_sent = "" if told is not None else "; it was not sent (/clear forgets what was said, and every picture)"
            console.print(f"{error}{not_sent}", style="red")
        except KeyboardInterrupt:
            if not goes_on:
                raise
            console.print("\n(stopped)", style="dim")


def answer(chat: Chat, text: str) -> None:
    """Print the reply to a message as it comes.

    Raises ValueError where it does not fit the context (nothing was said then, and the pictures still wait), and
    KeyboardInterrupt when Ctrl-C broke it off (what was said by then stays in the conversation).
    """
    with interruptible() as stop:
        chat.session.append(Turn("user", [*chat.pictures, text]))
        pieces = chat.session.stream(chat.max_new_tokens, chat.choose)
        for piece in pieces:
            chat.pictures.clear()  # they are in the conversation now
            print(CONTROL.sub("", piece), end="", flush=True)  # no model may steer the terminal
            if stop.asked:
                pieces.close()
                raise KeyboardInterrupt
    print(flush=True)


def piped() -> Iterator[str]:
    with open(sys.stdin.fileno(), encoding="utf-8-sig", errors="replace", closefd=False) as lines:
        yield from lines


def typed(console: Console) -> Iterator[str]:
    """Lines from the keyboard, until Ctrl-D, or Ctrl-C twice."""
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
        try:
            line = session.prompt()
        except EOFError:
            return
        except KeyboardInterrupt:
            if leaving:
                return
            leaving = True
            console.print("Ctrl-C again leaves, and so does Ctrl-D", style="dim")
        else:
            leaving = False
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
    """Commands; after /image, paths."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        word = LAST_WORD.search(text)
        if not re.search(r"\s", text):
            yield from (Completion(f"{name} ", -len(text)) for name in COMMANDS if name.startswith(text))
        elif word and text.split()[0] == "/image":
            quoted = word["quote"] is not None
            begun = word["quoted"] if quoted else re.sub(r"\\(.)", r"\1", word["plain"])
            for found in PathCompleter(expanduser=True).get_completions(Document(begun), complete_event):
                rest = found.text + ("/" if found.display_text.endswith("/") else "")
                yield Completion(rest if quoted else re.sub(r"([\s'\"\\])", r"\\\1", rest), display=found.display)
