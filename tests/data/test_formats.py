import csv
import json
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from PIL import Image

from bridges.data.conversation import images_of
from bridges.data.formats import Rows
from bridges.data.formats import rows as reading
from bridges.data.formats.text import json_array
from bridges.data.pictures import BrokenPicture, SkipBroken

RED, BLUE = (255, 0, 0), (0, 0, 255)
ODD = 'drôle de "chat", 猫\'s\u2028.png'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures, and a cache that goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data" / "more").mkdir(parents=True)
    for name, colour in (("red.png", RED), ("blue.png", BLUE), ("more/red.png", RED), (ODD, BLUE)):
        Image.new("RGB", (2, 2), colour).save(tmp_path / "data" / name)
    return tmp_path / "data"


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def seen(rows: Rows) -> list:
    """Every row as (kind, [(role, parts)]) for each conversation, with a picture's colour in the place of the picture."""

    def part(p):
        return p if isinstance(p, str) else p.getpixel((0, 0))

    return [
        [(c.kind, [(t.role, [part(p) for p in t.content]) for t in c.turns]) for c in rows[i].conversations]
        for i in range(len(rows))
    ]


def chat(*parts: dict, answer: object = "A square.") -> dict:
    return {"messages": [{"role": "user", "content": [*parts]}, {"role": "assistant", "content": answer}]}


def words(text: str) -> dict:
    return {"type": "text", "text": text}


def shown(path: str) -> dict:
    return {"type": "image", "path": path}


def llava(image: object, *values: str, **more: object) -> dict:
    speakers = ["human", "gpt"] * len(values)
    said = [{"from": speaker, "value": value} for speaker, value in zip(speakers, values, strict=False)]
    return {"id": "1", **({} if image is None else {"image": image}), "conversations": said, **more}


def test_chats_keep_their_order_of_words_and_pictures_whatever_form_the_content_has(folder: Path):
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]},
        chat(words("Is"), shown("red.png"), words("like"), shown("more/red.png"), answer=[words("Yes")]),
        chat(shown(ODD), words("?")),
        chat(words("no picture")),
    ]
    assert seen(Rows(write(folder / "chats.jsonl", rows))) == [
        [("chat", [("system", ["Be brief."]), ("user", ["Hello"])])],
        [("chat", [("user", ["Is", RED, "like", RED]), ("assistant", ["Yes"])])],
        [("chat", [("user", [BLUE, "?"]), ("assistant", ["A square."])])],
        [("chat", [("user", ["no picture"]), ("assistant", ["A square."])])],
    ]


def test_a_llava_picture_stands_where_its_marker_stood(folder: Path):
    rows = [
        llava("red.png", "<image>\nWhat colour?", "Red.", "And now?", "Still red."),
        llava("blue.png", "What colour?\n<image>", "Blue."),
        llava(["red.png", "blue.png"], "Left <image> and right <image>.\n", "Two."),
        llava(["red.png", "blue.png"], "<image>", "Red.", "<image>\n", "Blue."),
        llava(None, "Hello\n", "Hi"),
    ]
    (folder / "llava.json").write_text(json.dumps(rows, indent=2), encoding="utf-8")
    expected = [
        [
            ("user", [RED, "What colour?"]),
            ("assistant", ["Red."]),
            ("user", ["And now?"]),
            ("assistant", ["Still red."]),
        ],
        [("user", ["What colour?", BLUE]), ("assistant", ["Blue."])],
        [("user", ["Left ", RED, " and right ", BLUE, ".\n"]), ("assistant", ["Two."])],
        [("user", [RED]), ("assistant", ["Red."]), ("user", [BLUE]), ("assistant", ["Blue."])],
        [("user", ["Hello\n"]), ("assistant", ["Hi"])],
    ]
    expected = [[("chat", turns)] for turns in expected]
    assert seen(Rows(folder / "llava.json")) == expected
    assert seen(Rows(write(folder / "llava.jsonl", rows))) == expected


def test_llava_keeps_the_system_turn_and_drops_an_answer_to_nothing(folder: Path):
    start = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello"}]
    lone = [{"from": "gpt", "value": "lost"}, {"from": "human", "value": "Hello"}]
    rows = Rows(write(folder / "a.jsonl", [{"conversations": start}, {"conversations": lone}]))
    assert seen(rows) == [
        [("chat", [("system", ["Be brief."]), ("user", ["Hello"])])],
        [("chat", [("user", ["Hello"])])],
    ]


