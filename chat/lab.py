"""Is the picture used? Is another bridge better? Tried on the conversation at hand, which stays as it is."""

from collections.abc import Callable
from random import Random
from textwrap import wrap
from typing import TYPE_CHECKING

from PIL import Image

from bridges.data.conversation import Turn, images_of
from chat.paths import one_path
from chat.state import Chat

if TYPE_CHECKING:
    from bridges.inference.session import Session

TILES = 4
COLUMN = 38


def look(chat: Chat, _: str) -> str:
    """The same question three times, always with the likeliest token."""
    asked = up_to_last(chat)
    if not images_of(asked):
        raise ValueError("there is no picture in the conversation; /image PATH attaches one")
    said = {"as it is": asked, "blank": changed(asked, blank), "shuffled": changed(asked, shuffled)}
    answers = {what: likeliest(chat, chat.session.fork(), turns) for what, turns in said.items()}
    same = [what for what in ("blank", "shuffled") if answers[what] == answers["as it is"]]
    verdict = (
        f"the answer is the same with the pictures {' and '.join(same)}: they were not needed for it, or not used"
        if same
        else "the answer changes with the pictures: they are used"
    )
    return "\n".join([*(f"{what:<8}  {' '.join(answer.split())}" for what, answer in answers.items()), verdict])


def compare(chat: Chat, argument: str) -> str:
    """Both with the likeliest token."""
    from bridges.checkpoint import load
    from bridges.inference.session import Session
    from bridges.inference.swap import with_bridge

    folder, asked = one_path(argument, "/compare"), up_to_last(chat)
    ours = chat.session.assembled
    try:
        other = Session(with_bridge(ours, folder))
    except ValueError:  # not between these towers
        theirs = load(folder)
        theirs.model.to(ours.model.language.device)
        other = Session(theirs)
    here, there = likeliest(chat, chat.session.fork(), asked), likeliest(chat, other, asked)
    return beside(["this one", "", *wrap(here, COLUMN)], [str(folder), "", *wrap(there, COLUMN)])


def bridge(chat: Chat, argument: str) -> str:
    from bridges.inference.looking import Looker
    from bridges.inference.session import Session
    from bridges.inference.swap import with_bridge

    folder, before = one_path(argument, "/bridge"), chat.session
    assembled = with_bridge(before.assembled, folder)
    chat.session = Session(assembled, Looker(assembled, before.looker.features))
    chat.session.turns = before.turns
    name, shape = assembled.recipe.bridge["name"], assembled.model.bridge.shape()
    return f"{name} of {folder}, {shape}, answers from now on; what was said stays"


def up_to_last(chat: Chat) -> list[Turn]:
    """The conversation up to the last message."""
    last = chat.last_message()
    place = max(place for place, turn in enumerate(chat.session.turns) if turn is last)
    return chat.session.turns[: place + 1]


def likeliest(chat: Chat, session: "Session", turns: list[Turn]) -> str:
    session.turns = list(turns)
    return "".join(session.stream(chat.settings.max_new_tokens, stops=chat.settings.stops))


def changed(turns: list[Turn], change: Callable[[Image.Image], Image.Image]) -> list[Turn]:
    return [Turn(t.role, [part if isinstance(part, str) else change(part) for part in t.content]) for t in turns]


def blank(picture: Image.Image) -> Image.Image:
    return Image.new("RGB", picture.size, (128, 128, 128))


def shuffled(picture: Image.Image) -> Image.Image:
    """Its parts in another order: the colours are there, what they show is not."""
    wide, high = max(1, picture.width // TILES), max(1, picture.height // TILES)
    corners = [(x * wide, y * high) for y in range(TILES) for x in range(TILES)]
    parts = [picture.crop((x, y, x + wide, y + high)) for x, y in corners]
    Random(0).shuffle(parts)
    mixed = picture.copy()
    for corner, part in zip(corners, parts, strict=True):
        mixed.paste(part, corner)
    return mixed


def beside(left: list[str], right: list[str]) -> str:
    """Two columns of lines."""
    rows = max(len(left), len(right))
    left, right = (column + [""] * (rows - len(column)) for column in (left, right))
    return "\n".join(f"{a:<{COLUMN}}  {b}".rstrip() for a, b in zip(left, right, strict=True))
