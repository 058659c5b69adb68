"""Shards that lie elsewhere: anything that fsspec opens by its URL (s3://, gs://, hf://, https://, memory://, …)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlparse

import fsspec

Place = Path | str
"""A path here, or a URL."""


def place_of(source: str) -> Place:
    """A path, unless it is a URL of another kind than file://."""
    if source.startswith("file://"):
        return Path(unquote(urlparse(source).path))
    return source if "://" in source else Path(source)


@contextmanager
def opened(place: Place) -> Iterator[Any]:
    """The bytes of a file, which are fetched as they are read. ValueError where it cannot be opened."""
    if isinstance(place, Path):
        with place.open("rb") as file:
            yield file
        return
    system, path = found(place)
    with system.open(path, "rb") as file:
        yield file


def stamp(place: Place) -> tuple[str, Any, Any]:
    """What tells a file from the same one after a change: its name, its size, and when or what it was.

    Raises ValueError where it cannot be reached or is not there.
    """
    if isinstance(place, Path):
        return str(place.resolve()), place.stat().st_size, place.stat().st_mtime_ns
    system, path = found(place)
    try:
        return place, system.size(path), str(system.ukey(path))
    except FileNotFoundError:
        raise ValueError(f"no file {place}") from None
    except OSError as error:
        raise ValueError(f"{place} cannot be reached: {' '.join(str(error).split()):.120}") from None


def piece(place: Place, first: int, count: int) -> bytes:
    """A part of a file, and nothing else of it."""
    if isinstance(place, Path):
        with place.open("rb") as file:
            file.seek(first)
            return file.read(count)
    system, path = found(place)
    return cast(bytes, system.cat_file(path, start=first, end=first + count))


def found(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there. ValueError where fsspec knows none, or lacks a package for it."""
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {' '.join(str(error).split()):.160}") from None
