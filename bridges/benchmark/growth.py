"""How the seconds of a step grow with each of its sizes, beside what a count of multiplications foretells."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from bridges.benchmark.growth_report import Point, plot_text, sentence, table
from bridges.benchmark.multiplications import counted
from bridges.benchmark.rounds import enough, write_figures
from bridges.build import Assembled, assemble, build, build_bridge
from bridges.data.batch import Batch
from bridges.data.conversation import Conversation, Example, Turn
from bridges.data.scenes import NOUNS
from bridges.files import write
from bridges.recipe import read_recipe
from bridges.towers.precision import fastest_device
from bridges.training.engine import Engine, open_accelerator
from bridges.training.feed import Share
from bridges.training.loop import adam, train_step
from bridges.training.stage import make_batch, said_loss

AXES: dict[str, tuple[int, ...]] = {
    "slots": (4, 16, 64, 256),
    "texts of a picture": (1, 2, 5, 10),
    "words of a question": (16, 64, 256, 512),
    "pictures of a document": (1, 2, 4, 8),
    "shots": (0, 4, 16, 32),
}
SLOTS = {"qformer": "queries", "resampler": "latents", "flamingo": "latents"}
"""The option that says how many; a projector has as many slots as it is given patches."""
PRODUCTS = re.compile("mm$|conv|attention|linear")


def growth(
    recipe: str,
    rounds: int = 3,
    batch: int = 2,
    plot: str = "growth.svg",
    json: str | None = None,
    kind: str | None = None,
    axes: Mapping[str, tuple[int, ...]] = AXES,
    console: Console | None = None,
) -> dict[str, list[Point]]:
    """Print, plot and return what a step with `batch` made-up examples takes; shots are read, one prompt, not trained.

    What does not fit into the language model's context is left out; so is all but the axes that begin with `kind`.
    Raises ValueError for fewer than 3 rounds, or where none does.
    """
    enough(rounds)
    if not (axes := {axis: sizes for axis, sizes in axes.items() if axis.startswith(kind or "")}):
        raise ValueError(f"kind {kind!r}: what can grow are {', '.join(AXES)}")
    told, read = console or Console(), read_recipe(recipe)
    whole = replace(read, vision=replace(read.vision, cache=None), data=replace(read.data, max_length=10**6))
    assembled = build(whole)
    assembled.model.to(fastest_device())
    found: dict[str, list[Point]] = {}
    for axis, sizes in axes.items():
        with told.status(axis):
            works = works_of(assembled, axis, sizes, batch)
            points = [measured(size, positions, work, rounds) for size, positions, work in works]
        if points:
            found[axis] = points
            told.print(table(axis, points), sentence(axis, points), "", highlight=False, soft_wrap=True)
    write(Path(plot), plot_text(found).encode())
    told.print(f"plotted in {plot}; {torch.get_num_threads()} threads", highlight=False)
    write_figures(json, "growth", recipe, {axis: [asdict(point) for point in points] for axis, points in found.items()})
    return found


def works_of(
    assembled: Assembled, axis: str, sizes: tuple[int, ...], batch: int
) -> Iterator[tuple[int, int, Callable[[], object]]]:
    """Each size, the positions of a step with it, and the step."""
    context = assembled.model.language.context
    if axis == "shots":
        assembled = at_rest(assembled)
    for size in sizes:
        grown = with_slots(assembled, size) if axis == "slots" else assembled
        count = 1 if axis == "shots" else batch
        data = make_batch(grown, [made(axis, size, Random(number)) for number in range(count)])
        if axis == "slots" and assembled.recipe.bridge["name"] not in SLOTS:
            assert data.pixel_values is not None
            seen = grown.model.vision(data.pixel_values).detach()
            data.features = seen[:, torch.arange(size) % seen.shape[1]]
        if context is None or int(data.positions.max()) < context:
            work = partial(read_once, grown.model, data) if axis == "shots" else training(grown, data)
            yield size, int((data.segments >= 0).sum()), work


def made(axis: str, size: int, rng: Random) -> Example:
    """An example of noise and words: one picture and one text, but for what grows."""
    sizes = {"texts of a picture": 1, "words of a question": 12, "pictures of a document": 1, "shots": 0} | {axis: size}
    noise = np.random.default_rng(rng.randrange(2**32))

    def words(count: int) -> str:
        return " ".join(rng.choices(NOUNS, k=count))

    def asked() -> list[Turn]:
        shown = [
            part
            for _ in range(sizes["pictures of a document"])
            for part in (Image.fromarray(noise.integers(0, 255, (224, 224, 3), dtype=np.uint8)), words(4))
        ]
        return [Turn("user", [*shown, words(sizes["words of a question"])]), Turn("assistant", [words(12)])]

    first, *rest = asked()
    for _ in range(sizes["shots"]):
        rest += asked()
    again = [Turn("user", [*first.content[:-1], words(12)]) for _ in range(sizes["texts of a picture"] - 1)]
    texts = [[first, *rest], *([turn, Turn("assistant", [words(12)])] for turn in again)]
    return Example([Conversation(turns) for turns in texts])


def with_slots(assembled: Assembled, slots: int) -> Assembled:
    """With a fresh bridge of so many slots; of Flamingo's, so many latents. ValueError for a bridge of one's own."""
    (vision, language), options = (assembled.model.vision, assembled.model.language), dict(assembled.recipe.bridge)
    patches = vision.num_patches
    if options["name"] in SLOTS:
        options[SLOTS[options["name"]]] = slots
    elif options["name"] == "projector":
        options, patches = {"name": "projector", "depth": options.get("depth", 1)}, slots
    else:
        raise ValueError(f"how many slots {options['name']} has is its own matter; take a bridge that comes along")
    bridge = build_bridge(options, vision.dim, patches, language.dim, language.num_layers).to(language.device)
    return assemble(vision, bridge, language, assembled.recipe)


def at_rest(assembled: Assembled) -> Assembled:
    """With a bridge that has no gradients: the counter stumbles over what could have one and has none."""
    model, _, recipe = assembled
    return assemble(model.vision, deepcopy(model.bridge).requires_grad_(False), model.language, recipe)


def training(assembled: Assembled, data: Batch) -> Callable[[], object]:
    """A step of the loop, optimizer included."""
    model, recipe = assembled.model.train(), assembled.recipe
    engine = Engine(open_accelerator(recipe), model, adam(model, recipe))
    return lambda: train_step(engine, [Share("", 1.0, [data])], recipe.train.clip, said_loss)


@torch.no_grad()
def read_once(model: Any, data: Batch) -> object:
    """What is kept of demonstrations, after which any number of queries may come."""
    images = (data.pixel_values, data.features, data.asked, data.looks)
    return model.eval().prefill(data.input_ids, data.segments, data.positions, *images)


def measured(size: int, positions: int, work: Callable[[], object], rounds: int) -> Point:
    """Its seconds; what it multiplies, counted in a run that does not count; and the seconds of its products."""
    _, flops = counted(work)
    seconds = []
    for _ in range(rounds):
        began = perf_counter()
        work()
        seconds.append(perf_counter() - began)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells when it starts and stops
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    products = sum(e.self_cpu_time_total for e in profiled.key_averages() if PRODUCTS.search(e.key)) / 1e6
    return Point(size, positions, median(seconds), min(seconds), max(seconds), flops, products)
