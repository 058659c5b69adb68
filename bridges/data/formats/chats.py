"""Chats in the layouts that people share, as turns `[role, [text or {"image": …}, …]]`.

    {"messages": [{"role", "content": text or parts}, …], "image" or "images"}             Hugging Face, TRL
    {"prompt": text or messages, "completion": text or messages, "image" or "images"}                    TRL
    {"conversations": [{"from", "value"}, …], "image" or "images", "system"}                 LLaVA, ShareGPT
    {"images": […], "texts": [{"user", "assistant"}, …]}                             the_cauldron, FineVision

Pictures stand where their places are: a part `{"type": "image"}`, or `<image>` in a text. Without places they stand
before what the user says first. Readers are given rows in which each picture is text already (`entries.reference`).
"""

import re
from collections.abc import Sequence
from typing import Any

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
PLACE = {"image": None}
"""Stands where a picture of the column belongs."""

Turns = list[list[Any]]


def messages(row: dict[str, Any]) -> Turns:
    return placed([_message(given, "messages") for given in filled(row["messages"], "messages")], row)


def prompt(row: dict[str, Any]) -> Turns:
    turns = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        given = row[key]
        turns += [[role, marked(given)]] if isinstance(given, str) else [_message(m, key) for m in filled(given, key)]
    return placed(turns, row)


def llava(row: dict[str, Any]) -> Turns:
    """The line breaks around a marker go: how picture and text are parted is the template's business."""
    said = []
    for turn in filled(row["conversations"], "conversations"):
        match turn:
            case {"from": str(role), "value": str(text)} | {"role": str(role), "content": str(text)}:
                said.append([role_of(role), marked(text)])
            case _:
                raise ValueError(f"a turn must have a from and a value, both text, found {turn!r:.80}")
    if said[0][0] == "assistant":  # an answer to nothing, as LLaVA itself drops it
        said = said[1:]
    if row.get("system"):
        said = [["system", [row["system"]]], *said]
    return placed(said, row, front=False)


def cauldron(row: dict[str, Any]) -> Turns:
    turns = []
    for given in filled(row["texts"], "texts"):
        match given:
            case {"user": str(asked), "assistant": str(said)}:
                turns += [["user", [asked]], ["assistant", [said]]]
            case _:
                raise ValueError(f"each of texts must have a user and an assistant, both text, found {given!r:.80}")
    return placed(turns, row)


def _message(given: Any, column: str) -> list[Any]:
    match given:
        case {"role": str(role), "content": str(text)}:
            return [role_of(role), marked(text)]
        case {"role": str(role), "content": list(parts)}:
            return [role_of(role), [_part(part) for part in parts]]
    raise ValueError(f"a message must have a role and a content (text or a list), found {given!r:.80} in {column}")


def _part(given: Any) -> Any:
    """Tables fill what a part lacks with null."""
    kept = {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given
    match kept:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", "path": str(path)} | {"type": "image", "image": str(path)}:
            return {"image": path}
        case {"type": "image", "url": str(path)}:
            return {"image": path}
        case {"type": "image"}:
            return PLACE
    expected = '{"type": "text", "text": …}, {"type": "image", "path": …} or, with a column images, {"type": "image"}'
    raise ValueError(f"a part of content must be {expected}, found {given!r:.80}")


def marked(text: str) -> list[Any]:
    """A text in parts, with a place for each `<image>`."""
    before, *after = re.split(r"\n*<image>\n*", text)
    return [part for part in (before, *(part for words in after for part in (PLACE, words))) if part or not after]


def placed(turns: Turns, row: dict[str, Any], front: bool = True) -> Turns:
    """The pictures of the row, each in its place; `front`: without places, before what the user says first."""
    images: Sequence[str] = row.get("image") or row.get("images") or []
    images = [images] if isinstance(images, str) else images
    places = sum(part is PLACE for _, parts in turns for part in parts)
    first = next((number for number, (role, _) in enumerate(turns) if role == "user"), None)
    if images and not places and front and first is not None:
        turns[first][1] = [PLACE] * len(images) + turns[first][1]
    elif places != len(images):
        raise ValueError(f"{places} <image> markers and {len(images)} images: give each image its marker")
    left = iter(images)
    return [[role, [{"image": next(left)} if part is PLACE else part for part in parts]] for role, parts in turns]


def filled(turns: Any, key: str) -> list[Any]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key} must be a list of turns and not empty, found {turns!r:.80}")
    return turns


def role_of(role: str) -> str:
    if role not in ROLES:
        raise ValueError(f"a turn is by {', '.join(ROLES)}, found {role!r}")
    return ROLES[role]
