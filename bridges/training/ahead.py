"""`bridges cache`: what the encoder sees in the pictures of a recipe, kept before they are needed."""

import os
import time
from collections.abc import Callable, Sequence
from itertools import islice

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from bridges.config import Recipe
from bridges.data.conversation import Example, images_of
from bridges.data.pictures import MapStyle, SkipBroken
from bridges.data.sources import open_split
from bridges.store import Store, error_of
from bridges.towers.precision import fastest_device
from bridges.training.feed import open_sources
from bridges.training.stage import open_stage

PROBED, AT_ONCE = 8, 32  # examples that are timed; pictures encoded at once
COLUMNS = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TextColumn("examples"), TimeRemainingColumn())


def encode_ahead(recipe: Recipe) -> None:
    """Fill the store of a recipe with the pictures of its training data and of those that training is measured on.

    Says first how large it gets and whether reading is faster than looking; where it is not, nothing is encoded.
    Under torchrun each process takes its share of the examples. Raises ValueError for a recipe that keeps nothing, and
    where it would keep more than it may.
    """
    if recipe.vision.cache is None:
        raise ValueError("the recipe keeps no features: add vision: {cache: fp16}, or --vision.cache fp16")
    stage = open_stage(recipe)
    store, console = stage.store, Console()
    assert store is not None
    store.vision.to(fastest_device())
    held = min(recipe.train.evaluate_size, recipe.train.batch * 4)  # as in training
    validation = SkipBroken(open_split(recipe.data, "val"))
    parts: list[tuple[MapStyle[Example], int]] = [(source.data, len(source.data)) for source in open_sources(recipe)]
    parts.append((validation, min(held, len(validation))))
    if helps(store, parts, console):
        rank, processes = (int(os.environ.get(name, none)) for name, none in (("RANK", "0"), ("WORLD_SIZE", "1")))
        fill(store, parts, rank, processes, console)
        console.print(store.summary(), highlight=False, soft_wrap=True)


def helps(store: Store, parts: Sequence[tuple[MapStyle[Example], int]], console: Console) -> bool:
    """Time a few pictures, and say what is to be expected. ValueError where there is no room for it."""
    data, count = parts[0]
    examples = [data[place * count // PROBED] for place in range(min(PROBED, count))]
    pictures = [picture for example in examples for picture in pictures_of(example)]
    if not pictures:
        raise ValueError("there are no pictures in the first data of the recipe, so there is nothing to keep")
    looking, features = timed(lambda: store.look(pictures))
    store(pictures)
    store.flush()
    reading, _ = timed(lambda: store(pictures))
    looking, reading = (1e3 * seconds / len(pictures) for seconds in (looking, reading))
    number = sum(size for _, size in parts) * len(pictures) / len(examples)
    size = number * store.each
    console.print(
        f"about {number:.0f} pictures, {size / 1e6:.0f} MB in {store.form} ({store.shape[0]} x {store.shape[1]} each, "
        f"error {error_of(features, store.form):.2%}); the encoder takes {looking:.1f} ms a picture, reading "
        f"{reading:.1f} ms once it is in memory",
        highlight=False,
        soft_wrap=True,
    )
    if reading >= looking:
        console.print("reading is not faster than looking: leave vision.cache out")
        return False
    if size > store.budget:
        raise ValueError(
            f"that is more than vision.cache_gb {store.budget / 1e9:g} allows: raise it, choose vision.cache int8, or "
            "train without encoding ahead, which keeps as much as it may"
        )
    saved = number * (looking - reading) / 6e4
    console.print(f"that saves {saved:.1f} min of every pass over the data", highlight=False)
    return True


def fill(
    store: Store, parts: Sequence[tuple[MapStyle[Example], int]], rank: int, processes: int, console: Console
) -> None:
    """Every `processes`-th example, from `rank` on."""
    with Progress(*COLUMNS, console=console) as progress:
        bar = progress.add_task("", total=sum(len(range(rank, count, processes)) for _, count in parts))
        rows = (data[place] for data, count in parts for place in range(rank, count, processes))
        while some := list(islice(rows, AT_ONCE)):
            store([picture for example in some for picture in pictures_of(example)])
            progress.advance(bar, len(some))
    store.flush()


def pictures_of(example: Example) -> list[Image.Image]:
    """Each once, by identity."""
    return list({id(i): i for c in example.conversations for i in images_of(c.turns)}.values())


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """The seconds that it takes the second time, and what it gives."""
    work()
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found
