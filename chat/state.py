"""What a chat at a terminal has beside the conversation: settings, pictures that wait, a message in the making."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from PIL.Image import Image

from bridges.data.conversation import Turn, images_of
from bridges.inference.settings import Settings
from chat.paths import interleaved

if TYPE_CHECKING:  # torch comes with it, and the terminal says something before that is loaded
    from collections.abc import Generator

    from bridges.inference.session import Session


@dataclass
class Chat:
    """A conversation, how it is answered, and the pictures that wait for its next message."""

    session: "Session"
    settings: Settings = field(default_factory=Settings)
    pictures: list[Image] = field(default_factory=list)
    lines: list[str] | None = None
    """Of a message of several lines, while it is written"""
    draft: str = ""
    """What stands in the next line to begin with"""
    answers: int = 0
    """Each is drawn otherwise"""
    before: list[Turn] = field(default_factory=list)
    """The conversation as it was, should nothing come of an answer"""

    def attach(self, names: Sequence[object], pictures: Sequence[Image]) -> str:
        """Have the pictures wait; says what they are."""
        for name, picture in zip(names, pictures, strict=True):
            picture.info["name"] = str(name)
        self.pictures += pictures
        return f"goes with your next message: {', '.join(self.told(picture) for picture in pictures)}"

    def told(self, picture: Image) -> str:
        """Its name, its size, and how many places in the text it takes."""
        template = self.session.assembled.template
        slots = template.num_slots * len(template.images([Turn("user", [picture])]))
        return f"{name_of(picture)} ({picture.width} × {picture.height}, {slots} slots)"

    def message(self, text: str) -> None:
        """Say something, with the pictures that wait and those that stand in it; an answer is due then."""
        self.ask(Turn("user", [*self.pictures, *interleaved(text)]))

    def ask(self, turn: Turn) -> None:
        """Say this; an answer is due then."""
        self.before = list(self.session.turns)
        self.session.append(turn)

    def again(self, turn: Turn) -> None:
        """Ask this instead of the last message."""
        before = list(self.session.turns)
        self.session.undo()
        self.session.append(turn)
        self.before = before

    def begin_with(self, system: str) -> None:
        """Have the conversation begin with this text, or with none of its own."""
        turns = self.session.turns
        rest = turns[bool(turns) and turns[0].role == "system" :]
        turns[:] = [*([Turn("system", [system])] if system else []), *rest]

    def stream(self) -> "Generator[str, None, None]":
        """The answer that is due. Where not a word comes of it, the conversation is as it was."""
        said = False
        self.answers += 1
        try:
            chosen = self.settings.chooser(self.answers - 1)
            for piece in self.session.stream(self.settings.max_new_tokens, chosen, self.settings.stops):
                if not said:
                    self.pictures.clear()  # they are in the conversation now
                said = True
                yield piece
        finally:
            if not said:
                self.session.turns[:] = self.before

    def all_pictures(self) -> list[Image]:
        """Those in the conversation, and those that wait."""
        return [*images_of(self.session.turns), *self.pictures]

    def last_message(self) -> Turn:
        """What was asked last. ValueError where nothing was."""
        asked = [turn for turn in self.session.turns if turn.role == "user"]
        if not asked:
            raise ValueError("nothing was asked yet; write a message first")
        return asked[-1]


def name_of(picture: Image) -> str:
    return str(picture.info.get("name", "picture"))


def words_of(turn: Turn) -> str:
    """Without its pictures."""
    return "".join(part for part in turn.content if isinstance(part, str))
