"""Everything that a scene's texts say is recomputed here from its graph, and the graph from the pixels."""

import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest

from bridges.data.conversation import Turn, images_of
from bridges.data.scene_texts import Scene, Thing, _only, plural, questions
from bridges.data.scenes import COLOURS, HELD_PAIRS, NOUNS, PICTURES, SPLITS, Scenes, _sprite, named, references, render

NUMBERS = ("no", "one", "two", "three", "four")
SINGULAR = {plural(noun): noun for noun in NOUNS}
LEFT_CAT = Thing("cat", "1F408", 50, 60, 80)
RIGHT_BUS = Thing("bus", "1F68D", 170, 60, 56)


def graphs(split: str, size: int = 300, seed: int = 0) -> list[Scene]:
    scenes = Scenes(split, size, seed)
    return [scenes.scene(index) for index in range(size)]


def texts(split: str = "train", size: int = 400) -> list[tuple[Scene, str, str, str]]:
    """(scene, kind, question, answer) of every question; a chat begins with a caption."""
    scenes = Scenes(split, size, seed=3, captions=2, questions=5)
    return [
        (scenes.scene(index), "caption" if talk.kind == "chat" and at == 0 else talk.kind, *words(talk.turns[at:]))
        for index in range(size)
        for talk in scenes[index].conversations
        for at in range(0, len(talk.turns), 2)
    ]


def words(turns: list[Turn]) -> tuple[str, str]:
    """The first question of some turns, and its answer."""
    return str(turns[0].content[-1]), str(turns[1].content[0])


@pytest.fixture(scope="module")
def train_texts() -> list[tuple[Scene, str, str, str]]:
    return texts()


def box(thing: Thing) -> tuple[int, int, int, int]:
    """Of the pixels, written apart from the library: left, top, and one past right and bottom."""
    left, top = thing.x - thing.size // 2, thing.y - thing.size // 2
    return left, top, left + thing.size, top + thing.size


def is_side(a: Thing, side: str, b: Thing) -> bool:
    (left, top, right, bottom), (b_left, b_top, b_right, b_bottom) = box(a), box(b)
    truth = {
        "left of": right <= b_left,
        "right of": left >= b_right,
        "above": bottom <= b_top,
        "below": top >= b_bottom,
    }
    return truth[side]


def the(scene: Scene, noun: str) -> Thing:
    (thing,) = [thing for thing in scene.objects if thing.noun == noun]
    return thing


def truth(scene: Scene, question: str) -> str | bool:
    """The answer, from the graph alone: True and False for yes and no."""
    count = Counter(thing.noun for thing in scene.objects)
    if match := re.fullmatch(r"(?:Is there|Do you see) (an? (\w+)) or (an? (\w+))\?", question):
        assert (match[2] in count) != (match[4] in count)
        return f"{(match[1] if match[2] in count else match[3]).capitalize()}."
    if match := re.fullmatch(r"How many (\w+) are there\?", question):
        return f"{NUMBERS[count[SINGULAR[match[1]]]].capitalize()}."
    if question == "What colour is the background?":
        return f"{scene.background.capitalize()}."
    if match := re.fullmatch(r"Is the (\w+) (left of|right of|above|below) the (\w+)\?", question):
        a, b = the(scene, match[1]), the(scene, match[3])
        axis = 0 if match[2] in ("left of", "right of") else 1
        assert max(box(a)[axis], box(b)[axis]) >= min(box(a)[axis + 2], box(b)[axis + 2]), "no clear margin"
        return is_side(a, match[2], b)
    if match := re.fullmatch(r"What is (left of|right of|above|below) the (\w+)\?", question):
        b = the(scene, match[2])
        (a,) = [thing for thing in scene.objects if thing is not b and is_side(thing, match[1], b)]
        return f"{'An' if a.noun[0] in 'aeiou' else 'A'} {a.noun}."
    if match := re.fullmatch(r"Which is (larger|smaller), the (\w+) or the (\w+)\?", question):
        small, large = sorted((the(scene, match[2]), the(scene, match[3])), key=lambda thing: thing.size)
        assert large.size >= 1.4 * small.size, "too close to call"
        return f"The {(large if match[1] == 'larger' else small).noun}."
    match = re.fullmatch(r"Are there more (\w+) than (\w+)\?", question)
    assert match, f"a question of no known form: {question}"
    first, second = count[SINGULAR[match[1]]], count[SINGULAR[match[2]]]
    assert first != second
    return first > second


