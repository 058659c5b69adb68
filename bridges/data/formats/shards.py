"""Raw rows of Parquet files and of webdataset's tar shards; pictures as bytes, or by their place in the tar."""

import json
import re
import tarfile
from itertools import product
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bridges.data.formats.remote import Place, opened, piece, place_of
from bridges.data.formats.text import Raw
from bridges.data.pictures import BrokenPicture

PICTURES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "tif", "tiff"}
TAR = "\0tar\0"
"""Begins the place of a picture in a tar: no path holds a NUL. Then the first byte, how many, the shard, the name."""


def parquet_rows(file: Place) -> Raw:
    try:
        with opened(file) as raw, pq.ParquetFile(raw) as table:
            number = 0
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"no whole Parquet file: {' '.join(str(error).split()):.120}") from None


def tar_rows(file: Place) -> Raw:
    """One row for the members that have a key, the name up to its first dot, in common: `0001.jpg` and `0001.txt`.

    `.json` is a row of any layout, to which `image` is added; `.txt` or `.caption` a caption. Pictures stay in the tar.
    """
    key, sample = "", {}
    count = 0
    try:
        with opened(file) as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                now = f"{folder}/{stem}"
                if now != key and sample:
                    yield f"sample {key.lstrip('/')!r}", sample
                    count, sample = count + 1, {}
                key = now
                sample |= _read(file, tar, member, ending.lower())
            refuse_cut(raw, tar.offset)
    except tarfile.ReadError as error:
        more = "; unpack it first" if not str(file).endswith(".tar") else ""
        raise ValueError(f"the shard is cut short or no tar, after {count} whole samples: {error}{more}") from None
    if sample:
        yield f"sample {key.lstrip('/')!r}", sample


def _read(file: Place, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> dict[str, Any]:
    if ending in PICTURES:
        return {"image": "\0".join([TAR[:-1], str(member.offset_data), str(member.size), str(file), member.name])}
    if ending not in ("txt", "caption", "json"):
        return {}
    held = tar.extractfile(member)
    assert held is not None
    text = held.read().decode("utf-8")
    if ending != "json":
        return {"caption": text}
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{member.name} is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{member.name} must hold an object, found {row!r:.80}")
    return {name: value for name, value in row.items() if name != "image"}


def refuse_cut(raw: Any, offset: int) -> None:
    """tarfile takes a header that is cut off for the end; a whole tar ends in an empty block."""
    raw.seek(offset - tarfile.BLOCKSIZE)
    last = raw.read(2 * tarfile.BLOCKSIZE)
    if not any(last[at : at + tarfile.BLOCKSIZE] == tarfile.NUL * tarfile.BLOCKSIZE for at in (0, tarfile.BLOCKSIZE)):
        raise tarfile.ReadError("its end is missing")


def bytes_in_tar(place: str) -> tuple[bytes, str]:
    """The bytes of a picture in a tar, and its name for people. Raises BrokenPicture where they cannot be had."""
    first, count, file, name = place[len(TAR) :].split("\0")
    try:
        return piece(place_of(file), int(first), int(count)), f"{file}, {name}"
    except OSError as error:
        raise BrokenPicture(f"cannot open {file}, {name}: {' '.join(str(error).split())}") from error


def spread(source: str) -> list[Place]:
    """`shard-{0000..0012}.tar` written out, as webdataset does; several ranges are multiplied."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", source)
    ranges = [
        [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    texts = parts[::3]
    return [
        place_of("".join([texts[0], *(n + t for n, t in zip(chosen, texts[1:], strict=True))]))
        for chosen in product(*ranges)
    ]
