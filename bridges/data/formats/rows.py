"""Reads people's own data: chats, documents, questions, folders and tables of pictures with captions.

Data are read once, row by row, into an Arrow table in the cache of the `datasets` library, which is memory-mapped:
host memory does not grow with the data. Its columns are those of `entries.Entry`.
"""

import json
import logging
import random
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.formats.entries import BYTES, Entry, entries
from bridges.data.formats.find import FORMATS, files_of, is_hub_id, raw_rows
from bridges.data.formats.hub import hub_rows
from bridges.data.formats.remote import Place, beside, fetch_picture, folder_of, place_of, stamp
from bridges.data.formats.shards import TAR, bytes_in_tar
from bridges.data.formats.tables import TABLES
from bridges.data.pictures import BrokenPicture, no_file, open_picture

FORM = 3
"""Raise it when the table changes its form: tables made by older code are then left alone."""
TEXT = Value("string")
FEATURES = Features(
    {"picture": TEXT, "prompt": TEXT, "text": TEXT, "kind": TEXT, "split": TEXT, "images": List(Value("binary"))}
)

log = logging.getLogger(__name__)


class Rows:
    """The rows of a file, a folder, shards or a data set on the hub; their format is seen from the data, or named.

    - JSON lines, a JSON array, CSV, TSV, Parquet or tar shards, with rows of any layout of `chats.py`, `documents.py`;
      or with a picture (path|image|file_name|filepath) and a caption (caption|text|title), or a question and an answer
    - all of these files also by their URLs (`s3://bucket/s-{0000..0012}.tar`, `https://…/a.json`: fsspec's);
      pictures stay there, and are fetched each time that they are needed (VQAv2's two files have to lie here)
    - JSON files of several lists, see `tables.py`
    - a folder with `metadata.jsonl`, `.csv` or `.parquet`, with MiniGPT-4's `filter_cap.json`, or with shards

    The captions or questions of one picture become one Example; captions have a prompt drawn by the Example's number.
    A picture is a path, a URL, bytes, or what `datasets` makes of it.
    """

    def __init__(
        self,
        path: Path | str,
        images: Place | None = None,
        prompts: Sequence[str] = ("Describe the image.",),
        kind: str | None = None,
        layout: str | None = None,
    ) -> None:
        """`images` is where relative paths start, by default beside the file. `kind` replaces `caption`, `chat` or
        `document`. `layout` is one of `FORMATS`.

        Raises ValueError, one line: missing or empty file, malformed or unrecognised row (with its number), no prompts.
        """
        if not prompts:
            raise ValueError("prompts is empty: give at least one")
        if layout is not None and layout not in FORMATS:
            raise ValueError(f"no format {layout!r}; there are {', '.join(FORMATS)}")
        files = [] if is_hub_id(path) else files_of(path)
        self.name, self.prompts, self.kind = str(path), prompts, kind
        self.images = images or (folder_of(files[0]) if files else Path())
        if isinstance(self.images, Path) and not self.images.exists():
            raise ValueError(no_file(self.images))
        self.table = _table(str(path), files, layout)
        self.captions = self.table[0]["picture"] is not None
        self.splits = {split for split in self.table.unique("split") if split}
        self._arrange(range(len(self.table)))

    def _arrange(self, places: range | np.ndarray) -> None:
        """The rows of picture i are order[starts[i] : starts[i + 1]]; pictures keep the order of their first rows.

        Where every row is a picture of its own, or a chat, these are ranges and take no memory.
        """
        self.order, self.starts = places, range(len(places) + 1)
        column = self.table.data.column("picture")
        if isinstance(places, np.ndarray):
            column = column.take(places)
        if not self.captions or len(names := column.unique()) == len(places):
            return
        number = pc.call_function("index_in", [column], pc.SetLookupOptions(names)).to_numpy()
        self.order = np.asarray(places, np.uint32)[np.argsort(number, kind="stable")]
        self.starts = np.append(0, np.bincount(number).cumsum()).astype(np.uint32)

    def only(self, split: str) -> "Rows":
        """Those of a split that the data name themselves. Raises ValueError where it is empty."""
        part = copy(self)
        named = pc.call_function("equal", [self.table.data.column("split"), split])
        places = np.flatnonzero(named.fill_null(False).to_numpy())
        if not len(places):
            raise ValueError(f"the split {split!r} of {self.name} is empty; it has {', '.join(sorted(self.splits))}")
        part._arrange(places)
        return part

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        """Example `index` with its pictures opened. Raises BrokenPicture."""
        index = range(len(self))[index]
        rows: dict[str, list[Any]] = self.table[self.order[self.starts[index] : self.starts[index + 1]]]
        if not self.captions:
            turns = json.loads(rows["text"][0])
            said = [self._turn(role, parts, rows["images"][0]) for role, parts in turns]
            return Example([Conversation(said, self.kind or rows["kind"][0])])
        picture, draw = self._open(rows["picture"][0], rows["images"][0]), random.Random(index)
        asked = [draw.choice(self.prompts) if prompt is None else prompt for prompt in rows["prompt"]]
        kinds = [self.kind or kind for kind in rows["kind"]]
        return Example([ask(q, a, picture, k) for q, a, k in zip(asked, rows["text"], kinds, strict=True)])

    def _turn(self, role: Any, content: list[Any], images: list[bytes]) -> Turn:
        return Turn(role, [p if isinstance(p, str) else self._open(p["image"], images) for p in content])

    def _open(self, place: str, images: list[bytes]) -> Image.Image:
        if place.startswith(BYTES):
            return open_picture(images[int(place.split("\0")[2])])
        if not place.startswith(TAR):
            where = beside(self.images, place)
            if isinstance(where, Path):
                return open_picture(where)
            data, name = fetch_picture(where), where
        else:
            data, name = bytes_in_tar(place)
        try:
            return open_picture(data)
        except BrokenPicture as error:
            raise BrokenPicture(f"{name}: {error}") from None


