"""Paths as people write, quote, escape and drop them, alone or amid a message."""

import os
import re
import shlex
from pathlib import Path

from PIL.Image import Image

from bridges.data.pictures import open_picture
from bridges.files import without_file

AT = re.compile(r"""(?<!\S)@(?:"([^"]+)"|'([^']+)'|((?:\\.|[^\s\\])+))""")
SUFFIX = re.compile(r"\.(png|jpe?g|webp|gif|bmp|tiff?|avif|ppm)$", re.IGNORECASE)


def paths_in(text: str) -> list[Path]:
    """Paths as a shell takes them: apart by spaces, spaces within them in quotes or behind a backslash, ~ for home.

    A text that is as a whole the name of a file is that file, whatever stands in it.
    """
    whole = expanded(text.strip())
    if text.strip() and exists(whole):
        return [whole]
    try:
        words = shlex.split(text)
    except ValueError:  # a lone quote is an apostrophe
        words = text.split()
    return [expanded(word) for word in words]


def one_path(text: str, command: str) -> Path:
    """The one path that a command needs. ValueError for none, or more."""
    found = paths_in(text)
    if len(found) != 1:
        raise ValueError(f"{command} needs one path, quoted where it has spaces; got {len(found)}")
    return found[0]


def interleaved(text: str) -> list[str | Image]:
    """A message with its pictures where `@path` stands; a space beside the mark stays.

    What is no file and does not look like a picture's name is just words. Raises ValueError (BrokenPicture).
    """
    parts: list[str | Image] = []
    start = 0
    for found in AT.finditer(text):
        quoted = found[1] or found[2]
        path = expanded(quoted or re.sub(r"\\(.)", r"\1", found[3]))
        if not exists(path) and not quoted:
            shorter = expanded(re.sub(r"[.,;:!?)]+$", "", str(path)))  # the sentence's own sign
            path = shorter if exists(shorter) or SUFFIX.search(str(shorter)) else path
        if not exists(path) and not SUFFIX.search(str(path)):
            continue
        end = found.end() if quoted else found.end() - (len(found[3]) - len(found[3].rstrip(".,;:!?)")))
        parts += [text[start : found.start()], opened(path)]
        start = end
    return [part for part in [*parts, text[start:]] if part != ""] or [text]


def opened(path: Path) -> Image:
    """A picture that knows its name. Raises ValueError (BrokenPicture)."""
    if exists(path) and not path.is_file() and not path.is_dir():  # reading a device may never end
        raise ValueError(f"cannot open {path}: it is no ordinary file")
    picture = open_picture(path)
    picture.info["name"] = str(path)
    return picture


def expanded(text: str) -> Path:
    """A path with ~ for home, or the one that a file URL means, which some terminals give for a dropped file."""
    return Path(os.path.expanduser(without_file(text)))  # noqa: PTH111  Path's own raises at a ~ without a user


def exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  Path's own raises at a message longer than a name may be
