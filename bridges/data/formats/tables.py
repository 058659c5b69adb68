"""JSON files that are one object of several lists: COCO's captions, Karpathy's splits, VQAv2, MiniGPT-4's captions.

    {"images": [{"id", "file_name"}, …], "annotations": [{"image_id", "caption"}, …]}                            coco
    {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}, …]}, …]}                            karpathy
    {"questions": [{"image_id", "question", "question_id"}, …], "data_subtype"}, with the annotations in the file
        beside it: {"annotations": [{"question_id", "multiple_choice_answer", "answer_type"}, …]}               vqav2
    {"annotations": [{"image_id", "caption"}, …]}, with the pictures in image/ID.jpg                         minigpt4

Each becomes rows of the layouts `captions` and `questions`. The long list is never in memory as a whole.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridges.data.formats.text import Raw, json_members

OTHERS = {"messages", "conversations", "texts", "prompt", "content"}
BEGINS = re.compile(
    r'\s*\{\s*("(info|licenses?|annotations|categories|questions|task_type|data_type|data_subtype|dataset)"'
    r'|"images"\s*:\s*\[\s*\{)'
)
KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def is_table(file: Path) -> bool:
    """Seen from the beginning of a file: is it one object of lists, rather than a row on each line?"""
    with file.open(encoding="utf-8-sig", errors="replace") as text:
        head = text.read(1 << 16)
    if not head.lstrip().startswith("{"):
        return False
    try:
        first, _ = json.JSONDecoder().raw_decode(head.lstrip())
    except json.JSONDecodeError:
        return BEGINS.match(head) is not None
    lists = {key for key in ("annotations", "questions", "images") if isinstance(first.get(key), list)}
    return bool(lists) and not OTHERS & first.keys()


def table_rows(file: Path, name: str | None = None) -> Raw:
    """Rows of the file, as the layout `name` or, without one, as its lists say."""
    firsts: dict[str, Any] = {}
    for _, key, value in members(file):
        firsts.setdefault(key, value)
    yield from TABLES[name or named(firsts)](file)


def named(firsts: dict[str, Any]) -> str:
    """The layout, seen from the first element of each list. Raises ValueError where it is none of them."""
    match firsts:
        case {"questions": _}:
            return "vqav2"
        case {"annotations": {"question_id": _}}:
            raise ValueError("these are the annotations of VQAv2; name its file of questions, with this one beside it")
        case {"images": _, "annotations": _}:
            return "coco"
        case {"images": {"sentences": _}}:
            return "karpathy"
        case {"annotations": _}:
            return "minigpt4"
    expected = "images and annotations (COCO), images with sentences (Karpathy), questions (VQAv2)"
    raise ValueError(f"expected an object with {expected}, found keys {', '.join(firsts)}")


def coco(file: Path) -> Raw:
    names = {
        one(row, "id", where, int, str): one(row, "file_name", where, str)
        for where, key, row in members(file)
        if key == "images"
    }
    for where, key, row in members(file):
        if key == "annotations":
            caption, image = one(row, "caption", where, str), one(row, "image_id", where, int, str)
            if image not in names:
                raise ValueError(f"{where}: no image has the id {image}")
            yield where, {"image": names[image], "caption": caption}


def karpathy(file: Path) -> Raw:
    for where, key, row in members(file):
        if key != "images":
            continue
        folder, split = row.get("filepath", ""), one(row, "split", where, str)
        if split not in KARPATHY:
            raise ValueError(f"{where}: split must be one of {', '.join(KARPATHY)}, found {split!r}")
        path = str(Path(folder) / one(row, "filename", where, str))
        said = [one(sentence, "raw", where, str) for sentence in one(row, "sentences", where, list)]
        yield where, {"image": path, "caption": said, "split": KARPATHY[split]}


def vqav2(file: Path) -> Raw:
    beside = file.with_name(file.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if beside == file or not beside.exists():
        raise ValueError(f"the annotations of VQAv2 belong beside its questions: no {beside.name} there")
    asked, subset = {}, ""
    for where, key, row in members(file):
        if key == "questions":
            asked[one(row, "question_id", where, int)] = one(row, "question", where, str)
        elif key == "data_subtype":
            subset = row
    for place, key, row in members(beside):
        where = f"{beside.name}, {place}"
        if key != "annotations":
            continue
        number, image = one(row, "question_id", where, int), one(row, "image_id", where, int)
        if number not in asked:
            raise ValueError(f"{where}: no question has the question_id {number}")
        answer, kind = one(row, "multiple_choice_answer", where, str), row.get("answer_type", "other")
        yield (
            where,
            {
                "image": f"COCO_{subset}_{image:012d}.jpg",
                "question": asked[number],
                "answer": answer,
                "kind": kind,
            },
        )


def minigpt4(file: Path) -> Raw:
    for where, key, row in members(file):
        if key == "annotations":
            image = one(row, "image_id", where, int, str)
            yield where, {"image": f"image/{image}.jpg", "caption": one(row, "caption", where, str)}


TABLES: dict[str, Callable[[Path], Raw]] = {"coco": coco, "karpathy": karpathy, "vqav2": vqav2, "minigpt4": minigpt4}


def members(file: Path) -> Any:
    with file.open(encoding="utf-8-sig") as text:
        yield from json_members(text)


def one(row: Any, key: str, where: str, *kinds: type) -> Any:
    """`row[key]`. Raises ValueError with the place and the key where it is missing or of another type."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with {key}, found {row!r:.80}")
    if key not in row:
        raise ValueError(f"{where}: expected the key {key}, found keys {', '.join(row)}")
    if not isinstance(row[key], kinds):
        expected = " or ".join({"str": "text", "int": "a number", "list": "a list"}[kind.__name__] for kind in kinds)
        raise ValueError(f"{where}: {key} must be {expected}, found {row[key]!r:.80}")
    return row[key]
