"""Shards by their URLs: read as if they lay here, fetched in pieces, and what is wrong with one names it."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridges.config import Data
from bridges.data.formats import Rows
from bridges.data.pictures import BrokenPicture
from bridges.data.sources import open_split
from bridges.recipe import recipe_or_data


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    """A bucket in memory, and a cache that goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    system = fsspec.filesystem("memory")
    system.makedirs("/bucket", exist_ok=True)
    yield system
    system.rm("/bucket", recursive=True)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def shard(first: int, count: int = 3) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(first, first + count):
            for ending, data in (("png", picture(number)), ("txt", f"number {number}".encode())):
                member = tarfile.TarInfo(f"{number:03}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def told(rows: Rows) -> list[tuple[str, bytes]]:
    """The caption and the pixels of every row."""
    turns = [rows[index].conversations[0].turns for index in range(len(rows))]
    return [(said.content[0], asked.content[0].tobytes()) for asked, said in turns]


def test_shards_elsewhere_are_read_as_those_that_lie_here(store: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    folder = tmp_path / "my shards %20 🐈"
    folder.mkdir()
    for number in range(2):
        store.pipe(f"/bucket/s-{number}.tar", shard(3 * number))
        (folder / f"s-{number}.tar").write_bytes(shard(3 * number))
    here = told(Rows(str(folder / "s-{0..1}.tar")))
    assert [words for words, _ in here] == [f"number {n}" for n in range(6)]
    assert told(Rows("memory://bucket/s-{0..1}.tar")) == here
    assert told(Rows((folder / "s-1.tar").as_uri())) == here[3:]
    assert len(open_split(Data(source="memory://bucket/s-{0..1}.tar"), "train")) == 5
    assert recipe_or_data("memory://bucket/s-0.tar").data.source == "memory://bucket/s-0.tar"


def test_parquet_elsewhere_is_read_too(store: fsspec.AbstractFileSystem) -> None:
    file = io.BytesIO()
    rows = [{"image": {"bytes": picture(n), "path": None}, "caption": f"number {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), file)
    store.pipe("/bucket/a.parquet", file.getvalue())
    assert [words for words, _ in told(Rows("memory://bucket/a.parquet"))] == ["number 0", "number 1", "number 2"]
    store.pipe("/bucket/a.parquet", file.getvalue()[:-20])
    with pytest.raises(ValueError, match=r"memory://bucket/a\.parquet, no whole Parquet file"):
        Rows("memory://bucket/a.parquet")


def test_a_shard_elsewhere_that_has_changed_is_read_again(store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/bucket/s.tar", shard(0))
    assert len(Rows("memory://bucket/s.tar")) == 3
    store.pipe("/bucket/s.tar", shard(0, 5))
    assert len(Rows("memory://bucket/s.tar")) == 5


def test_a_shard_that_is_cut_short_names_itself(store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/bucket/s-0.tar", shard(0))
    store.pipe("/bucket/s-1.tar", shard(3)[:6000])
    with pytest.raises(ValueError, match=r"memory://bucket/s-1\.tar, the shard is cut short or no tar, after 1 whole"):
        Rows("memory://bucket/s-{0..1}.tar")


def test_what_is_not_there_is_one_line(store: fsspec.AbstractFileSystem) -> None:
    with pytest.raises(ValueError, match=r"^no file memory://bucket/gone\.tar$"):
        Rows("memory://bucket/gone.tar")
    with pytest.raises(ValueError, match=r"nowhere://a/s\.tar cannot be opened: .*nowhere"):
        Rows("nowhere://a/s.tar")
    with pytest.raises(ValueError, match=r"memory://bucket/a\.csv is no shard"):
        Rows("memory://bucket/a.csv")


def test_a_picture_that_can_no_longer_be_fetched_is_broken(store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/bucket/s.tar", shard(0))
    rows = Rows("memory://bucket/s.tar")
    store.rm("/bucket/s.tar")
    with pytest.raises(BrokenPicture, match=r"cannot open memory://bucket/s\.tar, 001\.png"):
        rows[1]
