"""Reads people's own files: chats, LLaVA's format, documents, folders and tables of pictures with captions.

A file is read once, row by row, into an Arrow table in the cache of the `datasets` library, which is memory-mapped:
host memory does not grow with the data. The table has two columns: `picture` and `text`, a caption; or, for a chat or a
document, no picture and `text` the JSON of its kind and turns, `[kind, [[role, [text or {"image": path}, …]], …]]`.
"""

import csv
import json
import logging
import random
import re
from collections.abc import Iterator, Sequence
from io import TextIOBase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Value, disable_progress_bars
from datasets.exceptions import DatasetGenerationError

from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.documents import document, is_document, part
from bridges.data.pictures import no_file, open_picture

PICTURE = ("path", "image", "file_name", "filepath")
CAPTION = ("caption", "text", "title")
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
EXPECTED = (
    "messages (chats), conversations (LLaVA), content|texts|text_list (documents), "
    f"or {'|'.join(PICTURE)} with {'|'.join(CAPTION)} (captions)"
)
FORM = 2
"""Raise it when the table changes its form: tables made by older code are then left alone."""

log = logging.getLogger(__name__)


class Rows:
    """The rows of a file, or of a folder with `metadata.jsonl` or `metadata.csv`; its format is seen from the data.

    - JSON lines, or a JSON array, of chats: `{"messages": [{"role", "content": text or [{"type": "text", "text"} or
      {"type": "image", "path"}, …]}, …]}`
    - of LLaVA's: `{"image": path or [paths], "conversations": [{"from": "human" | "gpt" | "system", "value"}, …]}`, a
      picture for each `<image>`
    - of documents: text and pictures in reading order, in one of the layouts of `documents.py`; one in which no text
      stands after a picture is left out
    - of captions: a picture (path|image|file_name|filepath) and a caption (caption|text|title); CSV has such columns.
      The captions of one picture become one Example, each with a prompt drawn by the Example's number.
    """

    def __init__(
        self,
        path: Path,
        images: Path | None = None,
        prompts: Sequence[str] = ("Describe the image.",),
        kind: str | None = None,
    ) -> None:
        """`images` is where relative paths start, by default beside the file. `kind` replaces `caption`, `chat` or
        `document`.

        Raises ValueError, one line: missing or empty file, malformed or unrecognised row (with its number), no prompts.
        """
        if not prompts:
            raise ValueError("prompts is empty: give at least one")
        file = _metadata(path) if path.is_dir() else path
        self.images = images or file.parent
        for needed in (file, self.images):
            if not needed.exists():
                raise ValueError(no_file(needed))
        self.prompts = prompts
        self.table = _table(file)
        self.captions = self.table[0]["picture"] is not None
        self.kind = kind
        # The rows of picture i are order[starts[i] : starts[i + 1]]; pictures keep the order of their first rows.
        column = self.table.data.column("picture")
        number = np.arange(len(self.table))
        if self.captions:
            number = pc.call_function("index_in", [column], pc.SetLookupOptions(column.unique())).to_numpy()
        self.order = np.argsort(number, kind="stable")
        self.starts = np.append(0, np.bincount(number).cumsum())

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Example:
        """Example `index` with its pictures opened. Raises BrokenPicture."""
        index = range(len(self))[index]
        rows = self.table[self.order[self.starts[index] : self.starts[index + 1]]]
        if not self.captions:
            kind, turns = json.loads(rows["text"][0])
            return Example([Conversation([self._turn(*turn) for turn in turns], self.kind or kind)])
        picture, draw = open_picture(self.images / rows["picture"][0]), random.Random(index)
        kind = self.kind or "caption"
        return Example([ask(draw.choice(self.prompts), caption, picture, kind) for caption in rows["text"]])

    def _turn(self, role: Any, content: list[Any]) -> Turn:
        return Turn(
            role, [part if isinstance(part, str) else open_picture(self.images / part["image"]) for part in content]
        )


def _metadata(folder: Path) -> Path:
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).exists():
            return folder / name
    raise ValueError(
        f"{folder} has neither metadata.jsonl nor metadata.csv, with a file_name and a text for each picture"
    )


