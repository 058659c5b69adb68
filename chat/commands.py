"""What a line means: a command, the path of a picture, or a message. /help is printed from `COMMANDS`."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

from bridges.data.conversation import Turn, images_of
from bridges.inference.settings import NAMES, changed
from chat.files import export, load, save
from chat.lab import bridge, compare, look
from chat.paths import exists, interleaved, opened, paths_in
from chat.show import history, stats, tokens
from chat.state import Chat, words_of


class Command(NamedTuple):
    """`run` gets what stands behind the command's name and returns what to tell the user; None: an answer is due."""

    run: Callable[[Chat, str], str | None]
    argument: str
    help: str


def image(chat: Chat, argument: str) -> str:
    """All of the pictures wait, or (ValueError) none does."""
    paths = paths_in(argument)
    if not paths:
        raise ValueError("/image needs the path of a picture, e.g. /image cat.png 'my dog.png'")
    return chat.attach(paths, [opened(path) for path in paths])


def images(chat: Chat, _: str) -> str:
    waiting = len(chat.pictures)
    every = chat.all_pictures()
    lines = [
        f"{number}  {chat.told(picture)}{', goes with your next message' if number > len(every) - waiting else ''}"
        for number, picture in enumerate(every, 1)
    ]
    return "\n".join(lines) or "no pictures yet; /image PATH attaches one"


def drop(chat: Chat, argument: str) -> str:
    every = chat.all_pictures()
    if not argument.strip().isdecimal() or not 1 <= int(argument) <= len(every):
        raise ValueError(f"/drop needs the number of a picture, 1 to {len(every)}: /images lists them")
    gone = every[int(argument) - 1]
    if any(gone is picture for picture in chat.pictures):
        chat.pictures = [picture for picture in chat.pictures if picture is not gone]
    for place, turn in enumerate(chat.session.turns):
        left = [part for part in turn.content if part is not gone]
        chat.session.turns[place] = Turn(turn.role, left)
    return f"no longer in the conversation: {chat.told(gone)}"


def system(chat: Chat, argument: str) -> str:
    if argument:
        chat.begin_with(argument)
        return "the conversation begins with that now"
    first = chat.session.turns[:1]
    own = first and first[0].role == "system"
    given = words_of(first[0]) if own else chat.session.assembled.template.system
    return f"system: {given}" if given else "no system text; /system TEXT gives one"


def set_value(chat: Chat, argument: str) -> str:
    name, _, value = argument.strip().replace("=", " ", 1).partition(" ")
    if name:
        chat.settings = changed(chat.settings, name, value.strip())
    shown = [name] if name else list(NAMES)
    return "\n".join(f"{name} = {getattr(chat.settings, name)}" for name in shown)


def undo(chat: Chat, _: str) -> str:
    taken, *_rest = chat.session.undo()
    return f"taken back: {words_of(taken)[:60]}" + (" and its pictures" if images_of([taken]) else "")


def retry(chat: Chat, _: str) -> None:
    chat.again(chat.last_message())


def edit(chat: Chat, argument: str) -> str | None:
    """Without a text, the last message is put into the next line, to be changed there."""
    last = chat.last_message()
    if not argument:
        chat.draft = f"/edit {words_of(last)}"
        return "change it and press Enter; from a pipe: /edit TEXT"
    chat.again(Turn("user", [*images_of([last]), *interleaved(argument)]))
    return None


def multiline(chat: Chat, _: str) -> str:
    chat.lines = []
    return "the next lines are one message; a line with nothing but a dot ends it"


def clear(chat: Chat, _: str) -> str:
    kept = [turn for turn in chat.session.turns[:1] if turn.role == "system"]
    chat.session.clear()
    chat.session.turns = kept
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
    "/images": Command(images, "", "the pictures so far; @PATH amid a message puts one right there"),
    "/drop": Command(drop, "N", "take a picture out"),
    "/system": Command(system, "[TEXT]", "show or change what the conversation begins with"),
    "/set": Command(set_value, "[NAME VALUE]", f"show or change {', '.join(NAMES)}"),
    "/undo": Command(undo, "", "take back the last message and its answer"),
    "/retry": Command(retry, "", "another answer to the last message; it differs where temperature is above 0"),
    "/edit": Command(edit, "[TEXT]", "change the last message and ask again, with its pictures"),
    "/multiline": Command(multiline, "", "write a message of several lines"),
    "/save": Command(save, "FILE", "keep the conversation, with its pictures"),
    "/load": Command(load, "FILE", "go on with one that was saved"),
    "/export": Command(export, "FILE", "write it as .md, or as .json of LLaVA's form to train on; pictures beside it"),
    "/history": Command(history, "", "what was said"),
    "/tokens": Command(tokens, "", "where the context goes"),
    "/stats": Command(stats, "", "what the last answer cost, and what was known already"),
    "/look": Command(look, "", "ask the last message with its pictures blank and shuffled: are they used?"),
    "/compare": Command(compare, "CHECKPOINT", "how another checkpoint answers the last message"),
    "/bridge": Command(bridge, "CHECKPOINT", "go on with another bridge between the same towers"),
    "/clear": Command(clear, "", "forget what was said, and every picture"),
    "/help": Command(help_text, "", "this list"),
    "/exit": Command(leave, "", "leave, as Ctrl-D does; Ctrl-C only stops an answer"),
}


def obey(chat: Chat, line: str) -> str | None:
    """Do what a line asks for and return what to tell the user; None where an answer is due.

    A line of nothing but paths from the root, as a file manager drops them, is as if /image stood before them.
    Raises EOFError when the user wants to leave, ValueError with one line about what is wrong.
    """
    if chat.lines is not None:
        return gather(chat, chat.lines, line)
    if not line.strip():
        return ""
    name, *argument = line.split(maxsplit=1)
    if name in COMMANDS:
        try:
            return COMMANDS[name].run(chat, "".join(argument).strip())
        except OSError as error:
            raise ValueError(f"{name}: {error.strerror or error}") from error
    if all(path.is_absolute() and exists(path) for path in paths_in(line)):
        return image(chat, line)
    if name.startswith("/"):
        near = get_close_matches(name.lower(), COMMANDS, n=1)
        raise ValueError(f"no command {name}; " + (f"did you mean {near[0]}?" if near else "/help lists them"))
    chat.message(line.strip())
    return None


def gather(chat: Chat, lines: list[str], line: str) -> str | None:
    """One more line of a message, or its end."""
    if line.strip() != ".":
        lines.append(line.rstrip("\r\n"))
        return ""
    chat.lines = None
    text = "\n".join(lines).strip()
    if not text:
        return "nothing was written"
    chat.message(text)
    return None
