"""What a line means, tried on a real session."""

from pathlib import Path

import pytest
from PIL import Image

from bridges.data.conversation import Turn
from chat.commands import COMMANDS, obey
from chat.paths import paths_in
from chat.state import Chat

pytest_plugins = ["talking"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder and home, with a few pictures."""
    names = ("cat.png", "my dog.png", "it's.png", "a/cat.png", "tab\tle.png")
    for size, name in enumerate(names, start=10):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (size, 40)).save(tmp_path / name)
    (tmp_path / "note.png").write_text("not a picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def widths(chat: Chat) -> list[int]:
    return [picture.width for picture in chat.pictures]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("cat.png", [10]),
        ("  cat.png  ", [10]),
        ("'my dog.png'", [11]),
        ('"my dog.png"', [11]),
        ("my\\ dog.png", [11]),
        ("my dog.png", [11]),
        ("it's.png", [12]),
        ('"it\'s.png"', [12]),
        ("~/cat.png", [10]),
        ("'~/my dog.png'", [11]),
        ("cat.png 'my dog.png' ~/a/cat.png", [10, 11, 13]),
        ("cat.png cat.png", [10, 10]),
        ("tab\tle.png", [14]),
    ],
)
def test_image_takes_paths_as_people_write_them(chat: Chat, folder: Path, argument: str, expected: list[int]) -> None:
    assert obey(chat, f"/image {argument}")
    assert widths(chat) == expected


def test_image_says_the_size_and_the_slots_of_each_picture(chat: Chat, folder: Path) -> None:
    told = obey(chat, "/image cat.png 'my dog.png'")
    assert told == "goes with your next message: cat.png (10 × 40, 16 slots), my dog.png (11 × 40, 16 slots)"
    assert chat.session.assembled.template.num_slots == 16


def test_pictures_of_several_commands_wait_together(chat: Chat, folder: Path) -> None:
    obey(chat, "/image cat.png")
    obey(chat, "/image a/cat.png")
    assert widths(chat) == [10, 13]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/image", "/image needs the path of a picture"),
        ("/image ''", "it is a folder|needs the path"),
        ("/image cta.png", "no file cta.png; nearest name: cat.png"),
        ("/image cat.png dgo.png", "no file dgo.png"),
        ("/image note.png", "cannot open note.png: not a picture"),
        ("/image a", "cannot open a: it is a folder"),
        ("/image " + "x" * 5000, "name too long"),
        ("/imgae cat.png", "no command /imgae; did you mean /image?"),
        ("/HELP", "no command /HELP; did you mean /help?"),
        ("/zzz", "no command /zzz; /help lists them"),
        ("/", "it is a folder"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_attaches_nothing(
    chat: Chat, folder: Path, line: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        obey(chat, line)
    assert "\n" not in str(error.value)
    assert chat.pictures == []


@pytest.mark.parametrize(
    "line", ["{}/cat.png", "'{}/my dog.png'", "{}/my dog.png", "{}/cat.png '{}/my dog.png'", "~/cat.png"]
)
def test_a_line_of_paths_that_exist_is_pictures(chat: Chat, folder: Path, line: str) -> None:
    told = obey(chat, line.format(folder, folder))
    assert told is not None
    assert told.startswith("goes with your next message")
    assert len(chat.pictures) == 1 + ("' '" in line or ".png '" in line)


@pytest.mark.parametrize(
    "line",
    [
        "What is in the picture?",
        "it's an \"open quote",
        "cat.png",
        "~nobody is here",
        "is /image a command?",
        "long " * 2000,
        "a\0b",
        "猫 🙂",
    ],
)
def test_anything_else_is_a_message(chat: Chat, folder: Path, line: str) -> None:
    assert obey(chat, line) is None
    assert chat.session.turns == [Turn("user", [line.strip()])]


def test_clear_forgets_the_talk_and_the_waiting_pictures(chat: Chat, folder: Path) -> None:
    obey(chat, "/image cat.png")
    chat.session.append(Turn("user", ["Hello"]))
    list(chat.session.stream(4))
    assert obey(chat, "/clear")
    assert chat.pictures == []
    assert chat.session.turns == []


def test_help_names_every_command_with_its_meaning(chat: Chat) -> None:
    told = (obey(chat, "/help") or "").splitlines()
    assert len(told) == len(COMMANDS)
    for line, (name, command) in zip(told, COMMANDS.items(), strict=True):
        assert line.startswith(name)
        assert line.endswith(command.help)


def test_exit_leaves(chat: Chat) -> None:
    with pytest.raises(EOFError):
        obey(chat, "/exit")


def test_a_text_without_paths_has_none() -> None:
    assert paths_in("  ") == []


def test_a_file_url_is_the_file_that_it_means(folder: Path) -> None:
    url = (folder / "my dog.png").as_uri()
    assert "%20" in url
    assert paths_in(f"{url} cat.png") == [folder / "my dog.png", Path("cat.png")]