def _table(file: Path) -> Dataset:
    stamp = file.stat()
    disable_progress_bars()
    try:
        return Dataset.from_generator(
            _checked,
            features=Features({"picture": Value("string"), "text": Value("string")}),
            # The cache is found by these arguments: a file that has changed is read again.
            gen_kwargs={"file": str(file.resolve()), "stamp": (FORM, stamp.st_size, stamp.st_mtime_ns)},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(str(error.__cause__)) from None
        raise


def _checked(file: str, stamp: tuple[int, ...]) -> Iterator[dict[str, str | None]]:
    """The rows in the table's form. Raises ValueError with the file and the row."""
    del stamp
    captions, dull = None, 0
    for where, row in _rows(Path(file)):
        try:
            picture, text = _normal(row)
            if text is None:
                dull += 1
                continue
            text.encode()  # half an emoji (a lone surrogate) passes JSON, and no tokenizer
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if captions is None:
            captions = picture is not None
        if captions != (picture is not None):
            raise ValueError(f"{where}: a file holds chats or captions, not both")
        yield {"picture": picture, "text": text}
    if captions is None:
        raise ValueError(f"{file} has no rows" + f" to learn from: {dull} have no text after a picture" * (dull > 0))
    if dull:
        log.warning("%s: %d documents are left out: they have no text after a picture", file, dull)


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row and its place. The first character tells a JSON array, JSON lines and CSV apart."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        try:
            first = text.read(4096).lstrip()[:1]
            text.seek(0)
            for place, row in {"[": _json_array, "{": _json_lines}.get(first, _csv)(text):
                yield f"{file}, {place}", row
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from None
        except ValueError as error:
            raise ValueError(f"{file}, {error}") from None


def _json_lines(text: TextIOBase) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: not JSON: {error.msg} at column {error.colno}") from None
            yield f"line {number}", row


def _json_array(text: TextIOBase, chunk: int = 1 << 20, longest: int = 1 << 26) -> Iterator[tuple[str, Any]]:
    """The elements of an array, a chunk of the file at a time: LLaVA's is 1 GB, `json.load` takes several times that.

    A row that is cut off and a row that is malformed look the same, so it is given up at the file's end or when longer
    than `longest`.
    """
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    read = text.read(chunk)
    at, line, number = read.index("[") + 1, 1, 1
    while True:
        at = between.match(read, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        if read[at : at + 1] == "]":
            return
        try:
            row, end = decode(read, at)
        except json.JSONDecodeError as error:
            more = "" if len(read) - at > longest else text.read(max(chunk, len(read) - at))
            if not more:
                message = (
                    f"row {number} (line {line + error.lineno - 1}): not JSON: {error.msg} at column {error.colno}"
                )
                raise ValueError(message) from None
            line += read.count("\n", 0, at)
            read, at = read[at:] + more, 0
            continue
        yield f"row {number}", row
        at, number = end, number + 1


def _csv(text: TextIOBase) -> Iterator[tuple[str, Any]]:
    delimiter = max(",\t;", key=text.readline().count)
    text.seek(0)
    lines = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    header = next(lines, [])
    begin = lines.line_num + 1
    try:
        for fields in lines:
            if fields and len(fields) != len(header):
                found = f"{len(fields)} fields, the header has {len(header)}"
                raise ValueError(f"line {begin}: {found}; quote a field that holds {delimiter!r}")
            if fields:
                yield f"line {begin}", dict(zip(header, fields, strict=True))
            begin = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {begin}: {error}") from None


def _normal(row: Any) -> tuple[str | None, str | None]:
    """(picture, caption), or (None, the JSON of a kind and turns), or (None, None) where there is nothing to learn."""
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {row!r:.80}")
    if "messages" in row or "conversations" in row:
        turns = _chat(row["messages"]) if "messages" in row else _llava(row["conversations"], row.get("image") or [])
        return None, json.dumps(["chat", turns], ensure_ascii=False)
    if is_document(row):
        turns = document(row)
        return None, json.dumps(["document", turns], ensure_ascii=False) if turns else None
    picture, caption = (next((name for name in names if name in row), None) for names in (PICTURE, CAPTION))
    if picture is None or caption is None:
        raise ValueError(f"expected {EXPECTED}; found keys {', '.join(row)}")
    for key in (picture, caption):
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f"{key} must be text and not empty, found {row[key]!r:.80}")
    return row[picture], row[caption]


def _chat(messages: Any) -> list[Any]:
    turns = []
    for message in _filled(messages, "messages"):
        match message:
            case {"role": str(role), "content": str(text)}:
                turns.append([_role(role), [text]])
            case {"role": str(role), "content": list(parts)}:
                turns.append([_role(role), [part(given) for given in parts]])
            case _:
                raise ValueError(f"a message must have a role and a content (text or a list), found {message!r:.80}")
    return turns


def _llava(conversations: Any, image: Any) -> list[Any]:
    """The line breaks around a marker go: how picture and text are parted is the template's business."""
    said = []
    for turn in _filled(conversations, "conversations"):
        match turn:
            case {"from": str(role), "value": str(text)}:
                said.append((_role(role), text))
            case _:
                raise ValueError(f"a turn must have a from and a value, both text, found {turn!r:.80}")
    if said[0][0] == "assistant":  # an answer to nothing, as LLaVA itself drops it
        said = said[1:]
    paths = [image] if isinstance(image, str) else image
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"image must be a path or a list of paths, found {image!r:.80}")
    markers = sum(text.count("<image>") for _, text in said)
    if markers != len(paths):
        raise ValueError(f"{markers} <image> markers and {len(paths)} images: give each image its marker")
    left, turns = iter(paths), []
    for role, text in said:
        before, *after = re.split(r"\n*<image>\n*", text)
        parts = [before, *(part for words in after for part in ({"image": next(left)}, words))]
        turns.append([role, [part for part in parts if part]])
    return turns


def _filled(turns: Any, key: str) -> list[Any]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} must be a list of turns and not empty, found {turns!r:.80}")
    return turns


def _role(role: str) -> str:
    if role not in ROLES:
        raise ValueError(f"a turn is by {', '.join(ROLES)}, found {role!r}")
    return ROLES[role]