@pytest.mark.parametrize("column", ["caption", "text", "title"])
@pytest.mark.parametrize("key", ["path", "image", "file_name", "filepath"])
def test_captions_are_read_alike_from_csv_tsv_json_lines_and_an_array(folder: Path, key: str, column: str):
    pairs = [("red.png", 'A "red" square,\nplain'), (ODD, "Un carré bleu 猫")]
    rows = [{key: picture, "extra": "1", column: caption} for picture, caption in pairs]
    files = [write(folder / "a.jsonl", rows), folder / "a.json", folder / "a.csv", folder / "a.tsv"]
    files[1].write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    for file, dialect in zip(files[2:], ("excel", "excel-tab"), strict=True):
        with file.open("w", newline="", encoding="utf-8-sig") as text:
            table = csv.DictWriter(text, rows[0].keys(), dialect=dialect)
            table.writeheader()
            table.writerows(rows)
    for file in files:
        assert seen(Rows(file, prompts=["What is it?"])) == [
            [("caption", [("user", [colour, "What is it?"]), ("assistant", [caption])])]
            for colour, (_, caption) in zip((RED, BLUE), pairs, strict=True)
        ], file


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_image_folder_is_read_by_its_metadata(folder: Path, name: str):
    if name.endswith("csv"):
        (folder / name).write_text("file_name,text\nmore/red.png, A red square\n")
    else:
        write(folder / name, [{"file_name": "more/red.png", "text": "A red square"}])
    rows = Rows(folder)
    assert seen(rows) == [[("caption", [("user", [RED, "Describe the image."]), ("assistant", ["A red square"])])]]


def test_captions_of_one_picture_become_one_example_with_one_picture(folder: Path):
    pairs = [("red.png", "r1"), ("blue.png", "b1"), ("red.png", "r2"), ("more/red.png", "m"), ("red.png", "r3")]
    rows = Rows(write(folder / "a.jsonl", [{"path": p, "caption": c} for p, c in pairs]))
    captions = [[c.turns[1].content[0] for c in rows[i].conversations] for i in range(len(rows))]
    assert captions == [["r1", "r2", "r3"], ["b1"], ["m"]]
    pictures = [picture for c in rows[0].conversations for picture in images_of(c.turns)]
    assert len(pictures) == 3
    assert all(picture is pictures[0] for picture in pictures)


def test_a_prompt_is_drawn_by_the_number_of_the_example_and_all_prompts_are_used(folder: Path):
    prompts = ("one", "two", "three")
    rows = Rows(write(folder / "a.jsonl", [{"path": "red.png", "caption": str(i)} for i in range(3)]), prompts=prompts)
    drawn = [c.turns[0].content[1] for c in rows[0].conversations]
    assert drawn == [c.turns[0].content[1] for c in rows[0].conversations]
    file = write(folder / "b.jsonl", [{"path": f"{i}/../red.png", "caption": "c"} for i in range(60)])
    for i in range(60):
        (folder / str(i)).mkdir()
    drawn = [e.conversations[0].turns[0].content[1] for e in Rows(file, prompts=prompts)]
    assert all(drawn.count(prompt) > 8 for prompt in prompts)


def test_a_kind_replaces_the_usual_one(folder: Path):
    rows = Rows(write(folder / "a.jsonl", [{"path": "red.png", "caption": "c"}]), kind="colour")
    assert rows[0].conversations[0].kind == "colour"


def test_relative_paths_start_from_the_folder_of_images_and_absolute_ones_do_not(folder: Path):
    rows = [{"path": "red.png", "caption": "c"}, {"path": str(folder / "blue.png"), "caption": "c"}]
    file = write(folder.parent / "a.jsonl", rows)
    assert [row[0][1][0][1][0] for row in seen(Rows(file, images=folder / "more"))] == [RED, BLUE]
    with pytest.raises(BrokenPicture, match="no file"):
        Rows(file)[0]


def test_rows_are_counted_as_in_a_list(folder: Path):
    rows = Rows(write(folder / "a.jsonl", [{"path": p, "caption": p} for p in ("red.png", "blue.png")]))
    assert [e.conversations[0].turns[1].content for e in rows] == [["red.png"], ["blue.png"]]
    assert rows[-1].conversations[0].turns[1].content == ["blue.png"]
    with pytest.raises(IndexError):
        rows[2]


def test_a_broken_picture_is_met_when_its_row_is_asked_for_and_can_be_skipped(folder: Path):
    names = ["red.png", "blu.png", "blue.png"]
    rows = SkipBroken(Rows(write(folder / "a.jsonl", [{"path": name, "caption": name} for name in names])))
    assert rows[1].conversations[0].turns[1].content == ["blue.png"]
    assert f"row 1: no file {folder}/blu.png; nearest name: {folder}/blue.png" in rows.summary()


