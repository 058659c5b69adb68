"""A raw row of any layout, seen from its keys or named, in the one form that all are kept in."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from PIL import Image

from bridges.data.documents import document, is_document
from bridges.data.formats.chats import cauldron, llava, messages, prompt
from bridges.files import without_file

PICTURE = ("path", "image", "file_name", "filepath")
CAPTION = ("caption", "captions", "text", "title")
QUESTION = {"question", "answer"}
EXPECTED = (
    "messages or prompt and completion (chats), conversations (LLaVA, ShareGPT), images and texts (the_cauldron), "
    f"content|texts|text_list (documents), or {'|'.join(PICTURE)} with {'|'.join(CAPTION)} (captions) "
    "or with question and answer"
)
BYTES = "\0bytes\0"
"""Begins the place of a picture that is among the row's own bytes: no path holds a NUL. Then its number, and a digest
by which equal pictures are told."""
CHATS: dict[str, Callable[[dict[str, Any]], list[Any]]] = {
    "messages": messages,
    "prompt": prompt,
    "llava": llava,
    "sharegpt": llava,
    "cauldron": cauldron,
}
DOCUMENTS = ("document", "obelics", "mmc4")
LAYOUTS = (*CHATS, *DOCUMENTS, "captions", "questions")


class Entry(NamedTuple):
    """A caption or question of a `picture`; or a whole chat or document: no picture, and in `text` the JSON of its
    turns `[[role, [text or {"image": place}, …]], …]`. `images` are the pictures that the row itself holds."""

    picture: str | None
    prompt: str | None
    text: str
    kind: str
    split: str | None
    images: list[bytes]


def entries(row: Any, name: str | None = None) -> Iterator[Entry]:
    """What a row says: nothing where a document has no text after a picture; several captions of one picture.

    Raises ValueError for a malformed row, naming the column.
    """
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {row!r:.80}")
    row = {key: value for key, value in row.items() if isinstance(key, str)}
    name, split, images = name or recognised(row), row.get("split"), []
    if name in CHATS or name in DOCUMENTS:
        try:
            row = with_places(row, name, images)
            turns = CHATS[name](row) if name in CHATS else document(row)
        except KeyError as error:
            raise ValueError(f"expected the column {error.args[0]} of {name}, found {', '.join(row)}") from None
        if turns:
            kind = "chat" if name in CHATS else "document"
            yield Entry(None, None, json.dumps(turns, ensure_ascii=False), kind, split, images)
        return
    picture = next((key for key in PICTURE if key in row), None)
    said = ["answer"] if name == "questions" else captions_in(row)
    if picture is None or not said or (name == "questions" and not row.keys() >= QUESTION):
        raise ValueError(f"expected {EXPECTED}; found keys {', '.join(row)}")
    place = reference(row[picture], picture, images)
    asked = text_in(row, "question") if name == "questions" else None
    kind = row.get("kind", "other") if asked else "caption"
    for key in said:
        several = row[key] if isinstance(row[key], list) and row[key] else [row[key]]
        for one in several:
            yield Entry(place, asked, text_in({key: one}, key), kind, split, images)


def recognised(row: dict[str, Any]) -> str:
    """The layout of a row, seen from its columns."""
    match row:
        case {"messages": _}:
            return "messages"
        case {"conversations": _}:
            return "llava"
        case {"prompt": _, "completion": _}:
            return "prompt"
        case {"images": _, "texts": [{}, *_]}:
            return "cauldron"
    if is_document(row):
        return "document"
    return "questions" if row.keys() >= QUESTION else "captions"


def captions_in(row: dict[str, Any]) -> list[str]:
    """Its column of captions, or its columns `caption_0`, `caption_1`, …"""
    named = next((key for key in CAPTION if key in row), None)
    return [named] if named else sorted(key for key in row if re.fullmatch(r"caption_?\d+", key))


def text_in(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key} must be text and not empty, found {row[key]!r:.80}")
    return row[key]


def with_places(row: dict[str, Any], name: str, images: list[bytes]) -> dict[str, Any]:
    """The row with the place of each picture instead of the picture, in its columns and in parts of what is said."""

    def parts(given: Any) -> Any:
        if isinstance(given, list):
            return [parts(one) for one in given]
        if not isinstance(given, dict):
            return given
        if given.get("type") == "image":
            keys = [key for key in ("path", "image", "url") if given.get(key) is not None]
            return {**given, **{key: reference(given[key], key, images) for key in keys}}
        return {key: parts(value) if key == "content" else value for key, value in given.items()}

    row = {
        key: parts(value) if key in ("messages", "prompt", "completion", "content") else value
        for key, value in row.items()
    }
    for key in ("image", "images"):
        if isinstance(row.get(key), (str, bytes, dict, Image.Image)) and name in CHATS:
            row[key] = [row[key]]
        if isinstance(row.get(key), list):
            row[key] = [None if one is None else reference(one, key, images) for one in row[key]]
        elif row.get(key) is not None and name in CHATS:
            raise ValueError(f"{key} must be a path or a list, found {row[key]!r:.80}")
    return row


def reference(value: Any, column: str, images: list[bytes]) -> str:
    """The place of a picture as text: its path or URL, or its number among `images`, to which its bytes are added.

    Raises ValueError, with the column, for what is no picture.
    """
    match value:
        case str(path) if path.strip():
            return without_file(path)
        case {"bytes": bytes(data)} | bytes(data):
            place = f"{BYTES}{len(images)}\0{hashlib.sha256(data).hexdigest()[:32]}"
            images.append(data)
            return place
        case {"path": str(path)}:
            return reference(path, column, images)
        case Image.Image():
            file = io.BytesIO()
            value.save(file, "PNG")
            return reference(file.getvalue(), column, images)
    raise ValueError(f"{column} must be a path, a URL, bytes or a picture, and not empty; found {value!r:.80}")
