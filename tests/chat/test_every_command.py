"""Every command on a real session: what it does, what it refuses, and ten thousand lines of nonsense."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from bridges.build import build
from bridges.checkpoint import save_checkpoint
from bridges.data.conversation import Turn, images_of
from bridges.data.formats import Rows
from bridges.inference.session import Session
from bridges.inference.settings import NAMES
from chat.commands import COMMANDS, obey
from chat.files import png
from chat.lab import blank, shuffled
from chat.paths import interleaved
from chat.show import thumbnail
from chat.state import Chat

pytest_plugins = ["talking"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pictures: list[Image.Image]) -> Path:
    """The current folder, with three pictures."""
    for name, picture in zip(("red.png", "my blue.png", "old.png"), pictures, strict=True):
        picture.save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def say(chat: Chat) -> Callable[[str], str]:
    """The line's answer, or what is told."""

    def line(text: str) -> str:
        told = obey(chat, text)
        return "".join(chat.stream()) if told is None else told

    return line


Say = Callable[[str], str]


def test_a_picture_stands_where_its_path_does(folder: Path) -> None:
    parts = interleaved('Is @red.png like @"my blue.png", or @my\\ blue.png? Mail me@x.com or @nobody. @old.png.')
    shape = [part if isinstance(part, str) else part.size for part in parts]
    mail = "? Mail me@x.com or @nobody. "
    assert shape == ["Is ", (32, 32), " like ", (40, 48), ", or ", (40, 48), mail, (64, 20), "."]
    assert interleaved("") == [""]


def test_a_picture_that_is_missing_amid_a_message_is_told_and_nothing_is_said(chat: Chat, folder: Path) -> None:
    obey(chat, "/image old.png")
    with pytest.raises(ValueError, match=r"no file redd.png; nearest name: red.png"):
        obey(chat, "What is in @redd.png?")
    assert chat.session.turns == []
    assert len(chat.pictures) == 1


def test_images_are_listed_and_dropped_wherever_they_are(chat: Chat, say: Say, folder: Path) -> None:
    assert "no pictures yet" in say("/images")
    say("/image red.png 'my blue.png'")
    say("What?")
    say("/image old.png")
    first, _, third = say("/images").splitlines()
    assert first == "1  red.png (32 × 32, 16 slots)"
    assert third.endswith("goes with your next message")
    assert "my blue.png" in say("/drop 2")
    assert "old.png" in say("/drop 2")
    assert chat.pictures == []
    assert len(images_of(chat.session.turns)) == 1
    assert say("And?") == "".join(fresh(chat))
    for wrong in ("", "0", "2", "x", "²", "-1"):
        with pytest.raises(ValueError, match="1 to 1"):
            obey(chat, f"/drop {wrong}")


def fresh(chat: Chat) -> str:
    """The last answer by a session that has read nothing."""
    session = Session(chat.session.assembled)
    session.turns = chat.session.turns[:-1]
    return "".join(session.stream(4))


def test_the_system_text_and_the_settings_are_shown_and_changed(chat: Chat, say: Say) -> None:
    assert "no system text" in say("/system")
    say("Hello")
    say("/system Be short.")
    say("/system Be kind.")
    assert say("/system") == "system: Be kind."
    assert [turn.role for turn in chat.session.turns] == ["system", "user", "assistant"]
    assert say("Why?") == fresh(chat)
    assert say("/set top_k 5") == "top_k = 5"
    assert say("/set stop ##") == "stop = ##"
    assert len(say("/set").splitlines()) == len(NAMES)
    with pytest.raises(ValueError, match="did you mean top_k"):
        say("/set topk 5")
    say("/clear")
    assert chat.session.turns == [Turn("system", ["Be kind."])]


def test_undo_retry_and_edit_change_the_last_exchange(chat: Chat, say: Say, folder: Path) -> None:
    for line in ("/undo", "/retry", "/edit", "/edit x", "/look"):
        with pytest.raises(ValueError, match="nothing"):
            say(line)
    say("/image red.png")
    first = say("What?")
    assert say("/retry") == first
    say("/set temperature 5")
    assert len({say("/retry") for _ in range(4)}) > 1
    say("/set temperature 0")
    say("/edit Where is it?")
    assert chat.session.turns[0].content[1:] == ["Where is it?"]
    assert isinstance(chat.session.turns[0].content[0], Image.Image)
    assert len(chat.session.turns) == 2
    say("/edit")
    assert chat.draft == "/edit Where is it?"
    assert say("/undo") == "taken back: Where is it? and its pictures"
    assert chat.session.turns == []
    assert chat.session.looker.features.encoded == 1


