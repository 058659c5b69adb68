"""Everything that a document says of its pictures, and every answer, is recomputed from the graphs."""

import re
import subprocess
import sys
from collections import Counter

import pytest
from conftest import chatml_tokenizer
from PIL import Image, ImageChops

from bridges.config import Data
from bridges.data.batch import rows_of
from bridges.data.conversation import Conversation, Example, images_of
from bridges.data.scene_documents import ORDINALS, SceneDocuments
from bridges.data.scenes import Scene, named, render
from bridges.data.sources import open_split
from bridges.data.template import IGNORE_INDEX, Template

SIZE = 60
Read = list[tuple[list[Scene], Example]]


@pytest.fixture(scope="module")
def read() -> Read:
    documents = SceneDocuments("train", SIZE, questions=3)
    return [(documents.graphs(index), documents[index]) for index in range(SIZE)]


def questions(read: Read, kind: str) -> list[tuple[list[Scene], str, str]]:
    """(graphs, question, answer)"""
    return [
        (scenes, str(c.turns[0].content[-1]), str(c.turns[1].content[0]))
        for scenes, example in read
        for c in example.conversations
        if c.kind == kind
    ]


def texts(conversation: Conversation) -> list[str]:
    """What stands after each picture of a document."""
    (user, assistant) = conversation.turns
    content = [*user.content, *assistant.content]
    assert [isinstance(part, Image.Image) for part in content] == [True, False] * (len(content) // 2)
    return [part for part in content if isinstance(part, str)]


def test_a_document_has_two_to_four_pictures_each_with_a_text_that_names_what_it_shows(read: Read) -> None:
    for scenes, example in read:
        said = texts(example.conversations[0])
        assert len(said) == len(scenes)
        for scene, words in zip(scenes, said, strict=True):
            assert named(words.split("The one with")[0]) == set(scene.nouns), (words, scene)
    assert Counter(len(scenes) for scenes, _ in read).keys() == {2, 3, 4}


def test_every_text_but_the_last_closes_with_an_empty_line(read: Read) -> None:
    for _, example in read:
        *others, last = texts(example.conversations[0])
        assert all(re.search(r"[^\n]\n\n$", words) for words in others)
        assert "\n" not in last


def test_places_are_told_in_order(read: Read) -> None:
    counted = [texts(e.conversations[0]) for _, e in read if "The first picture" in texts(e.conversations[0])[0]]
    assert 0.25 * SIZE < len(counted) < 0.75 * SIZE
    for said in counted:
        for place, words in enumerate(said):
            allowed = {f"The {ORDINALS[place]} picture shows"} | ({"The next one shows"} if place else set())
            allowed |= {"The last one shows"} if place == len(said) - 1 else set()
            assert re.match("|".join(allowed), words), (place, words)
    assert {"next", "last", "second"} <= {words.split()[1] for said in counted for words in said}


def test_what_the_one_with_a_thing_means_is_clear_and_true(read: Read) -> None:
    found = [
        (s, re.search(r"The one with the (\w+) has an? (\w+) background", texts(e.conversations[0])[-1]))
        for s, e in read
    ]
    found = [(scenes, match) for scenes, match in found if match]
    assert len(found) > 10
    for scenes, match in found:
        (scene,) = [scene for scene in scenes if scene.count(match[1])]
        assert scene.count(match[1]) == 1
        assert scene.background == match[2]


def test_which_of_two_pictures_has_a_thing_is_true_and_balanced(read: Read) -> None:
    asked = questions(read, "which")
    later = 0
    for scenes, question, answer in asked:
        match = re.fullmatch(r"Which picture has an? (\w+), the (\w+) or the (\w+)\?", question)
        assert match
        first, second = ORDINALS.index(match[2]), ORDINALS.index(match[3])
        assert first < second < len(scenes)
        truth = [bool(scenes[place].count(match[1])) for place in (first, second)]
        assert truth in ([True, False], [False, True])
        assert answer == f"The {match[2 + truth.index(True)]}."
        later += truth[1]
    assert len(asked) > 0.9 * SIZE, "hardly any pictures have the same things"
    assert abs(2 * later - len(asked)) < 3 * len(asked) ** 0.5


@pytest.mark.parametrize("kind", ["ordinal", "reference"])
def test_a_background_is_asked_of_one_picture_that_alone_has_it(read: Read, kind: str) -> None:
    asked = questions(read, kind)
    assert len(asked) > SIZE // 2
    form = {"ordinal": r"of the (\w+) picture\?", "reference": r"of the picture with the (\w+)\?"}[kind]
    for scenes, question, answer in asked:
        match = re.fullmatch("What colour is the background " + form, question)
        assert match
        by_noun = [place for place, scene in enumerate(scenes) if scene.count(match[1])]
        (place,) = by_noun if kind == "reference" else [ORDINALS.index(match[1])]
        assert kind == "ordinal" or scenes[place].count(match[1]) == 1
        assert [scene.background for scene in scenes].count(scenes[place].background) == 1
        assert answer == f"{scenes[place].background.capitalize()}."


def test_a_question_shows_all_pictures_numbered_with_words_after_each(read: Read) -> None:
    for scenes, example in read:
        document, *others = example.conversations
        pictures = images_of(document.turns)
        assert [ImageChops.difference(p, render(s)).getbbox() for p, s in zip(pictures, scenes, strict=True)] == [
            None
        ] * len(scenes)
        for question in others:
            assert all(a is b for a, b in zip(images_of(question.turns), pictures, strict=True))
            *shown, _ = question.turns[0].content
            assert shown[1::2] == [f"This is the {ordinal} picture.\n" for ordinal in ORDINALS[: len(scenes)]]
        assert example.names == {noun for scene in scenes for noun in scene.nouns}


def test_no_kind_is_asked_twice_and_questions_may_be_few(read: Read) -> None:
    for _, example in read:
        kinds = [c.kind for c in example.conversations[1:]]
        assert len(set(kinds)) == len(kinds) <= 3
    few = SceneDocuments("train", SIZE, questions=0.5)
    assert 0.25 * SIZE < sum(len(few[index].conversations) - 1 for index in range(SIZE)) < 0.75 * SIZE


def test_the_targets_of_a_document_are_its_texts(read: Read) -> None:
    template = Template(chatml_tokenizer(), 2, "plain")
    for _, example in read[:10]:
        document = example.conversations[0]
        labels = [label for label in template.encode(document.turns).labels if label != IGNORE_INDEX]
        assert template.tokenizer.decode(labels) == "".join(texts(document)) + "<|im_end|>"


def test_questions_share_their_pictures_in_a_row(read: Read) -> None:
    scenes, example = read[0]
    (row,) = rows_of(Example(example.conversations[1:]), Template(chatml_tokenizer(), 2))
    assert len(row.images) == len(scenes)


def test_held_out_splits_stay_held_out() -> None:
    train, val = (SceneDocuments(split, 40) for split in ("train", "val"))
    assert not {s for i in range(40) for s in train.graphs(i)} & {s for i in range(40) for s in val.graphs(i)}
    assert len({s for i in range(40) for s in train.graphs(i)}) == sum(len(train.graphs(i)) for i in range(40))
    with pytest.raises(ValueError, match="no split 'test' of scenes"):
        SceneDocuments("test", 1)


def test_a_recipe_opens_them_as_a_source() -> None:
    train = open_split(Data(source="scenes:documents", size=7, questions=0.0), "train")
    assert len(train) == 7
    assert [[c.kind for c in example.conversations] for example in train] == [["document"]] * 7  # pyright: ignore
    held_out = open_split(Data(source="scenes:documents", size=7), "val_sprites")
    assert len(held_out) == 500
    assert len(held_out[0].conversations) > 1


def test_a_document_is_the_same_in_every_process_and_another_for_every_seed() -> None:
    program = (
        "import sys; from bridges.data.scene_documents import SceneDocuments\n"
        "documents = SceneDocuments('val', 5, seed=int(sys.argv[1]), questions=2)\n"
        "for index in (3, -1):\n"
        "    print(documents.graphs(index))\n"
        "    for c in documents[index].conversations:\n"
        "        print(c.kind, [p if isinstance(p, str) else hash(p.tobytes()) for t in c.turns for p in t.content])\n"
    ).replace("hash(", "__import__('zlib').crc32(")

    def printed(seed: int, salt: str) -> str:
        environment = {"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(path or "." for path in sys.path)}
        command = [sys.executable, "-c", program, str(seed)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert printed(0, "1") == printed(0, "2") != printed(1, "1")
