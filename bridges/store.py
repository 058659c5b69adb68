"""Vision features on disk: a picture is encoded once, for all runs whose encoder is the same.

A file holds up to a shard of pictures and is never changed, so that any number of processes may read and add at once;
it is there whole or not at all. Pictures are known by what is in them, files by all that decides the features.
"""

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args
from uuid import uuid4

import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bridges.base import Bridge
from bridges.build import Built
from bridges.files import write
from bridges.towers.parcels import cache_folder
from bridges.towers.vision import VisionTower

Form = Literal["fp32", "fp16", "int8"]
NAMES = {"fp32": ["features"], "fp16": ["features"], "int8": ["features", "scales"]}  # tensors of a file
SHARD = 64  # pictures in a file
OPEN = 128  # files that are kept open
LAYOUT = 1
"""Raise it when a file's content means something else: what was kept before is then left alone."""

Row = dict[str, Tensor]
"""Of one picture, as it is kept."""

log = logging.getLogger(__name__)


def open_store(built: Built) -> "Store | None":
    """What a recipe keeps of pictures, if it does."""
    chosen, model = built.recipe.vision, built.model
    return Store(model.vision, model.bridge, chosen.cache, chosen.cache_gb * 1e9) if chosen.cache else None


class Store:
    """Features of pictures, from disk or from the encoder, which then are kept in `form`, up to `budget` bytes.

    What is kept is `bridge.reduced(features)`, so that no more is read than trains. `fp32` is exact, `fp16` rounds to
    11 bits (error about 0.02 %), `int8` has a scale for each patch (error below 1 / 254 of its largest channel).
    `encoded` counts what the encoder had to look at. Calls may come from several threads. All runs find it, unless a
    `folder` of its own is given.
    """

    def __init__(
        self, vision: VisionTower, bridge: Bridge, form: Form, budget: float, folder: Path | None = None
    ) -> None:
        assert form in get_args(Form)
        self.vision, self.bridge, self.budget = vision, bridge, budget
        self.form: Form = form
        weight = next(bridge.parameters())
        pattern = torch.arange(vision.num_patches * vision.dim).remainder(251).view(1, vision.num_patches, vision.dim)
        reduced = bridge.reduced(pattern.to(weight.device, torch.float32))
        self.shape = tuple(reduced.shape[1:])
        digest = blake2b(f"{vision.fingerprint()} {vision.dtype} {LAYOUT}".encode(), digest_size=12)
        for tensor in (reduced, *vision.encoder.state_dict().values()):
            digest.update(bytes_of(tensor))
        self.shelf = (folder or cache_folder() / "features") / f"{digest.hexdigest()}-{form}"
        self.encoded = 0
        self._places: dict[str, tuple[Path, int]] = {}
        self._known: set[Path] = set()
        self._size = 0
        self._waiting: dict[str, Row] = {}
        self._full = False
        self._lock = Lock()
        self._opened = lru_cache(OPEN)(lambda path: safe_open(path, framework="pt"))
        self._look_around()

    def __len__(self) -> int:
        return len(self._places) + len(self._waiting)

    def __bool__(self) -> bool:
        """An empty store is one too, and to be filled."""
        return True

    def __call__(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n p v"]:
        """In float32 on the CPU. ValueError where there is no space, or features are beyond what `form` can hold."""
        if not pictures:
            return torch.empty(0, *self.shape)
        keys = [key(picture) for picture in pictures]
        with self._lock:
            found = self._found(keys)
            if found.keys() < set(keys):
                self._look_around()  # another process may have been quicker
                found = self._found(keys)
            new = {k: picture for k, picture in zip(keys, pictures, strict=True) if k not in found}
            if new:
                fresh = self._encode(new)
                self._keep(fresh)
                found |= fresh
        return unpacked({name: torch.stack([found[k][name] for k in keys]) for name in NAMES[self.form]})

    @torch.no_grad()
    def look(self, pictures: Sequence[Image.Image]) -> Float[Tensor, "n p v"]:
        """What the encoder sees, and the bridge makes of it without weights. Nothing is kept."""
        pixels = self.vision.preprocess(pictures).to(next(self.vision.parameters()).device)
        return self.bridge.reduced(self.vision(pixels).float()).cpu()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        with self._lock:
            self._write()

    @property
    def each(self) -> int:
        """Bytes of a picture."""
        patches, width = self.shape
        return patches * (width + 4 if self.form == "int8" else width * (2 if self.form == "fp16" else 4))

    def summary(self) -> str:
        return (
            f"{len(self)} pictures kept in {self.shelf}: {self.shape[0]} x {self.shape[1]} in {self.form}, "
            f"{len(self) * self.each / 1e6:.0f} of at most {self.budget / 1e6:.0f} MB"
        )

    def _found(self, keys: Sequence[str]) -> dict[str, Row]:
        rows = {k: self._waiting.get(k) or self._read(k) for k in keys if k in self._waiting or k in self._places}
        return {k: row for k, row in rows.items() if row}

    def _encode(self, new: dict[str, Image.Image]) -> dict[str, Row]:
        """As they will be read, so that it makes no difference when that is."""
        self.encoded += len(new)
        tensors = packed(self.look(list(new.values())), self.form)
        return {k: {name: tensor[row] for name, tensor in tensors.items()} for row, k in enumerate(new)}

    def _keep(self, fresh: dict[str, Row]) -> None:
        if not self._full and self._size + (len(self._waiting) + len(fresh)) * self.each > self.budget:
            self._full = True
            log.warning("the budget of features is spent (%s); other pictures are encoded each time", self.summary())
        if self._full:
            return
        self._waiting |= fresh
        if len(self._waiting) >= SHARD:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        path = self.shelf / f"{uuid4().hex}.safetensors"  # a name of its own: two processes do not meet
        rows = list(self._waiting.values())
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        write(path, save(tensors, {"pictures": " ".join(self._waiting)}))
        self._add(path, list(self._waiting))
        self._waiting = {}

    def _read(self, k: str) -> Row | None:
        path, row = self._places[k]
        try:
            shard: Any = self._opened(path)
            return {name: shard.get_slice(name)[row : row + 1][0] for name in NAMES[self.form]}
        except (SafetensorError, OSError) as error:
            log.warning("%s was lost (%s): its pictures are encoded again", path, error)
            del self._places[k]
            return None

    def _add(self, path: Path, keys: Sequence[str]) -> None:
        self._known.add(path)
        self._size += path.stat().st_size
        self._places |= {k: (path, row) for row, k in enumerate(keys)}

    def _look_around(self) -> None:
        """Find files that were not there before. One that was cut short is deleted, and its pictures encoded again."""
        for entry in os.scandir(self.shelf) if self.shelf.is_dir() else ():
            path = Path(entry.path)
            if path in self._known or path.suffix != ".safetensors":
                continue
            try:
                with safe_open(path, framework="pt") as shard:
                    keys = shard.metadata()["pictures"].split()
                self._add(path, keys)
            except (SafetensorError, TypeError, KeyError) as error:
                log.warning("%s is broken (%s): deleted, its pictures are encoded again", path, error)
                path.unlink(missing_ok=True)


def key(picture: Image.Image) -> str:
    """The same for pictures that look the same."""
    size = b"%dx%d" % picture.size
    return blake2b(picture.convert("RGB").tobytes(), digest_size=16, salt=size[:16]).hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def packed(features: Float[Tensor, "n p v"], form: Form) -> dict[str, Tensor]:
    """As it is kept. ValueError for features that fp16 cannot hold."""
    if form == "fp32":
        return {"features": features.contiguous()}
    if form == "fp16":
        half = features.half()
        if not half.isfinite().all():
            raise ValueError(f"features of {features.abs().max():.3g} do not fit fp16; choose vision.cache: int8")
        return {"features": half}
    scales = features.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return {"features": (features / scales).round().to(torch.int8), "scales": scales}


def unpacked(tensors: dict[str, Tensor]) -> Float[Tensor, "n p v"]:
    features = tensors["features"].float()
    return features * tensors["scales"] if "scales" in tensors else features


def error_of(features: Float[Tensor, "n p v"], form: Form) -> float:
    """Root mean square of what is lost, relative to that of the features."""
    lost = unpacked(packed(features, form)) - features
    return float(lost.pow(2).mean().sqrt() / features.pow(2).mean().sqrt())