@pytest.mark.parametrize("line", ["/retry", "/edit Again?", "More?"])
def test_an_answer_that_finds_no_room_leaves_everything_as_it_was(
    chat: Chat, say: Say, folder: Path, line: str
) -> None:
    say("Hello")
    obey(chat, "/image red.png")
    before = list(chat.session.turns)
    chat.settings = replace(chat.settings, max_new_tokens=5000)
    with pytest.raises(ValueError, match="exceed"):
        say(line)
    assert chat.session.turns == before
    assert len(chat.pictures) == 1


def test_several_lines_are_one_message(chat: Chat, say: Say) -> None:
    say("/multiline")
    assert [say(line) for line in ("One\n", "", "/help", "  two")] == [""] * 4
    assert say(".") == fresh(chat)
    assert chat.session.turns[0] == Turn("user", ["One\n\n/help\n  two"])
    say("/multiline")
    assert say(".") == "nothing was written"
    assert chat.lines is None


def test_a_conversation_is_saved_and_gone_on_with(chat: Chat, say: Say, folder: Path) -> None:
    say("/system Be short.")
    say("/set seed 7")
    say("What is in @red.png and @'my blue.png'?")
    say("/image old.png")
    assert say("/save talk.json") == "saved: 3 turns and 3 pictures in talk.json"
    other = Chat(Session(chat.session.assembled))
    assert obey(other, "/load talk.json") == "3 turns and 3 pictures from talk.json"
    assert other.settings == chat.settings
    assert "red.png" in (obey(other, "/images") or "")
    assert obey(other, "/history") == say("/history")
    obey(other, "And?")
    assert "".join(other.stream()) == fresh(other)
    assert [png(picture) for picture in other.all_pictures()] == [png(picture) for picture in chat.all_pictures()]


