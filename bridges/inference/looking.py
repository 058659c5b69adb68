"""What the model makes of pictures: computed once for each picture and what is asked about it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.build import Assembled
from bridges.inference.features import Features, key

MOST = 64  # pictures whose slots, keys and values are kept on the device

Key = tuple[bytes, str]
"""What is in a picture, and what is asked about it where the bridge reads that."""


class Seen(NamedTuple):
    """Pictures as the language model gets them: slots, and by layer the keys and values that blocks look at."""

    slots: Float[Tensor, "n k d"]
    kept: Mapping[str, tuple[Float[Tensor, "n h m c"], Float[Tensor, "n h m c"]]]


class Looker:
    """The tower encodes a picture once and the bridge works on it once, however often it comes again.

    Of what the bridge makes the latest `MOST` pictures are kept. `hits` counts pictures that were known.
    """

    def __init__(self, assembled: Assembled, features: Features | None = None) -> None:
        self.model = assembled.model
        self.features = features or Features(assembled)
        self.hits = 0
        self._nothing = self._look([], [])
        self._known: dict[Key, Seen] = {}
        self._named: list[tuple[Image.Image, bytes]] = []

    def keys(self, pictures: Sequence[Image.Image], asked: Sequence[str] = ()) -> list[Key]:
        """The same for what looks the same. Of a picture that was there in the last call the content is not read."""
        named = {id(picture): name for picture, name in self._named}
        self._named = [(picture, named.get(id(picture)) or key(picture)) for picture in pictures]
        return [(name, words) for (_, name), words in zip(self._named, asked or [""] * len(pictures), strict=True)]

    def __call__(self, pictures: Sequence[Image.Image], keys: Sequence[Key]) -> Seen:
        """What the model makes of pictures with these `keys`."""
        new = {k: picture for k, picture in zip(keys, pictures, strict=True) if k not in self._known}
        self.hits += len(pictures) - len(new)
        if new:
            seen = self._look(list(new.values()), [words for _, words in new])
            self._known.update((k, of(seen, slice(place, place + 1))) for place, k in enumerate(new))
        found = [self._known[k] for k in keys]
        for k in dict.fromkeys(keys):  # the latest stand last
            self._known[k] = self._known.pop(k)
        while len(self._known) > max(MOST, len(keys)):
            del self._known[next(iter(self._known))]
        return join([self._nothing, *found])

    @torch.no_grad()
    def _look(self, pictures: Sequence[Image.Image], asked: Sequence[str]) -> Seen:
        blocks: Any = self.model.bridge.blocks
        slots, memory = self.model.see(features=self.features(pictures), asked=asked)
        return Seen(slots, {name: block.keys_values(memory) for name, block in blocks.items()})


def of(seen: Seen, places: slice) -> Seen:
    """Some of the pictures."""
    return Seen(seen.slots[places], {name: (k[places], v[places]) for name, (k, v) in seen.kept.items()})


def join(parts: Sequence[Seen]) -> Seen:
    """The pictures of all parts, one after another."""
    kept = {
        name: (torch.cat([part.kept[name][0] for part in parts]), torch.cat([part.kept[name][1] for part in parts]))
        for name in parts[0].kept
    }
    return Seen(torch.cat([part.slots for part in parts]), kept)
