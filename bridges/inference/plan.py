"""What a reply takes, and what it took."""

from dataclasses import dataclass
from typing import NamedTuple

from bridges.data.conversation import Turn
from bridges.inference.looking import Key
from bridges.inference.memory import Mark


class Plan(NamedTuple):
    """What has to be read before the reply, and after what."""

    mark: Mark
    ids: list[int]
    looks: list[int]
    """The number of the last picture before each id"""
    text: str
    turns: list[Turn]
    keys: tuple[Key, ...]

    @property
    def size(self) -> int:
        """Tokens of the whole prompt."""
        return self.mark.read + len(self.ids)


class Known(NamedTuple):
    """Tokens of a conversation: of all of it, of those `kept` from before, and of what would be `lost` in exchange."""

    size: int
    kept: int
    lost: int


@dataclass
class Spent:
    """What a reply cost: tokens `read` and `kept` from before, `said`, pictures `encoded` by the tower and `reused`,
    seconds to the `first` token and in all; and whether the reply `ended` by itself, or was cut off."""

    read: int = 0
    kept: int = 0
    said: int = 0
    encoded: int = 0
    reused: int = 0
    first: float = 0.0
    seconds: float = 0.0
    ended: bool = False
