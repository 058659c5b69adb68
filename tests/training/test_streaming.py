"""Much data: nothing twice, nothing lost, no memory that grows, and to go on costs nothing of what was before."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bridges.training.feed import order, shuffled

BATCH, RANKS = 40, 2


def pixels(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, number // 65536)).save(file, "PNG")
    return file.getvalue()


def shards(folder: Path, rows: int, shards: int = 4) -> str:
    """Webdataset's tar shards, a picture and a caption a sample."""
    for shard in range(shards):
        with tarfile.open(folder / f"s-{shard:02}.tar", "w") as tar:
            for number in range(rows * shard // shards, rows * (shard + 1) // shards):
                for ending, data in (("png", pixels(number)), ("txt", f"It is {number}.".encode())):
                    member = tarfile.TarInfo(f"{number:07}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return str(folder / f"s-{{00..{shards - 1:02}}}.tar")


def parquet(folder: Path, rows: int) -> str:
    """Pictures as bytes in the rows, as on the hub."""
    columns = {
        "image": [{"bytes": pixels(number), "path": None} for number in range(rows)],
        "caption": [f"It is {number}." for number in range(rows)],
    }
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def captions(processes: list[list[dict[str, Any]]]) -> list[str]:
    return [said for lines in processes for line in lines for said in line["said"]]


def check(source: str, rows: int, towers: tuple[Path, Path], folder: Path) -> None:
    """Two processes with two workers each: all of it; then some of its second half again."""
    (folder / "held.csv").write_text(f"path,caption\n{folder / 'none.png'},nothing\n")
    (folder / "run").mkdir()
    steps, half, end = rows // BATCH, rows // BATCH // 2, rows // BATCH * 3 // 5
    recipe = {
        "output": str(folder / "run"),
        "vision": {"name": str(towers[0])},
        "language": {"name": str(towers[1])},
        "data": {"source": source, "validation": str(folder / "held.csv")},
        "train": {"steps": steps, "batch": BATCH, "workers": 2},
    }
    script = str(Path(__file__).with_name("streaming.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS), script]
    cache = {"HF_DATASETS_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, json.dumps(recipe), str(half), str(end)], check=True, env={**os.environ, **cache})
    files = [[folder / "run" / f"{name}.{rank}" for rank in range(RANKS)] for name in ("whole", "again")]
    whole, again = ([[json.loads(line) for line in f.read_text().splitlines()] for f in some] for some in files)

    assert sorted(captions(whole)) == sorted(f"It is {number}." for number in range(rows))
    for rank, lines in enumerate(whole):
        marks = [line for line in lines if "own" in line]
        for line in marks:
            print(f"rank {rank} " + "  ".join(f"{key} {value:.0f}" for key, value in line.items() if key != "said"))
        print(f"rank {rank} {rows / RANKS / marks[-1]['seconds']:.0f} rows/s")
        assert len(marks) == 3
        assert marks[2]["own"] - marks[0]["own"] < 20  # MB
    said = [[line["said"] for line in lines] for lines in again]
    assert said == [[line["said"] for line in lines[half:end]] for lines in whole]
    if source.endswith(".tar"):
        counts = [lines[-1]["opened"] for lines in again]
        print(f"resumed after {half} steps: {counts} pictures opened")
        assert counts == [len(captions([lines])) for lines in again]


def test_shards_stream_through_two_workers_and_two_ranks(tiny_clip: Path, tiny_llama: Path, tmp_path: Path) -> None:
    check(shards(tmp_path, 2000), 2000, (tiny_clip, tiny_llama), tmp_path)


@pytest.mark.slow
def test_parquet_streams_through_two_workers_and_two_ranks(tiny_clip: Path, tiny_llama: Path, tmp_path: Path) -> None:
    check(parquet(tmp_path, 20_000), 20_000, (tiny_clip, tiny_llama), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_thousand_rows_stream_in_flat_memory(tiny_clip: Path, tiny_llama: Path, tmp_path: Path) -> None:
    check(shards(tmp_path, 200_000, 20), 200_000, (tiny_clip, tiny_llama), tmp_path)


def test_the_order_of_a_million_rows_takes_four_bytes_of_each() -> None:
    assert len(order(3, 8, 1_000_000, seed=0)) == 8
    assert shuffled(0, 0, 1_000_000).nbytes == 4_000_000
    assert shuffled(0, 0, 1_000_000) is shuffled(0, 0, 1_000_000)  # not made anew for every step
