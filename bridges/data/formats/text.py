"""Raw rows of JSON and CSV files, a piece at a time: LLaVA's is 1 GB, `json.load` takes several times that."""

import csv
import json
import re
from collections.abc import Iterator
from io import TextIOBase
from pathlib import Path
from typing import Any

Raw = Iterator[tuple[str, Any]]
"""Places, such as `line 3`, and what stands there."""

BETWEEN = re.compile(r"[\s,:]*")


def text_rows(file: Path) -> Raw:
    """The rows of a file. The first character tells a JSON array, JSON lines and CSV apart."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        first = text.read(4096).lstrip()[:1]
        text.seek(0)
        if file.suffix == ".json" and first not in ("[", "{", ""):
            raise ValueError(f"line 1: not JSON: expected [ or {{, found {first!r}")
        yield from {"[": json_array, "{": json_lines}.get(first, csv_lines)(text)


def json_lines(text: TextIOBase) -> Raw:
    whole = spread_object(text)
    if whole is not None:
        yield "row 1", whole
        return
    for number, line in enumerate(text, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: not JSON: {error.msg} at column {error.colno}") from None
            yield f"line {number}", row


def spread_object(text: TextIOBase) -> dict[str, Any] | None:
    """The only object of a small file, where it lies on several lines: so that its keys at least can be told."""
    head = text.read(1 << 16).strip()
    text.seek(0)
    try:
        return json.loads(head) if "\n" in head else None
    except json.JSONDecodeError:
        return None


def json_array(text: TextIOBase, chunk: int = 1 << 20, longest: int = 1 << 26) -> Raw:
    """The elements of an array."""
    stream = JsonStream(text, chunk, longest)
    stream.enter("[")
    for number in stream.until("]"):
        yield f"row {number}", stream.value(f"row {number}")


def json_members(text: TextIOBase, chunk: int = 1 << 20) -> Iterator[tuple[str, str, Any]]:
    """The members of an object as (place, key, value); of one that is an array, its elements one by one."""
    stream = JsonStream(text, chunk)
    stream.enter("{")
    for _ in stream.until("}"):
        key = stream.value("a key")
        if stream.next() != "[":
            yield key, key, stream.value(key)
            continue
        stream.enter("[")
        for number in stream.until("]"):
            yield f"{key} {number}", key, stream.value(f"{key} {number}")


class JsonStream:
    """The values of a JSON text one after the other, with a chunk of it in memory.

    A value that is cut off and one that is malformed look the same, so it is given up at the end of the file, or when
    it is longer than `longest`.
    """

    def __init__(self, text: TextIOBase, chunk: int = 1 << 20, longest: int = 1 << 26) -> None:
        self.text, self.chunk, self.longest = text, chunk, longest
        self.read, self.at, self.line = "", 0, 1
        self.decode = json.JSONDecoder().raw_decode

    def more(self) -> bool:
        """Read on, and forget what is behind. False at the end of the file."""
        new = self.text.read(max(self.chunk, len(self.read) - self.at))
        self.line += self.read.count("\n", 0, self.at)
        self.read, self.at = self.read[self.at :] + new, 0
        return bool(new)

    def next(self) -> str:
        """The next character that is no space, comma or colon; nothing at the end."""
        while True:
            self.at = BETWEEN.match(self.read, self.at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.at < len(self.read) or not self.more():
                return self.read[self.at : self.at + 1]

    def enter(self, bracket: str) -> None:
        found = self.next()
        assert found == bracket, found
        self.at += 1

    def until(self, bracket: str) -> Iterator[int]:
        """1, 2, … as long as `bracket` does not come next."""
        number = 1
        while self.next() != bracket:
            yield number
            number += 1
        self.at += 1

    def value(self, name: str) -> Any:
        """The next value. Raises ValueError with its `name`, its line and what is wrong with it."""
        while True:
            start = self.at
            try:
                value, end = self.decode(self.read, start)
            except json.JSONDecodeError as error:
                line = self.line + error.lineno - 1
                if len(self.read) - start > self.longest or not self.more():
                    found = f"not JSON: {error.msg} at column {error.colno}"
                    raise ValueError(f"{name} (line {line}): {found}") from None
                continue
            if end == len(self.read):  # a number may go on
                if self.more():
                    continue
                end -= start
            self.at = end
            return value


def csv_lines(text: TextIOBase) -> Raw:
    delimiter = max(",\t;", key=text.readline().count)
    text.seek(0)
    lines = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    header = next(lines, [])
    begin = lines.line_num + 1
    try:
        for fields in lines:
            if fields and len(fields) != len(header):
                found = f"{len(fields)} fields, the header has {len(header)}"
                raise ValueError(f"line {begin}: {found}; quote a field that holds {delimiter!r}")
            if fields:
                yield f"line {begin}", dict(zip(header, fields, strict=True))
            begin = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {begin}: {error}") from None