def test_every_answer_is_what_the_graph_says(train_texts: list[tuple[Scene, str, str, str]]) -> None:
    asked = [(scene, question, answer) for scene, kind, question, answer in train_texts if kind != "caption"]
    assert len(asked) == 5 * 400
    for scene, question, answer in asked:
        said = {"Yes.": True, "No.": False}.get(answer, answer)
        assert said == truth(scene, question), (scene, question, answer)


def test_every_kind_is_asked_and_its_yes_and_no_are_balanced(train_texts: list[tuple[Scene, str, str, str]]) -> None:
    kinds = ("existence", "count", "background", "position", "comparison")
    answers = {kind: Counter(answer for _, asked, _, answer in train_texts if asked == kind) for kind in kinds}
    for kind in ("position", "comparison"):
        yes, no = answers[kind]["Yes."], answers[kind]["No."]
        # three standard deviations of a fair coin
        assert abs(yes - no) < 3 * (yes + no) ** 0.5, (kind, answers[kind])
        assert yes > 20
    pairs = [(q, a) for _, kind, q, a in train_texts if kind == "existence"]
    first = sum(q.split(" ", 2 if q.startswith("Is") else 3)[-1].startswith(a[:-1].lower() + " ") for q, a in pairs)
    assert abs(2 * first - len(pairs)) < 3 * len(pairs) ** 0.5, "what is there should be named first half of the time"
    assert set(answers["background"]) == {f"{colour.capitalize()}." for colour in COLOURS}
    assert answers["count"]["One."] < 0.7 * answers["count"].total()
    assert answers["count"].keys() >= {"One.", "Two.", "Three."}


def test_every_caption_names_exactly_the_objects_and_their_numbers(train_texts) -> None:
    for scene in {scene for scene, *_ in train_texts}:
        count = Counter(thing.noun for thing in scene.objects)
        captions = [answer for other, kind, _, answer in train_texts if other == scene and kind == "caption"]
        assert len(references(scene)) >= 5
        for caption in captions + references(scene):
            said = Counter()
            for number, word in re.findall(r"\b(an?|two|three|four) (\w+)", caption.lower()):
                if word in NOUNS and number in ("a", "an"):
                    said[word] += 1
                elif word in SINGULAR:
                    said[SINGULAR[word]] += NUMBERS.index(number)
            assert said == count, (caption, scene)
            assert named(caption) == set(count)
            assert "background" not in caption or f"{scene.background} background" in caption


def test_a_caption_of_two_things_puts_them_where_they_are(train_texts) -> None:
    found = [
        (scene, match)
        for scene, kind, _, answer in train_texts
        if kind == "caption" and (match := re.search(r"(\w+) (left of|right of|above|below) an? (\w+)", answer))
    ]
    assert len(found) > 20
    assert all(is_side(the(scene, match[1]), match[2], the(scene, match[3])) for scene, match in found)


def test_articles_and_plurals_are_right(train_texts) -> None:
    for _, _, question, answer in train_texts:
        for article, word in re.findall(r"\b(an?) (\w+)", f"{question} {answer}".lower()):
            assert (article == "an") == (word[0] in "aeiou"), (article, word)
        assert not re.search(r"\b(fishs|sheeps|buss|butterflys|strawberrys)\b", f"{question} {answer}")
    scene = Scene("grey", (LEFT_CAT, Thing("fish", "1F41F", 150, 60, 56), Thing("fish", "1F41F", 150, 150, 56)))
    assert references(scene)[:2] == ["A cat and two fish.", "There is a cat and two fish."]


def test_named_reads_whole_words_in_both_numbers() -> None:
    assert named("Two BUSES, a cat.") == {"bus", "cat"}
    assert named("A catalogue of stars and carrots; sheep") == {"star", "sheep"}
    assert all(named(f"some {plural(noun)}") == named(noun) == {noun} for noun in NOUNS)


