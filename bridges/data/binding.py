"""Naming of new things, as in Frozen (arXiv 2106.13884): are invented words bound to the pictures beside them?

    [Answer with dax or blicket.] P This is a dax. P This is a blicket. P What is this? This is a → dax

The pictures are single OpenMoji sprites on a background; nothing outside the episode says which one is a dax.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image

from bridges.data.documents import END
from bridges.data.scene_texts import Scene, Thing
from bridges.data.scenes import COLOURS, NOUNS, PICTURES, SIDE, render

NAMES = ("dax", "blicket", "slation", "perpo", "shously")
SIZES = (64, 150)  # pixels, as the sprite of a scene that stands alone


@dataclass(frozen=True)
class Episode:
    """`prompt` ends in "This is a"; a space and `answer`, which is one of the `labels`, and a full stop go on."""

    prompt: list[str | Image.Image]
    labels: tuple[str, ...]
    answer: str


class Binding:
    """A map-style data set of `size` episodes: `ways` things, `shots` pictures of each, shown 1 + `repeats` times.

    The pictures of a thing are different sprites of a noun as far as it has so many, else the same at another place, in
    another size, on another background. A sprite that is asked about is not shown before, if the noun has two or more.
    Which thing has which name is drawn anew for each episode, and the order of what is shown. `ways`² episodes in a row
    have every name as the answer, and every name as the last that was shown, equally often together.
    With `induction` the labels are announced first.
    Raises ValueError: more ways than names, or fewer than 2; no shots.
    """

    def __init__(
        self, ways: int = 2, shots: int = 1, repeats: int = 0, induction: bool = True, size: int = 200, seed: int = 0
    ) -> None:
        if not 2 <= ways <= len(NAMES):
            raise ValueError(f"{ways} ways: there are names for 2 to {len(NAMES)} things")
        if shots < 1 or repeats < 0:
            raise ValueError(
                f"{shots} shots and {repeats} repeats: show at least 1 picture of each thing, 0 times again"
            )
        self.ways, self.shots, self.repeats, self.induction = ways, shots, repeats, induction
        self.size, self.seed = size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Episode:
        index = range(self.size)[index]
        rng = Random(f"binding {self.ways} {self.shots} {self.repeats} {self.seed} {index}")
        labels = NAMES[: self.ways]
        asked, last = labels[index % self.ways], labels[index // self.ways % self.ways]
        nouns = rng.sample(NOUNS, self.ways)
        codes = {name: sprites(noun, self.shots, rng) for name, noun in zip(labels, nouns, strict=True)}
        shown = [(name, draw(code, rng)) for name, (_, *supports) in codes.items() for code in supports]
        shown = ordered(shown * (1 + self.repeats), last, rng)
        prompt: list[str | Image.Image] = [f"Answer with {listed(labels)}.{END}"] if self.induction else []
        for name, picture in shown:
            prompt += [picture, f"This is a {name}.{END}"]
        return Episode([*prompt, draw(codes[asked][0], rng), "What is this? This is a"], labels, asked)


def sprites(noun: str, shots: int, rng: Random) -> list[str]:
    """The one that is kept to be asked about, then `shots` others, as far as there are others."""
    kept, *others = rng.sample(PICTURES[noun], len(PICTURES[noun]))
    others = others or [kept]
    return [kept, *(others[shot % len(others)] for shot in range(shots))]


def draw(code: str, rng: Random) -> Image.Image:
    """One sprite anywhere on a canvas of any colour."""
    size = rng.randint(*SIZES)
    x, y = (rng.randint(size // 2, SIDE - size + size // 2) for _ in range(2))
    return render(Scene(rng.choice(list(COLOURS)), (Thing("", code, x, y, size, rng.random() < 0.5),)))


def ordered(shown: Sequence[tuple[str, Image.Image]], last: str, rng: Random) -> list[tuple[str, Image.Image]]:
    """In random order, but for the name of the last."""
    end = rng.choice([place for place, (name, _) in enumerate(shown) if name == last])
    rest = [*shown[:end], *shown[end + 1 :]]
    return [*rng.sample(rest, len(rest)), shown[end]]


def listed(labels: Sequence[str]) -> str:
    """`dax, blicket or slation`."""
    return f"{', '.join(labels[:-1])} or {labels[-1]}"