def test_files_that_are_no_conversation_are_one_line_and_change_nothing(chat: Chat, say: Say, folder: Path) -> None:
    say("What is in @red.png?")
    say("/save talk.json")
    kept, before = json.loads(Path("talk.json").read_text()), list(chat.session.turns)
    files = {
        "form 99": {**kept, "form": 99},
        "no conversation": {"turns": []},
        "is broken": {**kept, "turns": [{"role": "robot", "content": []}]},
        "is broken: KeyError": {**kept, "turns": [{"role": "user", "content": [{"video": 1}]}]},
        "not a picture": {**kept, "waiting": [{"image": "QUJD", "name": "x"}]},
        "did you mean temperature": {**kept, "settings": {"temprature": 1}},
        "below 0": {**kept, "settings": {"temperature": -1}},
    }
    for message, content in files.items():
        Path("bad.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as error:
            say("/load bad.json")
        assert "\n" not in str(error.value)
    for content in (b"{", b"\xff\xfe", b"[" * 100_000):
        Path("bad.json").write_bytes(content)
        with pytest.raises(ValueError, match="no JSON"):
            say("/load bad.json")
    for line, message in [
        ("/load tlak.json", "nearest name: talk.json"),
        ("/load .", "no ordinary file"),
        ("/load /dev/zero", "no ordinary file"),
        ("/image /dev/zero", "no ordinary file"),
        ("/load", "needs one path"),
        ("/save a b", "needs one path"),
        ("/save .", "is a folder"),
        ("/save red.png/x", "/save: "),
        ("/export talk.txt", "writes .md"),
        ("/compare nowhere", "no checkpoint in nowhere"),
        ("/bridge nowhere", "no checkpoint in nowhere"),
    ]:
        with pytest.raises(ValueError, match=message):
            say(line)
    assert chat.session.turns == before
    Path("other.json").write_text(json.dumps({**kept, "towers": {"vision": "X", "language": "Y"}}))
    assert "it was held with X and Y, and goes on with" in say("/load other.json")


def test_an_export_is_read_again_as_training_data(chat: Chat, say: Say, folder: Path) -> None:
    say("What is in @red.png and @'my blue.png'?")
    say("And?")
    assert say("/export talk.json") == "written: talk.json, and 2 pictures in talk_pictures"
    [conversation] = Rows(Path("talk.json"))[0].conversations
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2
    assert [png(picture) for picture in images_of(conversation.turns)] == [png(p) for p in chat.all_pictures()]
    assert conversation.turns[1].content == chat.session.turns[1].content
    say("/export talk.md")
    text = Path("talk.md").read_text()
    assert "![red.png](talk_pictures/1.png)" in text
    assert "**you**\n\nAnd?" in text
    chat.session.append(Turn("user", ["<image>"]))
    with pytest.raises(ValueError, match=r"export it as .md"):
        say("/export talk.json")


def test_what_is_told_of_the_conversation_is_so(chat: Chat, say: Say, folder: Path) -> None:
    assert say("/history") == "nothing was said yet"
    assert say("/stats") == "no answer yet"
    assert say("/tokens") == "     0  in all of 512, 0%"
    say("/system Be short.")
    first = say("What is in @red.png?")
    assert say("/history") == f"system: Be short.\nyou: What is in [red.png] ?\nmodel: {first}"
    counts = [int(line.split()[0]) for line in say("/tokens").splitlines()]
    assert counts[-1] == chat.session.size() == sum(counts[:-1])
    say("And?")
    assert "pictures: 0 encoded, 1 known before" in say("/stats")
    assert f"{chat.session.spent.read} tokens read, {chat.session.spent.kept} known before" in say("/stats")


def test_look_asks_with_other_pictures_and_leaves_the_talk_as_it_is(chat: Chat, say: Say, folder: Path) -> None:
    say("What is in @red.png?")
    before = list(chat.session.turns)
    told = say("/look").splitlines()
    assert [line.split()[0] for line in told] == ["as", "blank", "shuffled", "the"]
    assert told[0] == f"as it is  {' '.join(str(before[-1].content[0]).split())}"
    assert chat.session.turns == before
    picture = Image.open("red.png")
    assert shuffled(picture).size == blank(picture).size == picture.size
    assert sorted(shuffled(picture).tobytes()) == sorted(picture.tobytes())
    assert png(shuffled(picture)) != png(picture)


def test_another_bridge_answers_beside_and_instead(chat: Chat, say: Say, folder: Path) -> None:
    recipe = replace(chat.session.assembled.recipe, bridge={"name": "resampler", "latents": 3, "depth": 1})
    other = build(recipe)
    save_checkpoint(Path("other"), other)
    say("What is in @red.png?")
    [asked, said] = chat.session.turns
    session = Session(other)
    session.append(asked)
    theirs = "".join(session.stream(4))
    told = say("/compare other")
    assert theirs.split()[0] in told
    assert chat.session.turns == [asked, said]
    assert "resampler of other, 3 slots" in say("/bridge other")
    assert chat.session.assembled.model.language is not other.model.language
    assert say("/retry") == theirs
    assert chat.session.looker.features.encoded == 1, "the towers are kept, and so is what they saw"


def test_a_thumbnail_is_small() -> None:
    rows = "".join(segment.text for segment in thumbnail(Image.new("RGB", (4000, 2500), "red")).segments).splitlines()
    assert len(rows) <= 12
    assert {len(row) for row in rows} == {32}


def test_ten_thousand_lines_of_nonsense_are_told_or_said(chat: Chat, folder: Path) -> None:
    draw = random.Random(0)
    names = [*COMMANDS, *(name[:-1] for name in COMMANDS), "/", "@", "", "hello", "/IMAGE", "//"]
    free = [name for name in names if name not in ("/save", "/export")]  # they write what they are told to
    bits = [
        "red.png",
        "@red.png",
        "'",
        '"',
        "\\",
        " ",
        "\t",
        "\0",
        "é",
        "🙂",
        "\ud800",
        "=",
        "0",
        "-1",
        "9" * 40,
        "~",
        "~x",
    ]
    bits += [
        ".",
        "..",
        "\n",
        "nan",
        "temperature",
        "stop",
        "{",
        "<image>",
        "\ufdd0",
        "\x1b[2J",
        "x" * 300,
        "*",
        "%s",
        "|",
    ]
    chat.session.append(Turn("user", ["Hello"]))
    for _ in range(10_000):
        line = draw.choice(free) + "".join(draw.choice([" ", ""]) + draw.choice(bits) for _ in range(draw.randrange(5)))
        try:
            told = obey(chat, line)
        except (ValueError, EOFError) as error:
            told = str(error)
        assert told is None or isinstance(told, str)
        chat.pictures.clear()
        chat.session.turns[:] = [Turn("user", ["Hello"]), Turn("assistant", ["Hi"])][: draw.randrange(3)]
