"""What people say to each other, with pictures in between: the one form that every data set is read into."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message. Pictures stand in `content` where they stand in the message: interleaving is Python's own order."""

    role: Role
    content: list[str | Image.Image]


@dataclass(frozen=True)
class Conversation:
    """A list of turns, and what it asks for: `caption`, the kind of a question (`existence`, `count`, …) or `chat`."""

    turns: list[Turn]
    kind: str = "chat"


@dataclass(frozen=True)
class Example:
    """All texts about the same pictures, one row of a batch. The pictures are the same objects in every conversation.

    `names` are the objects in the picture where a data set knows them; object naming is scored against it.
    """

    conversations: Sequence[Conversation]
    names: frozenset[str] = frozenset()


def images_of(turns: Sequence[Turn]) -> list[Image.Image]:
    """Every picture of a conversation, in reading order."""
    return [part for turn in turns for part in turn.content if isinstance(part, Image.Image)]


def asked_of(turns: Sequence[Turn]) -> list[str]:
    """What is said beside every picture, in its own turn: the instruction that an instruction-aware bridge reads."""
    said = [
        " ".join(part.strip() for part in turn.content if isinstance(part, str) and turn.role != "assistant").strip()
        for turn in turns
    ]
    return [words for turn, words in zip(turns, said, strict=True) for _ in images_of([turn])]


def ask(question: str, answer: str, picture: Image.Image, kind: str = "chat") -> Conversation:
    """The shortest conversation about a picture: the picture, a question, an answer."""
    return Conversation([Turn("user", [picture, question]), Turn("assistant", [answer])], kind)
