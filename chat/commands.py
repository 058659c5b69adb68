"""What a line means: a command, the path of a picture, or a message. /help is printed from `COMMANDS`."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL.Image import Image

from bridges.data.pictures import open_picture

if TYPE_CHECKING:  # torch comes with it, and the terminal says something before that is loaded
    from bridges.inference.decoding import Choose
    from bridges.inference.session import Session


@dataclass
class Chat:
    """A conversation, how it is answered, and the pictures that wait for its next message."""

    session: "Session"
    choose: "Choose"
    max_new_tokens: int
    pictures: list[Image] = field(default_factory=list)

    def attach(self, names: Sequence[object], pictures: Sequence[Image]) -> str:
        """Have the pictures wait; says what they are."""
        self.pictures += pictures
        slots = self.session.assembled.template.num_slots
        sizes = [f"{picture.width} × {picture.height}, {slots} slots" for picture in pictures]
        told = [f"{name} ({size})" for name, size in zip(names, sizes, strict=True)]
        return f"goes with your next message: {', '.join(told)}"


class Command(NamedTuple):
    """`run` gets what stands behind the command's name and returns what to tell the user."""

    run: Callable[[Chat, str], str]
    argument: str
    help: str


def image(chat: Chat, argument: str) -> str:
    """All of the pictures wait, or (ValueError) none does."""
    paths = paths_in(argument)
    if not paths:
        raise ValueError("/image needs the path of a picture, e.g. /image cat.png 'my dog.png'")
    return chat.attach(paths, [open_picture(path) for path in paths])


def clear(chat: Chat, _: str) -> str:
    chat.session.clear()
    chat.pictures.clear()
    return "forgotten: what was said, and every picture"


def help_text(_chat: Chat, _: str) -> str:
    usages = {f"{name} {command.argument}": command.help for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    return "\n".join(f"{usage:<{width}}  {meaning}" for usage, meaning in usages.items())


def leave(_chat: Chat, _: str) -> str:
    raise EOFError


COMMANDS = {
    "/image": Command(image, "PATH…", "attach pictures to the next message; a path with spaces goes in quotes"),
    "/clear": Command(clear, "", "forget what was said, and every picture"),
    "/help": Command(help_text, "", "this list"),
    "/exit": Command(leave, "", "leave, as Ctrl-D does; Ctrl-C only stops an answer"),
}


def obey(chat: Chat, line: str) -> str | None:
    """Do what a line (not empty) asks for and return what to tell the user; None where it is a message.

    A line of nothing but paths from the root, as a file manager drops them, is as if /image stood before them.
    Raises EOFError when the user wants to leave, ValueError with one line about what is wrong.
    """
    name, *argument = line.split(maxsplit=1)
    if name in COMMANDS:
        return COMMANDS[name].run(chat, "".join(argument))
    paths = paths_in(line)
    if all(path.is_absolute() and exists(path) for path in paths):
        return image(chat, line)
    if not name.startswith("/"):
        return None
    near = get_close_matches(name.lower(), COMMANDS, n=1)
    raise ValueError(f"no command {name}; " + (f"did you mean {near[0]}?" if near else "/help lists them"))


def paths_in(text: str) -> list[Path]:
    """Paths as a shell takes them: apart by spaces, spaces within them in quotes or behind a backslash, ~ for home.

    A text that is as a whole the name of a file is that file, whatever stands in it.
    """
    whole = Path(os.path.expanduser(text.strip()))  # noqa: PTH111  Path's own raises at a ~ without a user
    if text.strip() and exists(whole):
        return [whole]
    try:
        words = shlex.split(text)
    except ValueError:  # a lone quote is an apostrophe
        words = text.split()
    return [Path(os.path.expanduser(word)) for word in words]  # noqa: PTH111


def exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path's own raises at a message longer than a name may be
