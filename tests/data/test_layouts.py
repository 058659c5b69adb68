"""Every public layout, written as its makers do, is read back equal, and the same sample in each gives the same tensors."""

import csv
import io
import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from bridges.build import Assembled
from bridges.config import Data
from bridges.data.batch import collate, rows_of
from bridges.data.conversation import ask
from bridges.data.formats import Rows
from bridges.data.formats.entries import entries
from bridges.data.formats.hub import split_rows
from bridges.data.sources import open_split

ASKED, SAID = "What is it?", "A red square."
NAME = "000000000042"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One picture under the names that the layouts give it, and a cache that goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = tmp_path / "data"
    for name in ("a.png", "image/42.jpg", f"COCO_train2014_{NAME}.jpg", f"train2014/{NAME}.jpg", "42.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "red").save(root / name, "PNG")  # of any ending, so that pixels are equal
    return root


def put(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def picture(folder: Path) -> bytes:
    return (folder / "a.png").read_bytes()


def struct(folder: Path) -> dict[str, Any]:
    return {"bytes": picture(folder), "path": "a.png"}


def parquet(folder: Path, row: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist([row]), folder / "train-00000-of-00001.parquet")
    return folder / "train-00000-of-00001.parquet"


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def said(**user: Any) -> list[dict[str, Any]]:
    return [{"role": "user", **user}, {"role": "assistant", "content": SAID}]


TEXT = {"type": "text", "text": ASKED}


def messages(folder: Path) -> Path:
    return put(folder / "a.jsonl", {"messages": said(content=[{"type": "image"}, TEXT]), "images": ["a.png"]})


def messages_in_parquet(folder: Path) -> Path:
    """As `datasets` writes it: every part has every key."""
    parts = [{"type": "image", "text": None}, TEXT]
    answer = [{"type": "text", "text": SAID}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return parquet(folder, {"messages": chat, "images": [struct(folder)]})


def messages_without_a_place(folder: Path) -> Path:
    return put(folder / "a.json", [{"messages": said(content=ASKED), "image": (folder / "a.png").as_uri()}])


def prompt_and_completion(folder: Path) -> Path:
    chat = said(content=ASKED)
    return parquet(folder, {"prompt": chat[:1], "completion": chat[1:], "images": [struct(folder)]})


def prompt_and_completion_as_text(folder: Path) -> Path:
    return put(folder / "a.jsonl", {"prompt": f"<image>{ASKED}", "completion": SAID, "image": "a.png"})


def llava(folder: Path) -> Path:
    turns = [{"from": "human", "value": f"<image>\n{ASKED}"}, {"from": "gpt", "value": SAID}]
    return put(folder / "a.json", [{"id": "1", "image": "a.png", "conversations": turns}])


def sharegpt(folder: Path) -> Path:
    turns = [{"from": "human", "value": f"<image>{ASKED}"}, {"from": "gpt", "value": SAID}]
    return put(folder / "a.json", [{"conversations": turns, "images": ["a.png"]}])


def cauldron(folder: Path) -> Path:
    texts = [{"user": ASKED, "assistant": SAID, "source": "made"}]
    return parquet(folder, {"images": [struct(folder)], "texts": texts, "relevance_ratings": [5]})


def vqav2(folder: Path) -> Path:
    question = {"image_id": 42, "question": ASKED, "question_id": 42001}
    answers = [{"answer": SAID, "answer_confidence": "yes", "answer_id": i} for i in range(1, 11)]
    answer = {"question_type": "what is", "multiple_choice_answer": SAID, "answers": answers, "image_id": 42}
    about = {"info": {"year": 2017}, "license": {}, "data_subtype": "train2014", "data_type": "mscoco"}
    put(
        folder / "v2_mscoco_train2014_annotations.json",
        {**about, "annotations": [{**answer, "answer_type": "other", "question_id": 42001}]},
    )
    path = folder / "v2_OpenEnded_mscoco_train2014_questions.json"
    return put(path, {**about, "task_type": "Open-Ended", "questions": [question]})


def questions_in_csv(folder: Path) -> Path:
    with (folder / "a.csv").open("w", newline="") as text:
        csv.writer(text).writerows([["image", "question", "answer"], ["a.png", ASKED, SAID]])
    return folder / "a.csv"


def webdataset_json(folder: Path) -> Path:
    row = json.dumps({"messages": said(content=[{"type": "image"}, TEXT])}).encode()
    return tar(folder / "shard-0000.tar", {f"{NAME}.png": picture(folder), f"{NAME}.json": row})


CHATS = [
    messages,
    messages_in_parquet,
    messages_without_a_place,
    prompt_and_completion,
    prompt_and_completion_as_text,
    llava,
    sharegpt,
    cauldron,
    vqav2,
    questions_in_csv,
    webdataset_json,
]


def coco(folder: Path) -> Path:
    image = {"id": 42, "file_name": f"train2014/{NAME}.jpg", "height": 30, "width": 40, "license": 1}
    note = {"image_id": 42, "id": 7, "caption": SAID}
    return put(
        folder / "captions_train2014.json", {"info": {}, "images": [image], "licenses": [], "annotations": [note]}
    )


def karpathy(folder: Path) -> Path:
    sentence = {"tokens": ["a"], "raw": SAID, "imgid": 0, "sentid": 7}
    image = {"filepath": "train2014", "filename": f"{NAME}.jpg", "cocoid": 42, "imgid": 0, "sentids": [7]}
    return put(
        folder / "dataset_coco.json",
        {"images": [{**image, "split": "restval", "sentences": [sentence]}], "dataset": "coco"},
    )


def minigpt4(folder: Path) -> Path:
    put(folder / "filter_cap.json", {"annotations": [{"image_id": "42", "caption": SAID}]})
    return folder


def captions_in_csv(folder: Path) -> Path:
    (folder / "a.csv").write_text(f"path,caption\na.png,{SAID}\n")
    return folder / "a.csv"


def captions_in_parquet(folder: Path) -> Path:
    return parquet(folder, {"image": struct(folder), "caption_0": SAID})


def captions_in_parquet_as_bytes(folder: Path) -> Path:
    return parquet(folder, {"image": picture(folder), "text": SAID})


def imagefolder(folder: Path) -> Path:
    put(folder / "metadata.jsonl", {"file_name": "a.png", "text": SAID})
    return folder


def imagefolder_parquet(folder: Path) -> Path:
    parquet(folder, {"file_name": "a.png", "text": SAID}).rename(folder / "metadata.parquet")
    return folder


def webdataset(folder: Path) -> Path:
    members = {f"./some/{NAME}.png": picture(folder), f"./some/{NAME}.txt": SAID.encode()}
    return tar(folder / "shard-0000.tar", members)


def webdataset_folder(folder: Path) -> Path:
    """As img2dataset writes it: caption beside json beside picture."""
    about = json.dumps({"caption": SAID, "url": "https://a.b/c.jpg", "key": NAME, "width": 40}).encode()
    tar(folder / "00000.tar", {f"{NAME}.jpg": picture(folder), f"{NAME}.json": about, f"{NAME}.txt": SAID.encode()})
    return folder


CAPTIONS = [
    coco,
    karpathy,
    minigpt4,
    captions_in_csv,
    captions_in_parquet,
    captions_in_parquet_as_bytes,
    imagefolder,
    imagefolder_parquet,
    webdataset,
    webdataset_folder,
]


def obelics(folder: Path) -> Path:
    return put(folder / "a.jsonl", {"images": ["a.png", None], "texts": [None, SAID], "metadata": "[]"})


def mmc4(folder: Path) -> Path:
    image = {"image_name": "a.png", "raw_url": "https://a.b/c", "matched_text_index": 0, "matched_sim": 0.3}
    return put(folder / "a.jsonl", {"text_list": [SAID], "image_info": [image], "similarity_matrix": [[0.3]]})


def own_document(folder: Path) -> Path:
    return put(folder / "a.jsonl", {"content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": SAID}]})


DOCUMENTS = [obelics, mmc4, own_document]


def seen(rows: Rows) -> list[list[tuple[str, list[Any]]]]:
    """Turns of every conversation of every row, with a picture's size and colour in its place."""

    def part(given: Any) -> Any:
        return given if isinstance(given, str) else (*given.size, given.getpixel((0, 0)))

    every = [
        conversation for example in map(rows.__getitem__, range(len(rows))) for conversation in example.conversations
    ]
    return [[(turn.role, [part(p) for p in turn.content]) for turn in c.turns] for c in every]


RED = (40, 30, (255, 0, 0))


@pytest.mark.parametrize("write", [*CHATS, *CAPTIONS, *DOCUMENTS], ids=lambda f: f.__name__)
def test_every_layout_is_read_back_and_gives_the_same_tensors(
    folder: Path, write: Callable[[Path], Path], built: Assembled
) -> None:
    rows = Rows(write(folder), prompts=[ASKED])
    asked = [RED] if write in DOCUMENTS else [RED, ASKED]
    assert seen(rows) == [[("user", asked), ("assistant", [SAID])]]

    question = "" if write in DOCUMENTS else ASKED
    expected = ask(question, SAID, Image.open(folder / "a.png"))
    batches = [
        collate(rows_of(example, built.template), built.model.vision.preprocess)
        for example in (rows[0], type(rows[0])([expected]))
    ]
    for name in ("input_ids", "labels", "pixel_values"):
        found, wanted = (getattr(batch, name) for batch in batches)
        assert torch.equal(found, wanted), name


NAMED = {
    messages: "messages",
    prompt_and_completion: "prompt",
    llava: "llava",
    sharegpt: "sharegpt",
    cauldron: "cauldron",
    vqav2: "vqav2",
    questions_in_csv: "questions",
    coco: "coco",
    karpathy: "karpathy",
    minigpt4: "minigpt4",
    captions_in_csv: "captions",
    webdataset: "captions",
    obelics: "obelics",
    mmc4: "mmc4",
    own_document: "document",
}


@pytest.mark.parametrize(("write", "name"), NAMED.items(), ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_layout_can_be_named(folder: Path, write: Callable[[Path], Path], name: str) -> None:
    path = write(folder)
    assert seen(Rows(path, prompts=[ASKED], layout=name)) == seen(Rows(path, prompts=[ASKED]))


def test_a_wrong_name_is_told_with_what_was_found(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no format 'lava'; there are messages, prompt, llava"):
        Rows(llava(folder), layout="lava")
    with pytest.raises(ValueError, match=r"expected the column messages of messages, found id, image, conversations"):
        Rows(llava(folder), layout="messages")
    with pytest.raises(ValueError, match=r"expected .*question and answer; found keys path, caption"):
        Rows(captions_in_csv(folder), layout="questions")


def test_a_row_of_datasets_is_read_with_its_pictures_and_its_split(folder: Path) -> None:
    """What the hub gives, without the hub."""
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    made = datasets.Dataset.from_list(
        [{"image": Image.new("RGB", (40, 30)), "caption": [SAID, "b"]}], features=features
    )
    streams = {"train": made.to_iterable_dataset(), "validation": made.to_iterable_dataset()}
    rows = [(where, list(entries(row))) for where, row in split_rows(streams)]
    assert [where for where, _ in rows] == ["train row 1", "validation row 1"]
    assert [[entry.split for entry in found] for _, found in rows] == [["train"] * 2, ["val"] * 2]
    assert [entry.text for entry in rows[0][1]] == [SAID, "b"]
    assert Image.open(io.BytesIO(rows[0][1][0].images[0])).size == (40, 30)
    several = datasets.Features(
        {"images": datasets.List(datasets.Image()), "texts": datasets.List(datasets.Value("string"))}
    )
    made = datasets.Dataset.from_list(
        [{"images": [Image.new("RGB", (4, 4)), None], "texts": [None, SAID]}], features=several
    )
    assert next(entries(next(split_rows({"train": made.to_iterable_dataset()}))[1])).kind == "document"


def test_pictures_given_as_pil_are_kept_as_they_are() -> None:
    (entry,) = entries({"image": Image.new("RGB", (3, 2), "red"), "caption": "c"})
    assert Image.open(io.BytesIO(entry.images[0])).getpixel((0, 0)) == (255, 0, 0)


def test_captions_of_equal_bytes_become_one_example(folder: Path) -> None:
    other = io.BytesIO()
    Image.new("RGB", (2, 2)).save(other, "PNG")
    rows = [
        {"image": data, "caption": c}
        for data, c in ((picture(folder), "1"), (other.getvalue(), "2"), (picture(folder), "3"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "a.parquet")
    examples = Rows(folder / "a.parquet")
    assert [[c.turns[1].content[0] for c in examples[i].conversations] for i in range(2)] == [["1", "3"], ["2"]]


def test_several_questions_about_a_picture_share_it_and_keep_their_kinds(folder: Path) -> None:
    rows = [{"image": "a.png", "question": f"{i}?", "answer": str(i), "kind": "number"} for i in range(3)]
    (example,) = list(Rows(put(folder / "a.json", rows)))
    assert [(c.turns[0].content[1], c.kind) for c in example.conversations] == [(f"{i}?", "number") for i in range(3)]


def test_splits_that_the_data_name_are_kept(folder: Path) -> None:
    def image(split: str, caption: str) -> dict[str, Any]:
        return {"filepath": "", "filename": f"{caption}.png", "split": split, "sentences": [{"raw": caption}]}

    images = [image("train", "a"), image("val", "b"), image("test", "c"), image("restval", "d")]
    source = str(put(folder / "dataset_coco.json", {"images": images, "dataset": "coco"}))
    parts = {split: open_split(Data(source=source), split) for split in ("train", "val", "test")}
    assert {
        split: [e.conversations[0].turns[1].content[0] for e in seen_of(rows)] for split, rows in parts.items()
    } == {
        "train": ["a", "d"],
        "val": ["b"],
        "test": ["c"],
    }
    put(folder / "dataset_coco.json", {"images": images[:1], "dataset": "coco"})
    with pytest.raises(ValueError, match=r"the split 'test' of .* is empty; it has train"):
        open_split(Data(source=source), "test")


def seen_of(rows: Any) -> list[Any]:
    """Examples without their pictures, of which there is one only."""
    rows._open = lambda *_: Image.new("RGB", (1, 1))
    return [rows[i] for i in range(len(rows))]


def test_shards_are_written_out_and_read_one_after_the_other(folder: Path) -> None:
    for number in range(3):
        tar(folder / f"s-{number:02}.tar", {"0.png": picture(folder), "0.txt": str(number).encode()})
    rows = Rows(str(folder / "s-{00..02}.tar"), prompts=[ASKED])
    assert [turns[1][1] for turns in seen(rows)] == [["0"], ["1"], ["2"]]
    with pytest.raises(ValueError, match=r"no file .*s-03\.tar; nearest name"):
        Rows(str(folder / "s-{00..03}.tar"))


@pytest.mark.parametrize("left", [1, 512, 1024, 1536, 3000])
def test_a_shard_that_is_cut_short_is_told_with_what_was_whole(folder: Path, left: int) -> None:
    path = tar(folder / "s.tar", {f"{i}.{end}": b"x" * 700 for i in range(4) for end in ("png", "txt")})
    with tarfile.open(path) as shard:
        end = shard.getmembers()[-1].offset_data + 700
    path.write_bytes(path.read_bytes()[: end - left])
    with pytest.raises(ValueError, match=rf"{path}, the shard is cut short or no tar, after [23] whole samples"):
        Rows(path)
    path.write_bytes(path.read_bytes()[: 1536 * 4])  # after a member, where tarfile sees no harm
    with pytest.raises(ValueError, match="its end is missing"):
        Rows(path)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"data": [1, 2], "version": 3}, r"expected messages .*; found keys data, version"),
        (
            {"images": [{"id": 1, "url": "x"}], "annotations": [{}]},
            "images 1: expected the key file_name, found keys id, url",
        ),
        (
            {"annotations": [{"image_id": 1, "bbox": []}]},
            "annotations 1: expected the key caption, found keys image_id",
        ),
        ({"annotations": [{"question_id": 1}]}, "name its file of questions"),
        ({"questions": [{"question_id": 1}]}, "belong beside its questions"),
        ({"info": {}, "annotations": {}, "images": [{"id": 1, "file_name": 7}]}, "file_name must be text, found 7"),
        ({"images": [{"sentences": [], "split": "x", "filename": "a"}]}, "split must be one of train, restval"),
        ({"images": [1], "annotations": [{}]}, "images 1: expected an object with id, found 1"),
        ("text", "expected .* or {, found"),
        ([{"image": 5, "caption": "c"}], "row 1: image must be a path, .* found 5"),
        ([{"image": "a.png", "caption": 5}], "row 1: caption must be text and not empty, found 5"),
        ([{"image": None, "caption": "c"}], "row 1: image must be a path, .* found None"),
        ([{"caption": "c"}], r"row 1: expected messages.*; found keys caption"),
        ([{"messages": said(content="<image><image>?"), "images": ["a.png"]}], "row 1: 2 <image> markers and 1 images"),
        ([{"messages": said(content="?"), "images": [3]}], "row 1: images must be a path, .* found 3"),
        ([{"messages": said(content="?"), "images": 3}], "row 1: images must be a path or a list, found 3"),
        ([{"prompt": 3, "completion": "c"}], "row 1: prompt must be a list of turns"),
        ([{"images": ["a.png"], "texts": [{"user": 1}]}], "row 1: each of texts must have a user and an assistant"),
        ([{"image": "a.png", "question": "q", "answer": 4}], "row 1: answer must be text and not empty, found 4"),
    ],
)
def test_another_shape_is_told_with_what_was_expected_and_found(folder: Path, content: Any, line: str) -> None:
    file = folder / "a.json"
    for indent in (None, 2):
        file.write_text(json.dumps(content, indent=indent))
        with pytest.raises(ValueError, match=line) as error:
            Rows(file)
        assert str(file) in str(error.value)
        assert "\n" not in str(error.value)


def test_a_broken_parquet_file_is_told(folder: Path) -> None:
    path = captions_in_parquet(folder)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{path}, no whole Parquet file"):
        Rows(path)


def test_names_of_any_kind_and_links_in_a_circle(folder: Path) -> None:
    odd = "a 'quoted' \"name\" 🐈 {1}, ünï.png"
    (folder / "a.png").rename(folder / odd)
    rows = [{"image": odd, "caption": SAID}, {"image": (folder / odd).as_uri(), "caption": SAID}]
    place = folder / "more 'odd' 🐈"
    place.mkdir()
    assert [turns[0][1][0] for turns in seen(Rows(put(place / "ro ws.json", rows[1:])))] == [RED]
    assert len(seen(Rows(put(folder / "a.json", rows)))) == 2
    (folder / "loop.json").symlink_to(folder / "loop.json")
    with pytest.raises(ValueError, match=r"loop\.json is a symbolic link to nothing or to itself"):
        Rows(folder / "loop.json")
    with pytest.raises(ValueError, match="no file"):
        Rows(folder / "loop.json" / "a.json")


def test_the_hub_without_a_network_is_told_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"no file or folder some/captions, and the hub cannot be reached"):
        Rows("some/captions")
    assert time.monotonic() - began < 5
    for path in ("some/captions.csv", "image/captions"):
        with pytest.raises(ValueError, match="no file"):
            Rows(path)
