"""The chat at a terminal, or at the end of a pipe."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.text import Text

from bridges.data.conversation import Turn
from bridges.data.pictures import open_picture
from bridges.inference.settings import Settings
from bridges.interrupt import interruptible
from chat.commands import obey
from chat.keyboard import typed
from chat.show import model_line, thumbnail
from chat.state import Chat

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def run(
    checkpoint: str,
    images: Sequence[str] = (),
    prompt: str | None = None,
    settings: Settings | None = None,
    system: str | None = None,
    as_json: bool = False,
) -> None:
    """Talk with the model of a checkpoint folder. `images` go with the first message; `prompt` is the only one.

    Without a terminal, lines are read from standard input, and nothing but the answers is written to standard output:
    as text, or each as a line of JSON with what it cost.
    Raises ValueError where the checkpoint, a picture, a setting or (with `prompt`) the length is wrong, and
    KeyboardInterrupt when there is no terminal at which to go on.
    """
    at_terminal = sys.stdin.isatty()
    to_reader = at_terminal and sys.stdout.isatty() and prompt is None
    colours = None if at_terminal else False
    console = Console(stderr=not to_reader, force_terminal=colours, markup=False, highlight=False, soft_wrap=True)
    cast(TextIOWrapper, sys.stdout).reconfigure(errors="replace")  # a terminal need not know every character
    pictures = [open_picture(path) for path in images]
    chat = load_chat(console, checkpoint, settings or Settings())
    if system:
        chat.session.append(Turn("system", [system]))
    notice = chat.attach(images, pictures)
    say = answer_json if as_json else answer
    try:
        if prompt is not None:
            chat.message(prompt)
            say(chat)
            return
        if at_terminal:
            greet(chat, console)
        if images:
            console.print(notice, style="dim")
        talk(chat, typed(console, chat) if at_terminal else piped(), console, at_terminal, say)
    except BrokenPipeError:  # the reader of the answers, `head` for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_chat(console: Console, checkpoint: str, settings: Settings) -> Chat:
    """The model, on the accelerator where there is one, while a spinner says what is loaded."""
    with console.status(Text(f"loading {checkpoint}")) as status:
        # torch comes with them, which takes seconds: the spinner turns already
        from bridges.checkpoint import load
        from bridges.inference.session import Session
        from bridges.saved import read_config

        towers = read_config(Path(checkpoint))["towers"]
        status.update(Text(f"loading {checkpoint}: {towers['vision']['name']} and {towers['language']['name']}"))
        return Chat(Session(load(checkpoint)), settings)


def greet(chat: Chat, console: Console) -> None:
    console.print(model_line(chat.session.assembled))
    console.print("/image PATH shows it a picture, /help lists what else there is", style="dim")


def talk(
    chat: Chat,
    lines: Iterable[str],
    console: Console,
    goes_on: bool = False,
    say: Callable[[Chat], None] | None = None,
) -> None:
    """Obey and answer line by line. An error is a line, never the end; Ctrl-C is the end unless the talk `goes_on`.

    Where it does, somebody reads the answer and types: what the next message begins with is read meanwhile.
    """
    for line in lines:
        told: str | None = ""
        shown, dropped = list(chat.pictures), chat.session.dropped
        try:
            told = obey(chat, line)
            if told is None:
                (say or answer)(chat)
            elif told:
                console.print(CONTROL.sub("", told), style="dim")
            for picture in chat.pictures if console.is_terminal and console.color_system else []:
                if not any(picture is known for known in shown):
                    console.print(thumbnail(picture), end="")
            if chat.session.dropped > dropped:
                first = f"the first {chat.session.dropped} turns are no longer read; their pictures are"
                console.print(f"the context is full: {first}", style="dim")
            if goes_on and told is None:
                with interruptible():  # a Ctrl-C that came too late to stop the answer stops nothing else
                    chat.session.read_ahead()
        except EOFError:
            return
        except ValueError as error:
            not_sent = "" if told is not None else "; it was not sent (/clear forgets what was said, and every picture)"
            console.print(f"{CONTROL.sub('', str(error))}{not_sent}", style="red")
        except KeyboardInterrupt:
            if not goes_on:
                raise
            console.print("\n(stopped)", style="dim")


def answer(chat: Chat) -> None:
    """Print the answer that is due, as it comes.

    Raises ValueError where it does not fit the context (nothing was said then, and the pictures still wait), and
    KeyboardInterrupt when Ctrl-C broke it off (what was said by then stays in the conversation).
    """
    with interruptible() as stop:
        pieces = chat.stream()
        for piece in pieces:
            print(CONTROL.sub("", piece), end="", flush=True)  # no model may steer the terminal
            if stop.asked:
                pieces.close()
                raise KeyboardInterrupt
    print(flush=True)


def answer_json(chat: Chat) -> None:
    """Print the answer that is due as one line of JSON, with what it cost. Raises as `answer`."""
    said = "".join(chat.stream())
    print(json.dumps({"answer": said, **asdict(chat.session.spent)}, ensure_ascii=False), flush=True)


def piped() -> Iterator[str]:
    with open(sys.stdin.fileno(), encoding="utf-8-sig", errors="replace", closefd=False) as lines:
        yield from lines
