"""Scenes in documents: two to four pictures each, and texts and questions that tell them apart.

Example `index` is a pure function of (split, seed, index), as in `scenes.py`; the pictures are those of its splits.
"""

from collections.abc import Sequence
from itertools import permutations
from random import Random

from PIL import Image

from bridges.data.conversation import Conversation, Example, Turn
from bridges.data.documents import END
from bridges.data.scene_texts import Asked, Scene, captions, one
from bridges.data.scenes import Scenes, render

ORDINALS = ("first", "second", "third", "fourth")
FEWEST, MOST = 2, len(ORDINALS)


class SceneDocuments:
    """A map-style data set of `size` documents, each with `questions` questions on average, three at most.

    A document has a text after every picture; all but the first picture stand in what the assistant says. A question
    shows all pictures again, numbered, and its kind says how it means one of them: `which` of two has a thing, by its
    number (`ordinal`), or by a thing that it alone has (`reference`). Only what tells the pictures apart is asked, and
    no kind twice.
    """

    def __init__(self, split: str, size: int, seed: int = 0, questions: int | float = 1) -> None:
        self.scenes = Scenes(split, MOST * size, seed)
        self.size, self.questions, self.name = size, questions, f"{split} {seed}"

    def __len__(self) -> int:
        return self.size

    def graphs(self, index: int) -> list[Scene]:
        """The pictures of one document, without drawing them."""
        index = range(self.size)[index]
        number = Random(f"pictures of {self.name} {index}").randint(FEWEST, MOST)
        return [self.scenes.scene(MOST * index + place) for place in range(number)]

    def __getitem__(self, index: int) -> Example:
        index, scenes = range(self.size)[index], self.graphs(index)
        rng = Random(f"document {self.name} {index}")
        pictures = [render(scene) for scene in scenes]
        first, *others = zip(pictures, texts(scenes, rng), strict=True)
        said = [first[1], *(part for pair in others for part in pair)]
        conversations = [Conversation([Turn("user", [first[0]]), Turn("assistant", said)], "document")]
        asked = questions(scenes, rng)
        for kind in rng.sample(list(asked), min(len(asked), int(self.questions + rng.random()))):
            question, answer = asked[kind]
            turns = [Turn("user", [*numbered(pictures), question]), Turn("assistant", [answer])]
            conversations.append(Conversation(turns, kind))
        return Example(conversations, frozenset(noun for scene in scenes for noun in scene.nouns))


def numbered(pictures: Sequence[Image.Image]) -> list[str | Image.Image]:
    """Words after every picture: a bridge whose tokens see only the last picture would see no other one."""
    said = (f"This is the {ordinal} picture.\n" for ordinal in ORDINALS)
    return [part for pair in zip(pictures, said, strict=False) for part in pair]


def texts(scenes: Sequence[Scene], rng: Random) -> list[str]:
    """What stands after each picture: a caption, or its place and what it shows; and perhaps a look back at the end."""
    shuffled = [captions(scene, rng.sample(scene.nouns, len(scene.nouns))) for scene in scenes]
    if rng.random() < 0.5:
        said = [rng.choice(wordings) for wordings in shuffled]
    else:
        said = [
            f"{opening} {bare[0].lower()}{bare[1:]}"
            for opening, (bare, *_) in zip(openings(len(scenes), rng), shuffled, strict=True)
        ]
    marked = alone(scenes)
    if marked and rng.random() < 0.5:
        place, noun = rng.choice(marked)
        said[-1] += f" The one with the {noun} has {one(scenes[place].background)} background."
    return [text + END for text in said[:-1]] + said[-1:]


def openings(number: int, rng: Random) -> list[str]:
    """`The first picture shows`, `The next one shows`, …"""
    later = [rng.choice((f"The {ordinal} picture shows", "The next one shows")) for ordinal in ORDINALS[1:number]]
    return ["The first picture shows", *later[:-1], rng.choice((later[-1], "The last one shows"))]


def alone(scenes: Sequence[Scene]) -> list[tuple[int, str]]:
    """(place, noun) wherever "the one with the cat" means one picture: one cat in it, and none in any other."""
    nouns = [noun for scene in scenes for noun in scene.nouns]
    return [
        (place, noun)
        for place, scene in enumerate(scenes)
        for noun in scene.nouns
        if nouns.count(noun) == scene.count(noun) == 1
    ]


def questions(scenes: Sequence[Scene], rng: Random) -> dict[str, Asked]:
    """One question of every kind that the pictures allow; of a background only where no other picture has it."""
    backgrounds = [scene.background for scene in scenes]
    own = [place for place, colour in enumerate(backgrounds) if backgrounds.count(colour) == 1]
    has = [(a, b, noun) for a, b in permutations(range(len(scenes)), 2) for noun in scenes[a].nouns]
    has = [(a, b, noun) for a, b, noun in has if noun not in scenes[b].nouns]
    asked: dict[str, Asked] = {}
    if has:
        place, other, noun = rng.choice(has)
        first, second = (f"the {ORDINALS[p]}" for p in sorted((place, other)))
        asked["which"] = (f"Which picture has {one(noun)}, {first} or {second}?", f"The {ORDINALS[place]}.")
    if own:
        place = rng.choice(own)
        question = f"What colour is the background of the {ORDINALS[place]} picture?"
        asked["ordinal"] = (question, f"{backgrounds[place].capitalize()}.")
    marked = [(place, noun) for place, noun in alone(scenes) if place in own]
    if marked:
        place, noun = rng.choice(marked)
        question = f"What colour is the background of the picture with the {noun}?"
        asked["reference"] = (question, f"{backgrounds[place].capitalize()}.")
    return asked
