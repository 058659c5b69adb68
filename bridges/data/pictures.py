"""Opens any picture safely: what comes out is RGB, upright and of a usable shape; what goes wrong is one line."""

import io
import logging
import math
from base64 import b64encode
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 200_000_000
"""About 600 MB once decoded; a file of a few kB can claim more."""
MAX_ASPECT = 20
"""An image processor that brings the shorter side to 224 makes 448,000 × 224 of a strip of 20,000 × 10: over 1 GB."""
STRIP_LENGTH = 4096

# Pillow refuses above twice this figure and warns above it; the limit in between is ours, and has one message.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

log = logging.getLogger(__name__)


class BrokenPicture(ValueError):
    """A picture that cannot be opened: one line with the file and the reason."""


def open_picture(source: Path | str | bytes | Image.Image, most: int = MAX_PIXELS) -> Image.Image:
    """The picture in RGB, turned upright by its EXIF tag; the first frame of an animation; a copy of a given Image.

    Transparency lies on white. 16 bits are scaled to 8, not clipped. A strip more than `MAX_ASPECT` times as long as
    wide is shrunk to at most `STRIP_LENGTH` pixels and laid on white of just that aspect ratio.
    Raises BrokenPicture: missing (the nearest name is given), empty, truncated, no picture, a folder, more than `most`
    pixels.
    """
    if isinstance(source, Image.Image):
        name = "the given Image"
    else:
        name = f"the given {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, Image.Image):
            return _usable(source, most)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else _file(Path(source))) as image:
            return _usable(image, most)
    except FileNotFoundError as error:
        raise BrokenPicture(str(error)) from None
    except UnidentifiedImageError:
        raise BrokenPicture(f"cannot open {name}: not a picture in a format that Pillow reads") from None
    except Exception as error:  # on broken files decoders raise anything, from SyntaxError to struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenPicture(f"cannot open {name}: {reason}") from error


def no_file(path: Path) -> str:
    """One line for a path that is not there: the first part of it that is missing, and the name nearest to that."""
    if path.is_symlink():
        return f"{path} is a symbolic link to nothing or to itself"
    absent = path
    while not absent.parent.exists():
        absent = absent.parent
    folder = absent.parent
    # More names than this would make every missing picture of a big data set cost a second.
    names = {n.name.lower(): n.name for n in islice(folder.iterdir(), 5000)} if folder.is_dir() else {}
    near = get_close_matches(absent.name.lower(), names, n=1)
    what = f"no file {path}" if absent == path else f"no file {path}: no folder {absent}"
    return f"{what}; nearest name: {folder / names[near[0]]}" if near else f"{what}; no similar name in {folder}"


def _file(path: Path) -> Path:
    if path.is_dir():
        raise ValueError("it is a folder")
    if not path.exists():
        raise FileNotFoundError(no_file(path))
    if path.stat().st_size == 0:
        raise ValueError("it is empty (0 bytes)")
    return path


def _usable(image: Image.Image, most: int) -> Image.Image:
    pixels = image.width * image.height
    if pixels > most:  # known from the header: nothing is decoded yet
        limit = f"at most {most / 1e6:.0f} are opened"
        raise ValueError(f"{image.width} × {image.height} is {pixels / 1e6:.1f} megapixels, {limit}")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bit(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return _widened(image.convert("RGB"))


def _eight_bit(image: Image.Image) -> Image.Image:
    """65535 becomes 255 (`convert` would clip). Floats and what 16 bits cannot hold have no known white: stretched."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, 65535
    return Image.fromarray(((values - low) * (255 / ((high - low) or 1))).round().astype(np.uint8))


def _widened(image: Image.Image) -> Image.Image:
    if max(image.size) <= MAX_ASPECT * min(image.size):
        return image
    image.thumbnail((STRIP_LENGTH, STRIP_LENGTH))
    least = math.ceil(max(image.size) / MAX_ASPECT)
    canvas = Image.new("RGB", (max(image.width, least), max(image.height, least)), "white")
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return canvas


def data_url(image: Image.Image, longest: int = 480) -> str:
    """A small copy as an address that a page holds itself: JPEG, or PNG where it is transparent."""
    form = "PNG" if image.has_transparency_data else "JPEG"
    small = image.copy() if form == "PNG" else image.convert("RGB")
    small.thumbnail((longest, longest))
    file = io.BytesIO()
    small.save(file, form, quality=90)
    return f"data:image/{form.lower()};base64,{b64encode(file.getvalue()).decode()}"


Row_co = TypeVar("Row_co", covariant=True)


@runtime_checkable  # for the tests, which check types as they run
class MapStyle(Protocol[Row_co]):
    """Any data set with a length whose rows are had by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Row_co: ...


class SkipBroken(Generic[Row_co]):
    """A data set that gives the next row instead of one whose picture is broken, and remembers which were.

    In a worker of a DataLoader the memory is the worker's own; the log has every broken row, whoever met it.
    """

    def __init__(self, rows: MapStyle[Row_co]) -> None:
        self.rows = rows
        self.broken: dict[int, str] = {}
        self._tried = bytearray(len(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row_co:
        """Row `index`, or the first after it that opens, cyclic.

        Raises ValueError: every row is broken; or over 5 % of all are; or, once 20 rows or more are tried, so many
        more than 5 % of them (three standard deviations) that this is no accident of the order.
        """
        start = range(len(self))[index]
        for row in chain(range(start, len(self)), range(start)):
            if row in self.broken:
                continue
            self._tried[row] = 1
            try:
                found = self.rows[row]
                self._refuse_too_many()
                return found
            except BrokenPicture as error:
                log.warning("row %d is skipped: %s", row, error)
                self.broken[row] = str(error)
            self._refuse_too_many()
        raise ValueError(f"no picture opens: {self.summary(20)}")

    def _refuse_too_many(self) -> None:
        tried = self._tried.count(1) if self.broken else 0
        surely = 0.05 * tried + 3 * math.sqrt(0.05 * 0.95 * tried)
        if tried >= 20 and len(self.broken) > min(surely, 0.05 * len(self)):
            raise ValueError(f"too many pictures are broken: {self.summary(20)}")

    def summary(self, most: int | None = None) -> str:
        """How many rows were skipped and, one a line, which and why; at most `most` of them."""
        lines = [f"  row {row}: {line}" for row, line in islice(sorted(self.broken.items()), most)]
        rest = len(self.broken) - len(lines)
        head = f"{len(self.broken)} of {self._tried.count(1)} rows tried were skipped"
        return "\n".join([head, *lines, *([f"  … and {rest} more"] if rest else [])])