def _table(source: str, files: Sequence[Place], layout: str | None) -> Dataset:
    stamps = [stamp(file) for file in files]
    disable_progress_bars()
    try:
        return Dataset.from_generator(
            _checked,
            features=FEATURES,
            # The cache is found by these arguments: a file that has changed is read again.
            gen_kwargs={"source": source, "stamps": (FORM, *stamps), "layout": layout},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from None
        raise


def _checked(source: str, stamps: tuple[Any, ...], layout: str | None) -> Iterator[dict[str, Any]]:
    """The rows in the table's form. Raises ValueError with the file and the row."""
    captions, dull = None, 0
    for where, row in _raw(source, [place_of(name) for name, *_ in stamps[1:]], layout):
        found = 0
        try:
            for entry in entries(row, None if layout in TABLES else layout):
                found += 1
                if captions is None:
                    captions = entry.picture is not None
                yield _row(entry, captions)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        dull += not found
    if captions is None:
        raise ValueError(f"{source} has no rows" + f" to learn from: {dull} have no text after a picture" * (dull > 0))
    if dull:
        log.warning("%s: %d documents are left out: they have no text after a picture", source, dull)


def _row(entry: Entry, captions: bool) -> dict[str, Any]:
    if captions != (entry.picture is not None):
        raise ValueError("a file holds chats or captions, not both")
    for text in (entry.text, entry.prompt or ""):
        text.encode()  # half an emoji (a lone surrogate) passes JSON, and no tokenizer
    return entry._asdict()


def _raw(source: str, files: Sequence[Place], layout: str | None) -> Iterator[tuple[str, Any]]:
    try:
        if not files:
            yield from hub_rows(source)
        for file in files:
            source = str(file)
            for place, row in raw_rows(file, layout):
                yield f"{file}, {place}", row
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise ValueError(f"{source} cannot be read: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ValueError(str(error) if source in str(error) else f"{source}, {error}") from None
