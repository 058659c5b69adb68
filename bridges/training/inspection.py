"""A look at what the language model will see, before paying for a run: in the terminal, and on a page with pictures."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridges.build import Assembled, build
from bridges.config import Recipe
from bridges.data.batch import Row, rows_of
from bridges.data.conversation import Example, images_of
from bridges.data.pictures import BrokenPicture
from bridges.data.sources import open_split
from bridges.data.template import IGNORE_INDEX, IMAGE_TOKEN_ID, Template
from bridges.files import write
from bridges.towers.framing import wholes
from bridges.training.page import page

Kind = Literal["slots", "target", "dim", "break"]
STYLES: dict[Kind, str] = {"slots": "bold blue", "target": "bold green", "dim": "dim", "break": "cyan"}


@dataclass
class Survey:
    """What is counted of each example."""

    pictures: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    cut: int = 0
    skipped: dict[int, str] = field(default_factory=dict)
    seen: Counter[int] = field(default_factory=Counter)

    @property
    def repeated(self) -> int:
        return sum(count - 1 for count in self.seen.values())


def inspect(recipe: Recipe, samples: int = 3, rows: int = 200, html: Path = Path("inspect.html")) -> None:
    """Print the first examples: picture slots blue, targets green, everything else dim; a table of `rows` examples from
    all over the data; and the page `html` with the same and the pictures.

    Raises ValueError when not one token of them is a target, or no picture opens.
    """
    console = Console()
    assembled = build(recipe)
    data = open_split(recipe.data, "train")
    survey, shown = Survey(), []
    wanted = {
        *range(min(samples, len(data))),
        *np.linspace(0, len(data) - 1, min(rows, len(data))).astype(int).tolist(),
    }
    for index in sorted(wanted):
        try:
            example = data[index]
        except BrokenPicture as error:
            survey.skipped[index] = str(error)
            continue
        made = count(survey, example, assembled)
        if len(shown) < samples:
            shown.append((title(index, example, made), made))
    for line, made in shown:
        console.print(Text(f"\n{line}", style="bold"))
        for row in made:
            console.print(coloured(row, assembled.template))
    console.print(Text.assemble(("slots", "bold blue"), "  ", ("targets", "bold green"), "  ", ("not learned", "dim")))
    figures = figures_of(survey, len(data), assembled.model.bridge.num_slots)
    console.print(table(figures))
    parts = [(line, [(row.images, list(pieces(row, assembled.template))) for row in made]) for line, made in shown]
    write(html, page(recipe.data.source, figures, list(survey.skipped.items()), parts).encode())
    console.print(f"the same with pictures: {html}", highlight=False)
    if not survey.tokens:
        raise ValueError(f"no picture opens: {next(iter(survey.skipped.values()))}")
    if not sum(survey.targets):
        raise ValueError(
            "not one token is a target: the assistant says nothing, or data.max_length cuts it off, or the template "
            f"{recipe.language.template!r} leaves it out"
        )


def count(survey: Survey, example: Example, assembled: Assembled) -> list[Row]:
    """The rows of an example as a step would have them; what they are like goes into the survey."""
    model, template, recipe = assembled
    limit = recipe.data.max_length
    made = rows_of(example, template, limit, model.language.shares(limit))
    survey.pictures.append(sum(len(wholes(row.images)) for row in made))
    survey.images.append(sum(len(row.images) for row in made))
    survey.tokens += [len(row.ids) for row in made]
    survey.targets.append(sum(label != IGNORE_INDEX for row in made for label in row.labels))
    survey.cut += any(len(template.encode(c.turns).ids) > limit for c in example.conversations)
    said = [part for c in example.conversations for turn in c.turns for part in turn.content if isinstance(part, str)]
    pixels = [image.tobytes() for image in images_of(example.conversations[0].turns)]
    survey.seen[hash((*said, *pixels))] += 1
    return made


def title(index: int, example: Example, made: list[Row]) -> str:
    def counted(count: int, what: str) -> str:
        return f"{count} {what}" + "s" * (count != 1)

    positions, slots = sum(len(row.ids) for row in made), sum(row.ids.count(IMAGE_TOKEN_ID) for row in made)
    aimed = sum(label != IGNORE_INDEX for row in made for label in row.labels)
    texts, images = len(example.conversations), [image for row in made for image in row.images]
    pictures = counted(len(wholes(images)), "picture")
    pictures += f" in {len(images)} images" if len(images) > len(wholes(images)) else ""
    return (
        f"example {index}: {counted(texts, 'text')}, {pictures}, {positions} positions = "
        f"{slots} slots + {positions - slots} tokens, {aimed} of them targets"
    )


def figures_of(survey: Survey, total: int, slots: int) -> list[tuple[str, str]]:
    """The lines of the table."""

    def spread(values: list[int]) -> str:
        if not values:
            return "–"
        low, middle, most, top = np.percentile(values, [0, 50, 95, 100])
        return f"{low:.0f} to {top:.0f}, median {middle:.0f}, 95 % at most {most:.0f}"

    looked, tiled = len(survey.pictures) + len(survey.skipped), survey.images != survey.pictures
    why = Counter(
        reason.split(": ")[-1] if "cannot open" in reason else "no such file" for reason in survey.skipped.values()
    )
    return [
        ("examples", f"{total}; looked at {looked}"),
        ("slots an image" if tiled else "slots a picture", str(slots)),
        ("pictures an example", spread(survey.pictures)),
        *([("images they are cut into", spread(survey.images))] if tiled else []),
        ("positions a row", spread(survey.tokens)),
        ("targets an example", spread(survey.targets)),
        ("without a target", str(survey.targets.count(0))),
        ("cut at max_length", str(survey.cut)),
        ("skipped, broken", ", ".join([str(len(survey.skipped)), *(f"{n} {reason}" for reason, n in why.items())])),
        ("duplicates", str(survey.repeated)),
    ]


def table(figures: list[tuple[str, str]]) -> Table:
    made = Table(show_header=False, box=None)
    for name, value in figures:
        made.add_row(name, value)
    return made


def coloured(row: Row, template: Template) -> Text:
    """The pieces of a row in colours, each text that shares it on a line of its own."""
    text = Text()
    for words, kind in pieces(row, template):
        text.append(words.replace("\n", "↵\n") if kind in ("dim", "target") else words, style=STYLES[kind])
    return text


def pieces(row: Row, template: Template) -> Iterator[tuple[str, Kind]]:
    """Stretches of a row that are alike: a picture's slots, targets, text that is not learned; and where a text begins.

    `[picture: 9 slots]` stands for a picture, with all its tiles; two that follow each other are two.
    """
    numbers = [0, *accumulate((len(wholes([image])) for image in row.images), initial=0)]  # of each image's picture
    looks = [numbers[look] for look in row.looks] or [0] * len(row.ids)
    places = list(zip(row.ids, row.labels, row.segments, looks, strict=True))
    segment = row.segments[0] if row.segments else 0

    def alike(place: tuple[int, int, int, int]) -> tuple[int, Kind, int]:
        token, label, belongs, look = place
        slot = token == IMAGE_TOKEN_ID
        return belongs, "slots" if slot else "dim" if label == IGNORE_INDEX else "target", look if slot else 0

    for (belongs, kind, _), stretch in groupby(places, alike):
        if belongs != segment:
            yield f"\n  text {belongs}  ", "break"
            segment = belongs
        tokens = [token for token, *_ in stretch]
        yield f"[picture: {len(tokens)} slots]" if kind == "slots" else str(template.tokenizer.decode(tokens)), kind
