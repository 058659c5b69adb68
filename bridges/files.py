"""Files that are whole or not there, and their names."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlparse

NEXT, READY = ".next", ".ready"


def without_file(text: str) -> str:
    """The path that a URL with file:// means; every other text as it is."""
    return unquote(urlparse(text).path) if text.startswith("file://") else text


def write(path: Path, content: bytes) -> None:
    """Replace a file in one go: a crash leaves the old one or the new one. ValueError when there is no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}; {len(content) / 1e6:.1f} MB are needed") from error


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Replace several files of a folder in one go: write the new ones into the folder that this gives.

        folder/.next     being written: thrown away after a crash, or when there is no space
        folder/.ready    whole: renaming .next to this is the moment at which all of it counts
        folder           each file is moved to its place; `finish` goes on after a crash

    Raises ValueError when it cannot be written; the folder is as it was then.
    """
    finish(folder)
    fresh = folder / NEXT
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        yield fresh
        fresh.rename(folder / READY)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise ValueError(f"cannot write {folder}: {error.strerror or error}; what it held is as it was") from error
        raise
    finish(folder)


def finish(folder: Path) -> None:
    """Bring to its end what `replacing` had whole and not yet in place. Several processes may do so at once."""
    ready = folder / READY
    for path in sorted(ready.rglob("*")):
        place = folder / path.relative_to(ready)
        if path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process was quicker
                path.replace(place)
    shutil.rmtree(ready, ignore_errors=True)


def prepare_output(folder: Path, needed: int) -> None:
    """ValueError unless `folder` can be written and has room for `needed` bytes: known before training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output {folder} is a file, or lies in one; choose a folder") from None
    except OSError as error:
        raise ValueError(f"cannot make the output folder {folder}: {error.strerror}") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB; make room there"
        )
