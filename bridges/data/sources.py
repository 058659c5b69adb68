"""Which data a recipe means, and which part of it is held out."""

from dataclasses import replace

from bridges.config import Data
from bridges.data.conversation import Example
from bridges.data.formats import Rows
from bridges.data.formats.remote import place_of
from bridges.data.pictures import MapStyle
from bridges.data.prefix import Prefixed

HELD_OUT = 0.05
MOST_HELD_OUT = 500
CAPTIONS, QUESTIONS = 4, 3  # of a held-out picture: captions to compare with, questions of several kinds


class Part:
    """A stretch of another data set."""

    def __init__(self, rows: MapStyle[Example], first: int, last: int) -> None:
        self.rows, self.first, self.last = rows, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> Example:
        return self.rows[self.first + range(len(self))[index]]


def told(source: str, rows: MapStyle[Example]) -> str:
    """One line for people: how many examples there are, and what is held out."""
    part = rows.rows if isinstance(rows, Prefixed) else rows
    if not isinstance(part, Part):
        return f"{source}: {len(rows)} examples"
    if part.first:
        return f"{source}: the last {len(part)} of {len(part.rows)} examples, which training leaves out"
    return f"{source}: the first {len(part)} of {len(part.rows)} examples; the others are held out to measure on"


def open_split(data: Data, split: str) -> MapStyle[Example]:
    """`train`, `val`, `test` where the data name one; for `scenes` and `scenes:documents` also `val_pairs` and
    `val_sprites`. Data that name a split for validation keep it; of others the last rows are held out.

    Raises ValueError: no such split, or data too small to hold anything out.
    """
    if data.prefix and split == "train":  # held-out captions stay whole
        return Prefixed(open_split(replace(data, prefix=False), split))
    if data.source in ("scenes", "scenes:documents"):
        return open_scenes(data, split)
    if split not in ("train", "val", "test"):
        raise ValueError(f"no split {split!r} of {data.source}; there are train and val")
    images = place_of(data.images) if data.images else None
    if data.validation and split == "val":
        return Rows(data.validation, images, data.prompts, layout=data.format)
    rows = Rows(data.source, images, data.prompts, layout=data.format)
    if split == "test" or {split, "train", "val"} <= rows.splits:
        return rows.only(split)
    if "train" in rows.splits:
        rows = rows.only("train")
    if data.validation:
        return rows
    if len(rows) < 2:
        raise ValueError(f"{data.source} has {len(rows)} example; at least 2 are needed, one of them to be held out")
    border = len(rows) - min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(rows))))
    return Part(rows, 0, border) if split == "train" else Part(rows, border, len(rows))


def open_scenes(data: Data, split: str) -> MapStyle[Example]:
    """Pictures made on the fly: one an example, or several in a document."""
    from bridges.data.scene_documents import SceneDocuments  # extra [demo]
    from bridges.data.scenes import Scenes

    train = split == "train"
    size, questions = (data.size, data.questions) if train else (MOST_HELD_OUT, QUESTIONS)
    if data.source == "scenes":
        return Scenes(split, size, captions=data.captions if train else CAPTIONS, questions=questions)
    return SceneDocuments(split, size, questions=questions)
