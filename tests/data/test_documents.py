"""A document is read in any of its layouts; what stands after its first picture is learnt, and no picture's place is."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import chatml_tokenizer
from PIL import Image

from bridges.config import Data
from bridges.data.conversation import images_of
from bridges.data.documents import LEAD, document
from bridges.data.formats import Rows
from bridges.data.pictures import BrokenPicture, SkipBroken
from bridges.data.sources import open_split
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID, Encoded, Template

COLOURS = {"a.png": (255, 0, 0), "b.png": (0, 0, 255), "c.png": (0, 255, 0)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three pictures, and a cache that goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, colour in COLOURS.items():
        Image.new("RGB", (2, 2), colour).save(tmp_path / name)
    return tmp_path


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def is_path(part: str) -> bool:
    return part.endswith(".png")


def ours(*parts: str) -> dict[str, Any]:
    """Our layout; what ends in .png is a picture."""
    return {"content": [{"type": "image", "path": p} if is_path(p) else {"type": "text", "text": p} for p in parts]}


def obelics(*parts: str) -> dict[str, Any]:
    return {"images": [p if is_path(p) else None for p in parts], "texts": [None if is_path(p) else p for p in parts]}


def mmc4(texts: list[str], *images: tuple[str, int], **more: Any) -> dict[str, Any]:
    infos = [{"image_name": name, "matched_text_index": place, **more} for name, place in images]
    return {"text_list": texts, "image_info": infos}


def turns(row: dict[str, Any]) -> Any:
    """Of a document, with a picture's path in the place of the picture."""
    read = document(row)
    return read and [(role, [p if isinstance(p, str) else p["image"] for p in parts]) for role, parts in read]


def encode(folder: Path, slots: int, row: dict[str, Any], source: str = "plain") -> tuple[Encoded, Template]:
    template = Template(chatml_tokenizer(), slots, source)
    (conversation,) = Rows(write(folder / "one.jsonl", row))[0].conversations
    return template.encode(conversation.turns), template


def said(text: Encoded, template: Template) -> str:
    """What the targets say."""
    return template.tokenizer.decode([label for label in text.labels if label != IGNORE_INDEX])


def test_our_own_layout_is_taken_as_it_is():
    row = ours("Two pictures: ", "a.png", " left,", "b.png", "\nright. ", "The end.")
    assert turns(row) == [
        ("user", ["Two pictures: ", "a.png"]),
        ("assistant", [" left,", "b.png", "\nright. ", "The end."]),
    ]


def test_an_obelics_document_has_empty_lines_between_its_paragraphs_and_before_its_pictures():
    row = obelics("Before.", "a.png", " On a. ", "More.\n", "b.png", "c.png", "", "On c.")
    assert turns(row) == [
        ("user", ["Before.\n\n", "a.png"]),
        ("assistant", ["On a.\n\n", "More.\n\n", "b.png", "c.png", "On c."]),
    ]


def test_an_mmc4_picture_stands_before_the_sentence_that_it_was_matched_with():
    row = mmc4(["Before.", " On a. ", "More.", "On b and c."], ("b.png", 3), ("a.png", 1), ("c.png", 3))
    assert turns(row) == [
        ("user", ["Before.\n\n", "a.png"]),
        ("assistant", ["On a. ", "More.\n\n", "b.png", "c.png", "On b and c."]),
    ]
    row["image_info"][0] = {"path": "b.png", "matched_text_index": 3}
    assert turns(row)[1][1][2] == "b.png"


def test_an_mmc4_picture_that_hardly_suits_its_sentence_is_left_out():
    row = mmc4(["On a.", "On b."], ("a.png", 0), matched_sim=0.25)
    row["image_info"] += mmc4([], ("b.png", 1), matched_sim=0.23)["image_info"]
    assert turns(row) == [("user", ["a.png"]), ("assistant", ["On a. ", "On b."])]


def test_one_picture_with_its_text_is_a_caption():
    assert turns(ours("a.png", "A red square.")) == [("user", ["a.png"]), ("assistant", ["A red square."])]


def test_pictures_that_follow_each_other_are_shown_before_anything_is_said():
    assert turns(ours("a.png", "\n", "b.png", "Both.")) == [
        ("user", ["a.png", "\n", "b.png"]),
        ("assistant", ["Both."]),
    ]


def test_pictures_after_the_last_text_go():
    assert turns(ours("a.png", "On a.", "b.png", " ")) == [("user", ["a.png"]), ("assistant", ["On a."])]


@pytest.mark.parametrize("row", [ours("Only words."), ours("Words.", "a.png"), obelics("a.png", " "), ours()])
def test_a_document_without_a_text_after_a_picture_teaches_nothing(row: dict[str, Any]):
    assert document(row) is None


def test_only_the_last_words_before_the_first_picture_are_read():
    long = " ".join(f"word{i}" for i in range(1000))
    lead, picture = turns(ours(long, "a.png", "On a."))[0][1]
    assert picture == "a.png"
    assert LEAD - 10 < len(lead) <= LEAD
    assert long.endswith(f" {lead}"), "from the beginning of a word"
    assert turns(ours("字" * 1000, "a.png", "On a."))[0][1][0] == "字" * LEAD