ARRAY = '[{"path": "red.png", "caption": "a"},\n {"path": "red.png", "caption": '
GOOD = '{"path": "red.png", "caption": "a"}\n'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "has no rows"),
        (" \n\n", "has no rows"),
        ("[]", "has no rows"),
        ("path,caption\n", "has no rows"),
        (GOOD + "\n{'path': 1}\n", "line 3: not JSON: Expecting property name .* at column 2"),
        (ARRAY, r"row 2 \(line 2\): not JSON"),
        (ARRAY + "oops}]", r"row 2 \(line 2\): not JSON: Expecting value"),
        (GOOD + "[1]\n", r"line 2: expected an object, found \[1\]"),
        ("[1, 2]", "row 1: expected an object, found 1"),
        (
            GOOD + '{"url": "a", "words": "b"}',
            r"line 2: expected messages .*LLaVA.*path.*caption.*; found keys url, words",
        ),
        (
            "red.png,A red square\nblue.png,A blue one\n",
            "line 2: expected messages .*; found keys red.png, A red square",
        ),
        (GOOD + '{"path": 3, "caption": "a"}', "line 2: path must be a path, .* and not empty; found 3"),
        (GOOD + '{"path": "red.png", "caption": " "}', "line 2: caption must be text and not empty"),
        (GOOD + '{"path": "red.png", "caption": "\\ud83d"}', "line 2: .*surrogates not allowed"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "line 1: .*surrogates not allowed"),
        (GOOD + '{"messages": [{"role": "user", "content": "a"}]}', "line 2: a file holds chats or captions, not both"),
        ('{"messages": []}', "line 1: messages must be a list of turns and not empty"),
        ('{"messages": ["hello"]}', "line 1: a message must have a role and a content .* found 'hello'"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "line 1: a turn is by system, user.* found 'tool'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1: 1 <image> markers and 0 images"),
        ('{"conversations": [{"from": "human", "text": "a"}]}', "line 1: a turn must have a from and a value"),
        ('{"conversations": [{"from": "human", "value": "a"}], "image": 3}', "line 1: image must be a path or a list"),
        (
            '{"conversations": [{"from": "human", "value": "a"}], "image": "b"}',
            "line 1: 0 <image> markers and 1 images",
        ),
        ('{"conversations": [{"from": "human", "value": "<image>"}]}', "line 1: 1 <image> markers and 0 images"),
        ("path,caption\nred.png,a\nred.png,b, c\n", "line 3: 3 fields, the header has 2; quote a field that holds ','"),
        ("path,caption\nred.png\n", "line 2: 1 fields, the header has 2"),
        ('path,caption\nred.png,"a\nred.png,b\n', "line 2: unexpected end of data"),
        (b"\x89PNG\r\n\x1a\n\xff", "is not UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_with_the_file_and_the_row(folder: Path, text: str | bytes, line: str):
    file = folder / "a.jsonl"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=line) as error:
        Rows(file)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named_with_the_nearest_name(folder: Path):
    write(folder / "chats.jsonl", [chat(words("Hello"))])
    with pytest.raises(ValueError, match=r"no file .*chat\.jsonl; nearest name: .*chats\.jsonl"):
        Rows(folder / "chat.jsonl")
    with pytest.raises(ValueError, match=r"no file .*Data; nearest name: .*data"):
        Rows(folder / "chats.jsonl", images=folder.parent / "Data")
    with pytest.raises(ValueError, match=r"neither metadata\.jsonl nor metadata\.csv"):
        Rows(folder)
    with pytest.raises(ValueError, match="prompts is empty"):
        Rows(folder / "chats.jsonl", prompts=())


def test_a_file_that_has_changed_is_read_again_and_one_that_has_not_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    file = write(folder / "a.jsonl", [{"path": "red.png", "caption": "old"}])
    Rows(file)
    write(file, [{"path": "red.png", "caption": "new"}])
    assert Rows(file)[0].conversations[0].turns[1].content == ["new"]
    monkeypatch.setattr(reading, "entries", None)  # whoever reads a row now, fails
    assert Rows(file)[0].conversations[0].turns[1].content == ["new"]


def test_rows_of_an_array_are_cut_right_wherever_the_chunks_end(folder: Path):
    rows = [{"a": '[]{},\\"é', "b": [1.5, None, {"c": "]"}]}, {}, {"d": "\n" * 5}, {"e": "x" * 40}]
    for indent in (None, 2):
        (folder / "a.json").write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        for chunk in (*range(1, 12), 1000):
            with (folder / "a.json").open(encoding="utf-8") as text:
                assert list(json_array(text, chunk)) == [(f"row {i}", row) for i, row in enumerate(rows, 1)]


def test_a_malformed_row_of_an_array_is_named_with_its_line_wherever_the_chunks_end(folder: Path):
    (folder / "a.json").write_text('[\n{"a": 1},\n\n{"a": oops}\n]')
    for chunk in (1, 5, 1000):
        with (
            (folder / "a.json").open(encoding="utf-8") as text,
            pytest.raises(ValueError, match=r"row 2 \(line 4\): not JSON"),
        ):
            list(json_array(text, chunk))


def test_the_rows_stay_on_disk_and_travel_to_a_worker_without_their_texts(folder: Path):
    long = "x" * 1000
    captions = Rows(write(folder / "a.jsonl", [{"path": "red.png", "caption": f"{i} {long}"} for i in range(2000)]))
    held = pa.total_allocated_bytes()
    chats = Rows(write(folder / "b.jsonl", [chat(words(f"{i} {long}")) for i in range(2000)]))
    assert (folder / "b.jsonl").stat().st_size > 2_000_000
    assert pa.total_allocated_bytes() - held < 300_000
    for rows in (captions, chats):
        assert len(pickle.dumps(rows)) < 100_000
    assert seen(pickle.loads(pickle.dumps(chats)))[1999][0][1][0] == ("user", [f"1999 {long}"])
