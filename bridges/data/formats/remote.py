"""Data that lie elsewhere: anything that fsspec opens by its URL (s3://, gs://, hf://, https://, memory://, …)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, cast
from urllib.parse import quote, unquote, urlparse

import fsspec

from bridges.data.pictures import BrokenPicture
from bridges.files import without_file

Place = Path | str
"""A path here, or a URL."""
MOST_BYTES = 1 << 28
"""Of a picture that is fetched: a link may lead to a film."""
MARKS = ("ETag", "Content-MD5", "Digest", "Last-Modified")


def place_of(source: str) -> Place:
    """A path, unless it is a URL of another kind than file://."""
    source = without_file(source)
    return source if "://" in source else Path(source)


def path_of(place: Place) -> PurePosixPath:
    """The path, of a URL without what follows a question mark: where it ends in `.json`, that is what it is."""
    return PurePosixPath(place if isinstance(place, Path) else unquote(urlparse(place).path))


def folder_of(place: Place) -> Place:
    """Where a file lies."""
    if isinstance(place, Path):
        return place.parent
    return (place.partition("?")[0] if place.startswith("http") else place).rpartition("/")[0]


def beside(folder: Place, name: str) -> Place:
    """Where a file is that is named in another: a path from there, or a whole path, or a URL."""
    if "://" in name:
        return place_of(name)
    if isinstance(folder, Path) or name.startswith("/"):
        return Path(folder) / name
    return f"{folder.rstrip('/')}/{quote(name) if folder.startswith('http') else name}"


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
        told = system.info(path)
        return place, told["size"], str([system.ukey(path), *(told.get(mark) for mark in MARKS)])
    except FileNotFoundError as error:  # fsspec's answer to all that goes wrong at a server
        reason = f": {one_line(error.__cause__)}" if error.__cause__ else ""
        raise ValueError(f"no file {place}{reason}") from None
    except OSError as error:
        raise ValueError(f"{place} cannot be reached: {one_line(error)}") from None


@contextmanager
def fetched(place: Place) -> Iterator[Path]:
    """The file as one that lies here as long as it is read: some are read twice, and not every server gives parts."""
    if isinstance(place, Path):
        yield place
        return
    system, path = found(place)
    with TemporaryDirectory() as folder:
        here = Path(folder) / path_of(place).name
        try:
            system.get_file(path, str(here))
        except Exception as error:  # what a server breaks off raises anything
            raise ValueError(f"{place} cannot be fetched: {one_line(error)}") from None
        yield here


def fetch_picture(url: str) -> bytes:
    """The bytes behind an address. Raises BrokenPicture where they cannot be had, or are too many."""
    try:
        data = piece(url, 0, MOST_BYTES)
    except Exception as error:  # dead links die in many ways
        raise BrokenPicture(f"cannot open {url:.200}: {one_line(error) or type(error).__name__}") from None
    if len(data) >= MOST_BYTES:
        raise BrokenPicture(f"cannot open {url:.200}: more than {MOST_BYTES / 1e6:.0f} MB")
    return data


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
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        options["client_kwargs"] = {"timeout": ClientTimeout(total=None, sock_connect=10, sock_read=30)}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} cannot be opened: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    return f"{' '.join(str(error).split()):.160}"
