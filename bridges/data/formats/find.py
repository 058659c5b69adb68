"""Which files a source means, and the raw rows of each."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridges.data.formats.entries import LAYOUTS
from bridges.data.formats.remote import Place, fetched, path_of
from bridges.data.formats.shards import parquet_rows, spread, tar_rows
from bridges.data.formats.tables import TABLES, is_table, table_rows
from bridges.data.formats.text import text_rows
from bridges.data.pictures import no_file

FORMATS = (*LAYOUTS, *TABLES)
IN_FOLDER = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "filter_cap.json", "*questions.json")
SHARDS = ("*.tar", "*.parquet", "data/*.parquet")
BY_URL = (".tar", ".parquet", ".json", ".jsonl", ".csv", ".tsv")
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def files_of(source: str | Path) -> list[Place]:
    """The file itself; of a folder its metadata or its shards; of `shard-{0000..0012}.tar` all that are meant.

    Raises ValueError, with the nearest name, where one is missing, and for a URL of anything but files of rows.
    """
    files: list[Place] = []
    for path in spread(str(source)):
        if isinstance(path, str):
            if path_of(path).suffix not in BY_URL:
                raise ValueError(f"{path}: by their URLs {', '.join(BY_URL)} are read; fetch other files first")
            files.append(path)
            continue
        if not path.exists():
            raise ValueError(no_file(path))
        files += in_folder(path) if path.is_dir() else [path]
    return files


def in_folder(folder: Path) -> list[Path]:
    for pattern in (*IN_FOLDER, *SHARDS):
        if found := sorted(folder.glob(pattern)):
            return found if pattern in SHARDS else found[:1]
    raise ValueError(
        f"{folder} has neither metadata.jsonl nor metadata.csv, with a file_name and a text for each picture, nor "
        "shards (.tar, .parquet); a file of another name is named itself"
    )


def is_hub_id(source: str | Path) -> bool:
    """`owner/name` or `owner/name:config`, where that is no path and could be none: no ending, no such folder."""
    text = str(source)
    known = Path(text).suffix in (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".tar")
    here = os.path.lexists(text) or Path(text).parent.exists()
    return isinstance(source, str) and HUB.fullmatch(text) is not None and not known and not here


def raw_rows(file: Place, name: str | None) -> Iterator[tuple[str, Any]]:
    """Each raw row of a file and its place in it. Raises ValueError, without the file's name."""
    path = path_of(file)
    if path.suffix == ".parquet":
        yield from parquet_rows(file)
    elif ".tar" in path.suffixes or path.suffix == ".tgz":
        yield from tar_rows(file)
    else:
        with fetched(file) as here:
            table = name in TABLES or (name is None and is_table(here))
            yield from table_rows(here, name) if table else text_rows(here)
