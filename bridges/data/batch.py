"""Rows of a batch: all texts about the same pictures share them, and each other's sight of nothing else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from bridges.data.conversation import Example
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID, Encoded, Template

Preprocess = Callable[[list[Image.Image]], Float[Tensor, "n 3 y x"]]


@dataclass(frozen=True)
class Row:
    """One row before padding. Segment 0 is shared by its texts, segments 1, 2, … are the texts themselves."""

    ids: list[int]
    labels: list[int]
    segments: list[int]
    positions: list[int]
    images: list[Image.Image]
    asked: list[str] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)


@dataclass
class Batch:
    """Rows side by side; `segments` is -1 in padding. All pictures in reading order, as pixels or as features.

    `asked` is what is asked about each picture, where the bridge reads that. `looks` is the number of the last picture
    before each position, in its own text: 1 is the batch's first, 0 none.
    """

    input_ids: Int[Tensor, "b t"]
    labels: Int[Tensor, "b t"]
    segments: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    pixel_values: Float[Tensor, "n 3 y x"] | None = None
    features: Float[Tensor, "n p v"] | None = None
    asked: list[str] = field(default_factory=list)
    looks: Int[Tensor, "b t"] | None = None

    def to(self, device: torch.device) -> "Batch":
        moved: dict[str, Any] = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in vars(self).items()}
        return Batch(**moved)

    @property
    def num_targets(self) -> int:
        return int((self.labels != IGNORE_INDEX).sum())


def pack(texts: Sequence[Encoded]) -> Row:
    """Texts that begin alike become one row: their common beginning once, then what is each one's own.

        <user> PPPP Is it a cat? <assistant> Yes.        segments   0 0000 1 1 1 1 1 1  2 2 2 2 2
        <user> PPPP Name it.     <assistant> A cat.      positions  0 1234 5 6 7 8 9 10 5 6 7 8 9

    Positions of every text go on where the shared beginning ends, so a text is computed as if it stood alone.
    """
    shared = common_beginning(texts) if len(texts) > 1 else 0
    first = texts[0]
    ids, labels = first.ids[:shared], first.labels[:shared]
    segments, positions = [0] * shared, list(range(shared))
    images = images_within(first, shared)
    taken, asked, looks = len(images), first.asked[: len(images)], first.looks[:shared]
    for number, text in enumerate(texts, start=1):
        own = len(text.ids) - shared
        ids, labels = ids + text.ids[shared:], labels + text.labels[shared:]
        segments, positions = segments + [number] * own, positions + list(range(shared, shared + own))
        # its own pictures stand after those of the texts before
        looks = looks + [look + (len(images) - taken) * (look > taken) for look in text.looks[shared:]]
        images, asked = images + text.images[taken:], asked + text.asked[taken:]
    if len(texts) == 1:  # a plain row: all of it is one text, and all of it may be anyone's constant prefix
        segments = [0] * len(ids)
    return Row(ids, labels, segments, positions, images, asked, looks)


def common_beginning(texts: Sequence[Encoded]) -> int:
    """How many first tokens, pictures compared by identity, all texts share; each keeps at least one of its own."""
    keyed = [picture_keys(text) for text in texts]
    longest = min(len(key) for key in keyed) - 1
    for place in range(longest):
        if any(key[place] != keyed[0][place] for key in keyed) or any(t.labels[place] != IGNORE_INDEX for t in texts):
            return place
    return longest


def picture_keys(text: Encoded) -> list[tuple[int, int, str]]:
    """The ids, each with the picture that it looks at, by identity, and what its bridge reads beside that."""
    asked = text.asked or [""] * len(text.images)
    seen = [(0, ""), *((id(image), words) for image, words in zip(text.images, asked, strict=True))]
    return [(token, *seen[look]) for token, look in zip(text.ids, text.looks, strict=True)]


def images_within(text: Encoded, length: int) -> list[Image.Image]:
    """The pictures that the first `length` tokens look at."""
    return text.images[: max(text.looks[:length], default=0)]


def rows_of(example: Example, template: Template, max_length: int | None = None, share: bool = True) -> list[Row]:
    """The row of an example; one row for each text where the language model cannot share."""
    texts = [without_tail(shorten(template.encode(c.turns), max_length)) for c in example.conversations]
    return [pack(texts)] if share else [pack([text]) for text in texts]


def without_tail(text: Encoded) -> Encoded:
    """Nothing is learned from what stands after the last target, so it is not computed."""
    last = max((place for place, label in enumerate(text.labels) if label != IGNORE_INDEX), default=len(text.ids) - 1)
    return cut(text, last + 1)


def shorten(text: Encoded, max_length: int | None) -> Encoded:
    """Cut what is too long at its end; a picture that would be cut through goes whole.

    Raises ValueError, with the numbers, where pictures go and no target is left.
    """
    if max_length is None or len(text.ids) <= max_length:
        return text
    length = max_length
    while text.ids[max_length] == IMAGE_TOKEN_ID and length and text.looks[length - 1] == text.looks[max_length]:
        length -= 1
    short = cut(text, length)
    if len(short.images) < len(text.images) and set(short.labels) <= {IGNORE_INDEX}:
        raise ValueError(
            f"a text of {len(text.ids)} tokens has pictures beyond max_length {max_length}; "
            "raise data.max_length, or choose a bridge with fewer slots"
        )
    return short


def cut(text: Encoded, length: int) -> Encoded:
    """Its first tokens, and the pictures that they look at."""
    images = images_within(text, length)
    ids, labels, looks = text.ids[:length], text.labels[:length], text.looks[:length]
    return Encoded(ids, labels, images, text.asked[: len(images)], looks)


def collate(rows: Sequence[Row], preprocess: Preprocess | None = None, left: bool = False, share: bool = True) -> Batch:
    """Rows padded to the longest: on the right for training; for generation on the left, so that all end together.

    Left padding stands after the text that all rows begin with, which can then be computed once for all; in front of
    everything where the language model cannot `share`.
    """
    width = max(len(row.ids) for row in rows)
    begin = common_text([row.ids for row in rows]) if left and share else 0

    def padded(values: list[list[int]], fill: int) -> Tensor:
        gaps = [[fill] * (width - len(v)) for v in values]
        if left:
            return torch.tensor([v[:begin] + g + v[begin:] for g, v in zip(gaps, values, strict=True)])
        return torch.tensor([v + g for g, v in zip(gaps, values, strict=True)])

    return Batch(
        input_ids=padded([r.ids for r in rows], 0),
        labels=padded([r.labels for r in rows], IGNORE_INDEX),
        segments=padded([r.segments for r in rows], -1),
        positions=padded([r.positions for r in rows], 0),
        pixel_values=preprocess([image for row in rows for image in row.images]) if preprocess else None,
        asked=[words for row in rows for words in row.asked],
        looks=padded(numbered(rows), 0),
    )


def numbered(rows: Sequence[Row]) -> list[list[int]]:
    """Looks of all rows, with the pictures counted through the whole batch."""
    before = [0, *accumulate(len(row.images) for row in rows)]
    return [[look + n * (look > 0) for look in row.looks] for row, n in zip(rows, before, strict=False)]


def common_text(ids: Sequence[list[int]]) -> int:
    """How many first tokens all have in common, up to the first picture."""
    for place, tokens in enumerate(zip(*ids, strict=False)):
        if len(set(tokens)) > 1 or tokens[0] == IMAGE_TOKEN_ID:
            return place
    return min(len(row) for row in ids)
