"""Documents in which text and pictures follow each other, as web pages do; in our own layout and in two public ones.

    {"content": [{"type": "text", "text": "…"}, {"type": "image", "path": "a.png"}, …]}            taken as it is
    {"images": ["a.png", null, …], "texts": [null, "…", …]}                                        OBELICS (2306.16527)
    {"text_list": ["…", …], "image_info": [{"image_name": "a.png", "matched_text_index": 0}, …]}   MMC4 (2304.06939)

A text that belongs to a picture ends in an empty line: the language model's own text closes it, and no new token.
"""

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

Part = str | dict[str, str]  # a text, or {"image": path}

END = "\n\n"
"""Between a picture's text and the next picture."""
LEAD = 500
"""Characters before the first picture that are read: nothing is learnt from them, and they take room."""
LEAST_SIMILARITY = 0.24
"""MMC4's pictures that suit their sentence less are left out, as OpenFlamingo does (2308.01390)."""


def is_document(row: dict[str, Any]) -> bool:
    """Seen from the keys of a row."""
    return isinstance(row.get("content"), list) or {"images", "texts"} <= row.keys() or "text_list" in row


def document(row: dict[str, Any]) -> list[tuple[str, list[Part]]] | None:
    """The turns of a document: the user shows the first picture with the text before it, the assistant says the rest.

    So the text after the first picture is learnt, further pictures stand in it, and one picture with its text is a
    caption. Pictures after the last text go. None where no text stands after a picture: nothing can be learnt.
    Raises ValueError for a malformed row.
    """
    parts = parts_of(row)
    shown = next((place for place, part in enumerate(parts) if not isinstance(part, str)), len(parts))
    said = [place for place, part in enumerate(parts) if place > shown and isinstance(part, str) and part.strip()]
    if not said:
        return None
    lead = "".join(part for part in parts[:shown] if isinstance(part, str))
    if len(lead) > LEAD:
        lead = re.sub(r"^\S*\s+", "", lead[-LEAD:])  # from the beginning of a word
    pictures = parts[shown : said[0]]
    return [("user", [lead, *pictures] if lead else pictures), ("assistant", parts[said[0] : said[-1] + 1])]


def parts_of(row: dict[str, Any]) -> list[Part]:
    """Texts and pictures of any of the three layouts, in reading order."""
    if isinstance(row.get("content"), list):
        return [part(given) for given in row["content"]]
    return joined(_sentences(row), " ") if "text_list" in row else joined(_parallel(row), END)


def part(given: Any) -> Part:
    """One part of our own layout, which chats have too."""
    match given:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", "path": str(path)} | {"type": "image", "url": str(path)}:
            return {"image": path}
    expected = '{"type": "text", "text": …} or {"type": "image", "path": …}'
    raise ValueError(f"a part of content must be {expected}, found {given!r:.80}")


def joined(parts: Sequence[Part], gap: str) -> list[Part]:
    """Texts lose the spaces around them; `gap` parts a text from the next, an empty line from a picture."""
    kept = [one for part in parts if (one := part.strip() if isinstance(part, str) else part)]
    return [
        one + ("" if after is None else gap if isinstance(after, str) else END) if isinstance(one, str) else one
        for one, after in zip_longest(kept, kept[1:])
    ]


def _parallel(row: dict[str, Any]) -> list[Part]:
    images, texts = row["images"], row["texts"]
    if not isinstance(images, list) or not isinstance(texts, list) or len(images) != len(texts):
        raise ValueError(f"images and texts must be two lists of one length, found {images!r:.40} and {texts!r:.40}")
    parts: list[Part] = []
    for place, pair in enumerate(zip(images, texts, strict=True), start=1):
        match pair:
            case str(path), None:
                parts.append({"image": path})
            case None, str(text):
                parts.append(text)
            case _:
                raise ValueError(f"images and texts must hold a path or a text, and null beside it; {place}. is {pair}")
    return parts


def _sentences(row: dict[str, Any]) -> list[Part]:
    """A picture stands before the sentence that it was matched with."""
    texts, images = row["text_list"], row.get("image_info")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts) or not isinstance(images, list):
        raise ValueError(f"text_list must be texts and image_info a list, found {texts!r:.40} and {images!r:.40}")
    before: list[list[Part]] = [[] for _ in texts]
    for image in images:
        match image:
            case {"image_name": str(path), "matched_text_index": int(place)} | {
                "path": str(path),
                "matched_text_index": int(place),
            } if 0 <= place < len(texts):
                if image.get("matched_sim", 1) >= LEAST_SIMILARITY:
                    before[place].append({"image": path})
            case _:
                expected = f"an image_name (or path) and a matched_text_index below {len(texts)}"
                raise ValueError(f"image_info must give {expected}, found {image!r:.120}")
    return [one for pictures, text in zip(before, texts, strict=True) for one in (*pictures, text)]