def test_the_picture_shows_the_graph() -> None:
    for scene in graphs("train", 40) + graphs("val_sprites", 40):
        picture = render(scene)
        assert (picture.mode, picture.size) == ("RGB", (224, 224))
        ink = (np.asarray(picture) != COLOURS[scene.background]).any(-1)
        for thing in scene.objects:
            left, top, right, bottom = box(thing)
            assert min(left, top) >= 0
            assert max(right, bottom) <= 224
            ys, xs = np.nonzero(ink[top:bottom, left:right])
            assert max(np.ptp(ys), np.ptp(xs)) >= thing.size - 4, "the picture fills its square"
            assert abs(np.ptp(ys) + 2 * ys.min() - thing.size) <= 4, "the picture is centred"
            ink[top:bottom, left:right] = False
        assert not ink.any(), "background outside the squares"


def test_a_mirrored_thing_is_drawn_mirrored() -> None:
    def pixels(mirrored: bool) -> np.ndarray:
        return np.asarray(render(Scene("blue", (Thing("key", "1F511", 112, 112, 100, mirrored),))))

    np.testing.assert_array_equal(pixels(True), pixels(False)[:, ::-1])


@pytest.mark.parametrize("split", SPLITS)
def test_squares_stay_apart_and_objects_stand_from_left_to_right(split: str) -> None:
    scenes = graphs(split)
    assert {len(scene.objects) for scene in scenes} == ({2, 3, 4} if split == "val_pairs" else {1, 2, 3, 4})
    for scene in scenes:
        for a, b in combinations(scene.objects, 2):
            assert any(is_side(a, side, b) for side in ("left of", "right of", "above", "below")), (a, b)
            assert a.x <= b.x
            assert min(a.size, b.size) >= 56


def test_held_out_pairs_meet_in_val_pairs_only() -> None:
    assert len(HELD_PAIRS) == len(NOUNS) * (len(NOUNS) - 1) // 2 // 10
    assert all(frozenset(scene.nouns) in HELD_PAIRS for scene in graphs("val_pairs"))
    for split in ("train", "val", "val_sprites"):
        pairs = {frozenset(pair) for scene in graphs(split, 1000) for pair in combinations(scene.nouns, 2)}
        assert len(pairs) > 100
        assert not pairs & HELD_PAIRS


def test_no_question_of_train_puts_a_held_out_pair_together(train_texts) -> None:
    for scene, _, question, _ in train_texts:
        pairs = {frozenset(pair) for pair in combinations(named(question) | set(scene.nouns), 2)}
        assert not pairs & HELD_PAIRS


def test_held_out_pictures_are_in_val_sprites_only() -> None:
    held = {codes[-1] for codes in PICTURES.values() if len(codes) > 1}
    assert held == {thing.picture for scene in graphs("val_sprites", 400) for thing in scene.objects}
    for split in ("train", "val", "val_pairs"):
        seen = {thing.picture for scene in graphs(split, 1500) for thing in scene.objects}
        assert not seen & held
        assert split == "val_pairs" or seen == {code for codes in PICTURES.values() for code in codes} - held


def test_no_picture_belongs_to_two_nouns() -> None:
    assert max(Counter(code for codes in PICTURES.values() for code in codes).values()) == 1


def test_a_val_sprites_no_is_not_given_away_by_a_noun_without_held_out_picture() -> None:
    shown = {noun for noun, codes in PICTURES.items() if len(codes) > 1}
    assert shown >= {noun for _, _, question, _ in texts("val_sprites", 100) for noun in named(question)}


def test_train_and_val_share_no_scene_whatever_their_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    # few places, one tone, one object: the scenes would meet at once if only the seeds kept them apart
    monkeypatch.setattr("bridges.data.scenes._SIZES", {1: (216, 217)})
    monkeypatch.setattr("bridges.data.scenes.COLOURS", {"grey": (176, 176, 176)})
    monkeypatch.setattr("bridges.data.scenes.Random.choices", lambda *_: [1])  # of objects
    train, val = (set(graphs(split, 800, seed)) for split, seed in (("train", 0), ("val", 1)))
    assert len(train) < 800, "no scene came twice: the test is too weak"
    assert not train & val


