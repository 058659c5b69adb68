"""What the language model has read, and points to which that can be rolled back."""

from collections.abc import Sequence
from copy import copy, deepcopy
from itertools import takewhile
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from bridges.data.template import IMAGE_TOKEN_ID
from bridges.inference.looking import Key
from bridges.towers.language import LanguageTower


class Mark(NamedTuple):
    """A point to which the cache can be rolled back: what was read and said up to there."""

    prompt: str = ""
    said: str = ""
    """What the assistant said after the prompt"""
    read: int = 0
    """Tokens in the cache"""
    unread: tuple[int, ...] = ()
    """Said, and not in the cache yet"""
    keys: tuple[Key, ...] = ()
    """Of the pictures so far"""
    logits: Tensor | None = None
    """After a prompt without an answer: what follows it"""

    def end_in(self, text: str) -> int | None:
        """Where it is in a text that begins so. A template may put a space before the words of a turn that the first
        of them took with it in the reply."""
        if not text.startswith(self.prompt):
            return None
        start = len(text) - len(text[len(self.prompt) :].lstrip(" "))
        return start + len(self.said) if text.startswith(self.said, start) else None


class Memory:
    """The cache, the tokens in it, for each the number of the last picture before (`looks`), and the marks."""

    def __init__(self, language: LanguageTower) -> None:
        self.language = language
        self.forget()

    def forget(self) -> None:
        """The next reply begins with reading the whole conversation."""
        self.cache: Any = self.language.empty_cache()
        self.ids: list[int] = []
        self.looks: list[int] = []
        self._keys: tuple[Key, ...] = ()
        self._marks: list[Mark] = []

    def add(self, ids: Sequence[int], looks: Sequence[int], keys: tuple[Key, ...]) -> None:
        """What the cache holds now beside what it held; `keys` are those of all pictures."""
        self.ids += ids
        self.looks += looks
        self._keys = keys

    def mark(self, mark: Mark) -> None:
        """Where an encoder reads everything at once there are no marks."""
        if not self.language.has_encoder:
            self._marks.append(mark)

    def latest(self, text: str, keys: tuple[Key, ...]) -> tuple[Mark, int]:
        """The latest point up to which the text and its pictures were read, and where in the text that is."""
        for mark in reversed(self._marks):
            if mark.keys != keys[: len(mark.keys)] or not (mark.read == len(self.looks) or self.can_roll_back()):
                continue
            if mark.logits is not None:
                if text == mark.prompt and keys == mark.keys:
                    return mark, len(text)
                continue
            end = mark.end_in(text)
            # Where nothing was said, and again nothing is new, it takes the logits of the mark before.
            if end is not None and (mark.unread or end < len(text)):
                return mark, end
        return Mark(), 0  # nothing was read that can be kept, or the template rewrites the past

    def further(self, mark: Mark, ids: Sequence[int], looks: Sequence[int], keys: tuple[Key, ...]) -> Mark:
        """How far what was read after a mark is what follows it now: same tokens, whole pictures; never all of it."""
        if not ids or self.language.has_encoder or not self.can_roll_back():
            return mark
        pictures, after = same(keys, self._keys), slice(mark.read, None)
        equal = min(same(ids, self.ids[after]), same(looks, self.looks[after]))
        more = min(equal, sum(look <= pictures for look in looks), len(ids) - 1)
        while more and ids[more] == IMAGE_TOKEN_ID and looks[more] == looks[more - 1]:
            more -= 1
        return Mark(read=mark.read + more, keys=keys[: looks[more - 1]]) if more else mark

    def roll_back(self, mark: Mark) -> None:
        """Forget what was read after a mark."""
        if not mark.read:
            self.forget()
        elif mark.read < len(self.looks):
            self.cache.crop(mark.read - len(self.looks))
            del self.ids[mark.read :], self.looks[mark.read :]
        self._marks = [one for one in self._marks if one.read <= mark.read]

    def fork(self) -> "Memory":
        """Another one that goes on by itself."""
        other = copy(self)
        other.cache, other._marks = forked(self.cache), list(self._marks)
        other.ids, other.looks = list(self.ids), list(self.looks)
        return other

    def can_roll_back(self, size: int = 0) -> bool:
        """Even with `size` tokens read. A layer with a window has forgotten what is out of its sight, from the first
        token beyond it on."""
        window = self.language.window
        return self.cache.is_croppable and (window is None or max(size, len(self.looks)) < window)


def same(one: Sequence[object], other: Sequence[object]) -> int:
    """How many they have in common at their beginning.

    >>> same("beginning", "begun")
    3
    """
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in equal)


def forked(cache: Cache) -> Cache:
    """Layers that grow by joining share their tensors until then."""
    if not all(isinstance(layer, DynamicLayer) for layer in getattr(cache, "layers", [None])):
        return deepcopy(cache)
    other: Any = copy(cache)
    other.layers = [copy(layer) for layer in other.layers]
    return other
