"""Conversations as files: kept to go on with, as Markdown to read, in LLaVA's form to train on."""

import io
import json
from base64 import b64decode, b64encode
from binascii import Error as NoBase64
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from bridges import __version__
from bridges.data.conversation import Role, Turn, images_of
from bridges.data.pictures import no_file, open_picture
from bridges.files import write
from bridges.inference.settings import Settings, changed
from chat.paths import exists, one_path
from chat.show import WHO
from chat.state import Chat, name_of, words_of

FORM = 1
"""Of the files that /save writes"""


def save(chat: Chat, argument: str) -> str:
    """One JSON file, pictures inside, pixel for pixel."""
    path = one_path(argument, "/save")
    kept = {
        "form": FORM,
        "bridges": __version__,
        "towers": towers(chat),
        "settings": asdict(chat.settings),
        "turns": [
            {"role": turn.role, "content": [packed(part) for part in turn.content]} for turn in chat.session.turns
        ],
        "waiting": [packed(picture) for picture in chat.pictures],
    }
    write_file(path, json.dumps(kept, ensure_ascii=False).encode(errors="replace"))
    return f"saved: {len(chat.session.turns)} turns and {len(chat.all_pictures())} pictures in {path}"


def load(chat: Chat, argument: str) -> str:
    """All of it, or (ValueError) nothing. A conversation with other towers goes on with these, and that is told."""
    path = one_path(argument, "/load")
    kept = read_json(path)
    if not isinstance(kept, dict) or "form" not in kept:
        raise ValueError(f"{path} is no conversation that /save wrote")
    if kept["form"] != FORM:
        raise ValueError(
            f"{path} has form {kept['form']} (bridges {kept.get('bridges')}), this is bridges {__version__} and reads "
            f"form {FORM}; open it with that version and /export it"
        )
    try:
        turns = [Turn(role(turn["role"]), [unpacked(part) for part in turn["content"]]) for turn in kept["turns"]]
        waiting = [unpacked(part) for part in kept["waiting"]]
        settings = Settings()
        for name, value in kept["settings"].items():
            settings = changed(settings, name, str(value))
        was = {str(kind): str(name) for kind, name in kept["towers"].items()}
    except (KeyError, TypeError, AttributeError, NoBase64) as error:
        raise ValueError(f"{path} is broken: {type(error).__name__} {error}") from error
    chat.session.clear()
    chat.session.turns, chat.settings = turns, settings
    chat.pictures = [part for part in waiting if isinstance(part, Image.Image)]
    told = f"{len(turns)} turns and {len(chat.all_pictures())} pictures from {path}"
    if was != towers(chat):
        told += (
            f"; it was held with {' and '.join(was.values())}, and goes on with {' and '.join(towers(chat).values())}"
        )
    return told


def export(chat: Chat, argument: str) -> str:
    """Pictures lie in a folder beside the file."""
    path = one_path(argument, "/export")
    forms = {".md": markdown, ".json": llava}
    if path.suffix not in forms:
        raise ValueError(f"/export writes .md (to read) or .json (LLaVA's, to train on), not {path.name!r}")
    folder = path.with_name(f"{path.stem}_pictures")
    pictures = images_of(chat.session.turns)
    names = [f"{folder.name}/{number}.png" for number in range(1, len(pictures) + 1)]
    text = forms[path.suffix](chat, path.stem, iter(names))
    for name, picture in zip(names, pictures, strict=True):
        write_file(path.parent / name, png(picture))
    write_file(path, text.encode(errors="replace"))
    return f"written: {path}" + (f", and {len(names)} pictures in {folder}" if names else "")


def markdown(chat: Chat, title: str, names: Any) -> str:
    turns = [
        f"**{WHO[turn.role]}**\n\n"
        + "".join(part if isinstance(part, str) else f"![{name_of(part)}]({next(names)})\n\n" for part in turn.content)
        for turn in chat.session.turns
    ]
    return f"# {title}\n\n" + "\n\n".join(turns) + "\n"


def llava(chat: Chat, title: str, names: Any) -> str:
    """`bridges train` reads it again. ValueError for words that it would take for a picture."""
    speakers = {"system": "system", "user": "human", "assistant": "gpt"}
    if any("<image>" in words_of(turn) for turn in chat.session.turns):
        raise ValueError("someone says <image>, which is a picture in LLaVA's form; export it as .md")
    said = [
        {
            "from": speakers[turn.role],
            "value": "".join(part if isinstance(part, str) else "<image>\n" for part in turn.content),
        }
        for turn in chat.session.turns
    ]
    paths = list(names)
    images = {"image": paths[0] if len(paths) == 1 else paths} if paths else {}
    return json.dumps([{"id": title, **images, "conversations": said}], ensure_ascii=False, indent=1) + "\n"


def towers(chat: Chat) -> dict[str, str]:
    """Their names and fingerprints."""
    model = chat.session.assembled.model
    named = {"vision": model.vision, "language": model.language}
    return {kind: f"{tower.name} ({tower.fingerprint()})" for kind, tower in named.items()}


def packed(part: str | Image.Image) -> dict[str, str]:
    return {"text": part} if isinstance(part, str) else {"image": b64encode(png(part)).decode(), "name": name_of(part)}


def unpacked(part: Any) -> str | Image.Image:
    if "text" in part:
        return str(part["text"])
    picture = open_picture(b64decode(part["image"], validate=True))
    picture.info["name"] = str(part["name"])
    return picture


def role(name: str) -> Any:
    if name not in get_args(Role):
        raise KeyError(name)
    return name


def png(picture: Image.Image) -> bytes:
    into = io.BytesIO()
    picture.save(into, "PNG")
    return into.getvalue()


def read_json(path: Path) -> Any:
    if not exists(path):
        raise ValueError(no_file(path))
    if not path.is_file():
        raise ValueError(f"{path} is no ordinary file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def write_file(path: Path, content: bytes) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file in it")
    write(path, content)
