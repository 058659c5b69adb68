"""The pictures of a folder as vision features, which stay in the user's cache: no picture is encoded twice."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import uuid4

import torch
from jaxtyping import Float
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bridges.data.pictures import BrokenPicture, no_file, open_picture
from bridges.files import write
from bridges.towers.parcels import cache_folder
from bridges.towers.vision import VisionTower

SHARD = 64  # pictures encoded at once, and kept in one file
FORM = 1
"""Raise it when pictures are opened in another way: what was kept before is then left alone."""


class Folder:
    """Every picture in a folder, and in the folders in it; `folder[rows]` reads their features from the cache.

    What is kept is found by the tower's fingerprint and precision and by the content of the picture's file, wherever
    that lies: a file that changed is encoded again, one that was moved or copied is not. `paths` are the pictures that
    open, in order; `broken` says of the others what is wrong. Memory does not grow with the number of pictures.
    Raises ValueError: no such folder, no picture in it that opens, no space for the features.
    """

    def __init__(self, folder: Path, vision: VisionTower, console: Console | None = None) -> None:
        self.vision = vision
        name = f"{vision.fingerprint()}-{vision.dtype}-v{FORM}".replace("torch.", "")
        self.shelf = cache_folder() / "features" / name
        self.broken: dict[Path, str] = {}
        names = {}
        for path in pictures_in(folder):
            try:
                names[path] = hashlib.sha256(path.read_bytes()).hexdigest()
            except OSError as error:
                self.broken[path] = f"cannot read {path}: {error.strerror}"
        self._shards = shards(self.shelf)
        new = {name: path for path, name in names.items() if name not in self._shards}  # each content once
        self._encode(new, console)
        self.paths = [path for path, name in names.items() if name in self._shards]
        self._names = [names[path] for path in self.paths]
        for path in names.keys() - set(self.paths) - self.broken.keys():
            self.broken[path] = f"cannot open {path}: it is the same file as another that does not open"
        if not self.paths:
            raise ValueError(f"no picture in {folder} opens: {next(iter(self.broken.values()))}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, rows: Sequence[int]) -> Float[Tensor, "r p v"]:
        """Features on the CPU, in the tower's precision."""
        found = []
        for row in rows:
            with safe_open(self._shards[self._names[row]], framework="pt") as shard:
                found.append(shard.get_tensor(self._names[row]))
        return torch.stack(found)

    def summary(self, most: int = 20) -> str:
        """How many pictures were skipped, and one a line which and why."""
        lines = [f"  {line}" for _, line in sorted(self.broken.items())[:most]]
        rest = len(self.broken) - len(lines)
        head = f"{len(self.broken)} of {len(self.broken) + len(self)} pictures skipped"
        return "\n".join([head, *lines, *([f"  … and {rest} more"] if rest else [])])

    def _encode(self, new: dict[str, Path], console: Console | None) -> None:
        """Shard after shard, each kept as soon as it is done: what is broken off goes on from there."""
        starts = range(0, len(new), SHARD)
        seen = console is not None and console.is_terminal
        for start in track(starts, "encoding pictures", console=console, transient=True, disable=not seen):
            opened = dict(self._open(list(new.items())[start : start + SHARD]))
            if not opened:
                continue
            pixels = self.vision.preprocess(list(opened.values()))
            features = self.vision(pixels.to(next(self.vision.parameters()).device)).cpu()
            shard = self.shelf / f"{uuid4().hex}.safetensors"  # a name of its own: two processes do not meet
            write(shard, save({name: one.contiguous() for name, one in zip(opened, features, strict=True)}))
            self._shards |= dict.fromkeys(opened, shard)

    def _open(self, some: Iterable[tuple[str, Path]]) -> Iterable[tuple[str, Image.Image]]:
        for name, path in some:
            try:
                yield name, open_picture(path)
            except BrokenPicture as error:
                self.broken[path] = str(error)


def shards(shelf: Path) -> dict[str, Path]:
    """Which file holds the features of which content. ValueError where a file is broken."""
    found: dict[str, Path] = {}
    for path in sorted(shelf.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as shard:
                found |= dict.fromkeys(shard.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} of the cache is broken ({error}); delete it") from error
    return found


def pictures_in(folder: Path) -> list[Path]:
    """Files that are called like a picture that Pillow opens, but hidden ones. ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder" if folder.exists() else no_file(folder))
    opens = {end for end, form in Image.registered_extensions().items() if form in Image.OPEN}
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in opens and path.is_file()]
    shown = [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not shown:
        raise ValueError(f"no pictures in {folder}: no file in it has a picture's ending, such as .jpg or .png")
    return shown
