"""Which files a source means, and the raw rows of each."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridges.data.formats.entries import LAYOUTS
from bridges.data.formats.remote import Place
from bridges.data.formats.shards import parquet_rows, spread, tar_rows
from bridges.data.formats.tables import TABLES, is_table, table_rows
from bridges.data.formats.text import text_rows
from bridges.data.pictures import no_file

FORMATS = (*LAYOUTS, *TABLES)
IN_FOLDER = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "filter_cap.json", "*questions.json")
SHARDS = ("*.tar", "*.parquet", "data/*.parquet")
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def files_of(source: str | Path) -> list[Place]:
    """The file itself; of a folder its metadata or its shards; of `shard-{0000..0012}.tar` all that are meant.

    Raises ValueError, with the nearest name, where one is missing, and for a URL of anything but shards.
    """
    files: list[Place] = []
    for path in spread(str(source)):
        if isinstance(path, str):
            if not path.endswith((".tar", ".parquet")):
                raise ValueError(
                    f"{path} is no shard: by their URLs .tar and .parquet are read; fetch other files first"
                )
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
    if str(file).endswith(".parquet"):
        yield from parquet_rows(file)
    elif isinstance(file, str) or ".tar" in file.suffixes or file.suffix == ".tgz":
        yield from tar_rows(file)
    elif name in TABLES or (name is None and is_table(file)):
        yield from table_rows(file, name)
    else:
        yield from text_rows(file)