@pytest.mark.parametrize("slots", [0, 3])
def test_the_targets_are_the_text_after_the_first_picture_and_the_end(folder: Path, slots: int):
    row = obelics("A cat and a dog.", "a.png", "A cat.", "b.png", "c.png", "A dog.")
    text, template = encode(folder, slots, row)
    assert said(text, template) == "A cat.\n\nA dog.<|im_end|>"
    assert text.ids.count(IMAGE_TOKEN_ID) == 3 * slots
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(text.ids, text.labels, strict=True))
    assert IMAGE_TOKEN_ID not in text.labels
    words = [(look, token) for look, token in zip(text.looks, text.ids, strict=True) if token != IMAGE_TOKEN_ID]
    spoken = [template.tokenizer.decode([token for look, token in words if look == picture]) for picture in range(4)]
    tag = "" if slots else "<image>"  # in words, where there are no slots
    assert spoken == ["<|endoftext|>A cat and a dog.\n\n", f"{tag}A cat.\n\n", tag, f"{tag}A dog.<|im_end|>"]


def test_a_document_is_learnt_in_a_chat_template_too(folder: Path):
    text, template = encode(folder, 3, ours("a.png", "A cat.\n\n", "b.png", "A dog."), "chat")
    assert said(text, template) == "A cat.\n\nA dog.<|im_end|>"


def test_documents_are_rows_of_a_file_beside_chats(folder: Path):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    rows = Rows(write(folder / "a.jsonl", ours("a.png", "On a.", "b.png", "On b."), chat, obelics("c.png", "On c.")))
    kinds = [[c.kind for c in example.conversations] for example in rows]
    assert kinds == [["document"], ["chat"], ["document"]]
    shown = [[p.getpixel((0, 0)) for c in e.conversations for p in images_of(c.turns)] for e in rows]
    assert shown == [[COLOURS["a.png"], COLOURS["b.png"]], [], [COLOURS["c.png"]]]
    assert Rows(folder / "a.jsonl", kind="page")[0].conversations[0].kind == "page"


def test_a_source_of_a_recipe_may_be_documents(folder: Path):
    file = write(folder / "a.jsonl", *[mmc4([f"Text {i}."], ("a.png", 0)) for i in range(4)])
    train, held_out = (open_split(Data(source=str(file)), split) for split in ("train", "val"))
    assert (len(train), len(held_out)) == (3, 1)
    assert held_out[0].conversations[0].turns[1].content == ["Text 3."]


def test_documents_that_teach_nothing_are_left_out_and_counted(folder: Path, caplog: pytest.LogCaptureFixture):
    dull = ours("Only words.")
    with caplog.at_level(logging.WARNING):
        rows = Rows(write(folder / "a.jsonl", dull, ours("a.png", "On a."), obelics("Words.", "b.png")))
    assert [e.conversations[0].turns[1].content for e in rows] == [["On a."]]
    assert "a.jsonl: 2 documents are left out: they have no text after a picture" in caplog.text
    with pytest.raises(ValueError, match=r"b\.jsonl has no rows to learn from: 2 have no text after a picture"):
        Rows(write(folder / "b.jsonl", dull, dull))


def test_a_document_with_a_broken_picture_is_skipped_whole(folder: Path):
    file = write(folder / "a.jsonl", ours("a.png", "On a.", "aa.png", "On aa."), ours("b.png", "On b."))
    with pytest.raises(BrokenPicture, match=r"no file .*aa\.png; nearest name: .*a\.png"):
        Rows(file)[0]
    assert SkipBroken(Rows(file))[0].conversations[0].turns[1].content == ["On b."]


GOOD = ours("a.png", "On a.")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"content": [{"type": "image"}]}, r"line 2: a part of content must be .*path"),
        ({"content": "words"}, r"line 2: expected messages .*content\|texts\|text_list \(documents\)"),
        ({"images": ["a.png"], "texts": []}, "line 2: images and texts must be two lists of one length, found"),
        ({"images": "a.png", "texts": ["b"]}, "line 2: images and texts must be two lists"),
        ({"images": ["a.png", None], "texts": [None, None]}, r"line 2: images and texts .*; 2\. is \(None, None\)"),
        ({"images": ["a.png"], "texts": ["both"]}, r"line 2: images and texts .*; 1\. is"),
        ({"text_list": ["On a."]}, "line 2: text_list must be texts and image_info a list"),
        ({"text_list": [1], "image_info": []}, "line 2: text_list must be texts"),
        (mmc4(["On a."], ("a.png", 1)), "line 2: image_info must give an image_name .* below 1, found"),
        (mmc4(["On a."], ("a.png", -1)), "line 2: image_info must give"),
        ({"text_list": ["On a."], "image_info": ["a.png"]}, "line 2: image_info must give .* found 'a.png'"),
    ],
)
def test_a_malformed_document_is_named_with_its_line(folder: Path, row: dict[str, Any], line: str):
    with pytest.raises(ValueError, match=line) as error:
        Rows(write(folder / "a.jsonl", GOOD, row))
    assert "\n" not in str(error.value)