def test_an_example_is_the_same_in_every_process_and_another_for_every_seed() -> None:
    program = (
        "import sys, zlib; from bridges.data.scenes import Scenes\n"
        "scenes = Scenes('val', 5, seed=int(sys.argv[1]))\n"
        "for index in (3, 0):\n"
        "    example = scenes[index]\n"
        "    picture = example.conversations[0].turns[0].content[0]\n"
        "    print(scenes.scene(index), zlib.crc32(picture.tobytes()), sorted(example.names))\n"
        "    print([(talk.kind, talk.turns[0].content[1], talk.turns[1].content) for talk in example.conversations])\n"
    )

    def printed(seed: int, salt: str) -> str:
        command = [sys.executable, "-c", program, str(seed)]
        environment = {"PYTHONHASHSEED": salt, "PYTHONPATH": ":".join(path or "." for path in sys.path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert printed(0, "1") == printed(0, "2") != printed(1, "1")


def test_an_example_has_one_picture_for_all_its_conversations_and_the_nouns() -> None:
    scenes = Scenes("val", 20, captions=2, questions=3)
    for index, example in enumerate(scenes):  # ends by IndexError, as a sequence does
        kinds = [talk.kind for talk in example.conversations]
        assert kinds[:2] == ["caption", "caption"]
        assert "caption" not in kinds[2:]
        assert len(kinds) == 5
        pictures = [images_of(talk.turns) for talk in example.conversations]
        assert all(len(shown) == 1 and shown[0] is pictures[0][0] for shown in pictures)
        assert all(talk.turns[0].content[0] is pictures[0][0] for talk in example.conversations), "the picture first"
        assert example.names == set(scenes.scene(index).nouns)
    assert index == len(scenes) - 1 == 19
    assert scenes.scene(-1) == scenes.scene(19)


def test_a_question_in_four_goes_on_from_the_caption_in_training() -> None:
    scenes = Scenes("train", 200, captions=1, questions=1)
    chats = [talk for example in scenes for talk in example.conversations if talk.kind == "chat"]
    assert 30 < len(chats) < 70
    for talk in chats:
        assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2
        assert len(images_of(talk.turns)) == 1
        assert len(talk.turns[2].content) == 1, "the question goes on without the picture"
    assert all(len(example.conversations) == (2 - (example.conversations[0].kind == "chat")) for example in scenes)
    alone = Scenes("train", 40, captions=1, questions=0)
    assert all(example.conversations[0].kind == "caption" for example in alone)


def test_no_kind_is_asked_twice_while_another_is_left() -> None:
    for example in Scenes("val_pairs", 50, captions=0, questions=3):
        assert len({talk.kind for talk in example.conversations}) == 3


def test_unclear_things_are_not_asked() -> None:
    def kinds(*things: Thing) -> set[str]:
        return set(questions(Scene("grey", things), ["dog"], Random(0)))

    assert kinds(LEFT_CAT) == {"existence", "background"}
    assert kinds(LEFT_CAT, RIGHT_BUS) == {"existence", "background", "count", "position", "comparison"}
    alike = Thing("bus", "1F68D", 170, 60, 70)
    assert kinds(LEFT_CAT, alike) == {"existence", "background", "count", "position"}
    # two cats: neither is "the cat"
    assert kinds(LEFT_CAT, Thing("cat", "1F431", 170, 60, 56)) == {"existence", "background", "count"}


def test_what_is_left_is_not_asked_where_a_third_thing_is_partly_left() -> None:
    partly = Thing("dog", "1F415", 160, 150, 80)
    assert _only(Scene("grey", (LEFT_CAT, RIGHT_BUS)), "left of", RIGHT_BUS) == LEFT_CAT
    assert _only(Scene("grey", (LEFT_CAT, partly, RIGHT_BUS)), "left of", RIGHT_BUS) is None


def test_an_unknown_split_names_the_four() -> None:
    with pytest.raises(ValueError, match="no split 'test' of scenes; there are train, val, val_pairs, val_sprites"):
        Scenes("test", 1)


def test_without_the_pictures_package_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _sprite.cache_clear()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(ValueError, match=r"resvg_py: pip install 'mm-bridges\[demo\]'"):
        render(Scene("grey", (LEFT_CAT,)))
