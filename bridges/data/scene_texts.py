"""The graph of a scene, and what can truly be said or asked about it, in few words."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random

Asked = tuple[str, str]  # a question and its answer

NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {"fish": "fish", "sheep": "sheep", "bus": "buses", "butterfly": "butterflies", "strawberry": "strawberries"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
LARGER = 1.4  # a thing is called larger from this ratio of sizes: nobody doubts it at sight


@dataclass(frozen=True)
class Thing:
    """One object: its centre, and the side of the square that it fills, in pixels; y grows downwards."""

    noun: str
    picture: str
    x: int
    y: int
    size: int
    mirrored: bool = False

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the square."""
        left, top = self.x - self.size // 2, self.y - self.size // 2
        return left, top, left + self.size, top + self.size


@dataclass(frozen=True)
class Scene:
    """A background colour and its objects from left to right. Their squares never overlap."""

    background: str
    objects: tuple[Thing, ...]

    @property
    def nouns(self) -> tuple[str, ...]:
        """Every noun once, in the order of the objects."""
        return tuple(dict.fromkeys(thing.noun for thing in self.objects))

    def count(self, noun: str) -> int:
        return sum(thing.noun == noun for thing in self.objects)

    @property
    def singles(self) -> list[Thing]:
        """The objects that "the cat" points out: those whose noun is there once."""
        return [thing for thing in self.objects if self.count(thing.noun) == 1]


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


def one(word: str) -> str:
    """`a cat`, `an apple`."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def sides(a: Thing, b: Thing) -> list[str]:
    """Where `a` is, seen from `b`: on a side when its square ends before that of `b` begins. One or two sides hold."""
    (left, top, right, bottom), (b_left, b_top, b_right, b_bottom) = a.box, b.box
    holds = {
        "left of": right <= b_left,
        "right of": left >= b_right,
        "above": bottom <= b_top,
        "below": top >= b_bottom,
    }
    return [side for side, true in holds.items() if true]


def captions(scene: Scene, nouns: Sequence[str]) -> list[str]:
    """Every wording that we have for a scene, its nouns named in the order given; each names all objects."""
    items = [one(noun) if scene.count(noun) == 1 else f"{NUMBERS[scene.count(noun)]} {plural(noun)}" for noun in nouns]
    listed = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    verb = "is" if scene.count(nouns[0]) == 1 else "are"
    wordings = [
        listed,
        f"there {verb} {listed}",
        f"{listed} on {one(scene.background)} background",
        f"a picture of {listed}",
        f"the image shows {listed}",
    ]
    if len(items) == 2:
        wordings.append(f"{items[0]} next to {items[1]}")
    if len(items) == len(scene.objects) == 2:
        a, b = sorted(scene.objects, key=lambda thing: nouns.index(thing.noun))
        wordings += [f"{items[0]} {side} {items[1]}" for side in sides(a, b)]
    return [f"{words[0].upper()}{words[1:]}." for words in wordings]


def references(scene: Scene) -> list[str]:
    """Five captions or more, always the same, against which a caption is scored."""
    return captions(scene, scene.nouns)


def questions(scene: Scene, absent: Sequence[str], rng: Random) -> dict[str, Asked]:
    """One question of every kind that has a clear answer here; `absent` are nouns that are not there."""
    asked = {
        "existence": _existence(scene, absent, rng),
        "count": _count(scene, rng),
        "background": ("What colour is the background?", f"{scene.background.capitalize()}."),
        "position": _position(scene, rng),
        "comparison": _comparison(scene, rng),
    }
    return {kind: pair for kind, pair in asked.items() if pair}


def _existence(scene: Scene, absent: Sequence[str], rng: Random) -> Asked:
    """`Is there a cat or a car?`, of which one is: a coin puts it first.

    Not "Is there a cat?": small language models cannot say yes or no to that even when they read the caption.
    """
    there = rng.choice(scene.nouns)
    first, second = rng.sample((there, rng.choice(absent)), 2)
    ask = rng.choice(("Is there", "Do you see"))
    return f"{ask} {one(first)} or {one(second)}?", f"{one(there).capitalize()}."


def _count(scene: Scene, rng: Random) -> Asked | None:
    if len(scene.objects) == 1:
        return None  # "One." would be no counting
    # a number is drawn before a noun: else nearly every answer were "One."
    number = rng.choice(sorted({scene.count(noun) for noun in scene.nouns}))
    noun = rng.choice([noun for noun in scene.nouns if scene.count(noun) == number])
    return f"How many {plural(noun)} are there?", f"{NUMBERS[number].capitalize()}."


def _position(scene: Scene, rng: Random) -> Asked | None:
    """`Is the cat left of the car?` about two things, or `What is left of the car?` where one thing only is."""
    asked = []
    if len(scene.singles) > 1:
        a, b = rng.sample(scene.singles, 2)
        side, answer = rng.choice(sides(a, b)), rng.choice(("Yes.", "No."))
        asked.append((f"Is the {a.noun} {side if answer == 'Yes.' else OPPOSITE[side]} the {b.noun}?", answer))
    unique = [(side, b, a) for b in scene.singles for side in OPPOSITE if (a := _only(scene, side, b))]
    if unique:
        side, b, a = rng.choice(unique)
        asked.append((f"What is {side} the {b.noun}?", f"{one(a.noun).capitalize()}."))
    return rng.choice(asked) if asked else None


def _only(scene: Scene, side: str, b: Thing) -> Thing | None:
    """The one thing on that side of `b`, if it is clearly there and no other is even partly."""
    ahead = {
        "left of": lambda a: a.box[0] < b.box[0],
        "right of": lambda a: a.box[2] > b.box[2],
        "above": lambda a: a.box[1] < b.box[1],
        "below": lambda a: a.box[3] > b.box[3],
    }[side]
    found = [a for a in scene.objects if a != b and ahead(a)]
    return found[0] if len(found) == 1 and side in sides(found[0], b) else None


def _comparison(scene: Scene, rng: Random) -> Asked | None:
    """`Which is larger, the cat or the car?` of two clearly different sizes, or `Are there more cats than dogs?`."""
    asked = []
    sizes = [(a, b) for a, b in permutations(scene.singles, 2) if a.size >= LARGER * b.size]
    if sizes:
        a, b = rng.choice(sizes)
        first, second = rng.sample((a.noun, b.noun), 2)
        word, right = rng.choice((("larger", a), ("smaller", b)))
        asked.append((f"Which is {word}, the {first} or the {second}?", f"The {right.noun}."))
    counts = [(a, b) for a, b in permutations(scene.nouns, 2) if scene.count(a) > scene.count(b)]
    if counts:
        more, fewer = rng.choice(counts)
        answer = rng.choice(("Yes.", "No."))
        first, second = (more, fewer) if answer == "Yes." else (fewer, more)
        asked.append((f"Are there more {plural(first)} than {plural(second)}?", answer))
    return rng.choice(asked) if asked else None
