"""Data and pictures by their URLs: read as if they lay here, and what is wrong with one names it."""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

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
    with pytest.raises(ValueError, match=r"^memory://bucket/a\.zip: by their URLs .tar, .*\.csv, \.tsv are read"):
        Rows("memory://bucket/a.zip")
    with pytest.raises(ValueError, match=r"^no file http://127\.0\.0\.1:9/a\.json: Cannot connect"):
        Rows("http://127.0.0.1:9/a.json")


def test_a_picture_that_can_no_longer_be_fetched_is_broken(store: fsspec.AbstractFileSystem) -> None:
    store.pipe("/bucket/s.tar", shard(0))
    rows = Rows("memory://bucket/s.tar")
    store.rm("/bucket/s.tar")
    with pytest.raises(BrokenPicture, match=r"cannot open memory://bucket/s\.tar, 001\.png"):
        rows[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, with names that an address has to quote, and their captions in several layouts."""
    folder = tmp_path / "shown"
    folder.mkdir()
    names = ["a b.png", "50% 🐈#1?.png", "c.png"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(picture(number))
    rows = [{"image": name, "caption": f"number {n}"} for n, name in enumerate(names)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "rows.csv").write_text("\n".join(["image,caption", *(f"{r['image']},{r['caption']}" for r in rows)]))
    shown = [{"id": n, "file_name": name} for n, name in enumerate(names)]
    said = [{"image_id": n, "caption": f"number {n}"} for n in range(3)]
    (folder / "coco.json").write_text(json.dumps({"images": shown, "annotations": said}))
    return folder


class Quiet(SimpleHTTPRequestHandler):
    """A server that gives whole files only, and breaks one off."""

    def log_message(self, *_: object) -> None:
        pass

    def copyfile(self, source: io.BufferedReader, outputfile: io.BufferedWriter) -> None:
        data = source.read()
        outputfile.write(data[: len(data) // 2] if "half" in self.path else data)


@pytest.fixture
def address(folder: Path, store: fsspec.AbstractFileSystem) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "coco.json", "rows.json?raw=true"])
def test_rows_by_their_address_are_those_that_lie_here(
    folder: Path, address: str, store: fsspec.AbstractFileSystem, name: str
) -> None:
    here = told(Rows(folder / name.partition("?")[0]))
    assert [words for words, _ in here] == ["number 0", "number 1", "number 2"]
    assert told(Rows(f"{address}/{name}")) == here
    for file in folder.iterdir():
        store.pipe(f"/bucket/{file.name}", file.read_bytes())
    assert told(Rows(f"memory://bucket/{name.partition('?')[0]}")) == here
    assert told(Rows(f"{address}/{name}", images=folder)) == here
    assert len(open_split(Data(source=str(folder / "rows.json"), images=address), "train")) == 2


def test_pictures_by_their_address_are_fetched_where_a_path_may_stand(folder: Path, address: str) -> None:
    url, said = f"{address}/c.png", {"role": "assistant", "content": "A cat."}
    for part in ({"url": url}, {"path": url}, {"image": (folder / "c.png").as_uri()}):
        asked = {"role": "user", "content": [{"type": "image", **part}, {"type": "text", "text": "?"}]}
        (folder / "chats.jsonl").write_text(json.dumps({"messages": [asked, said]}))
        (shown, _) = Rows(folder / "chats.jsonl")[0].conversations[0].turns
        assert shown.content[0].tobytes() == Image.open(folder / "c.png").tobytes()
    parts = [{"type": "image", "url": url}, {"type": "text", "text": "A cat."}]
    (folder / "page.jsonl").write_text(json.dumps({"content": parts}))
    assert Rows(folder / "page.jsonl")[0].conversations[0].turns[0].content[0].size == (32, 24)


def test_a_dead_link_is_a_broken_picture_and_a_file_broken_off_one_line(folder: Path, address: str) -> None:
    (folder / "half.json").write_text((folder / "rows.json").read_text())
    (folder / "half.png").write_bytes(picture(0))
    with pytest.raises(ValueError, match=r"^http.*/half\.json cannot be fetched: .*payload"):
        Rows(f"{address}/half.json")
    links = [f"{address}/gone.png", f"{address}/half.png", f"{address}/rows.csv", "http://127.0.0.1:9/a.png"]
    (folder / "links.jsonl").write_text("\n".join(json.dumps({"image": at, "caption": "c"}) for at in links))
    for place, at in enumerate(links):
        with pytest.raises(BrokenPicture, match=f"{at}: ") as error:
            Rows(folder / "links.jsonl")[place]
        assert "\n" not in str(error.value)


def test_a_link_to_a_film_is_a_broken_picture(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridges.data.formats.remote.MOST_BYTES", 64)
    with pytest.raises(BrokenPicture, match=r"c\.png: more than 0 MB"):
        Rows(f"{address}/rows.json")[2]


def test_rows_that_have_changed_at_their_address_are_read_again(folder: Path, address: str) -> None:
    assert told(Rows(f"{address}/rows.csv"))[0][0] == "number 0"
    (folder / "rows.csv").write_text((folder / "rows.csv").read_text().replace("number 0", "number 9"))
    os.utime(folder / "rows.csv", (0, 0))
    assert told(Rows(f"{address}/rows.csv"))[0][0] == "number 9"
