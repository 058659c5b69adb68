"""What a step sees: examples of every source, in an order that is a function of the step, prepared ahead."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bridges.config import Recipe
from bridges.data.conversation import Example
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.training.stage import Stage


class Source(NamedTuple):
    """Data of which every step sees `batch` examples, over all processes, and whose mean loss has this `weight`."""

    name: str
    data: SkipBroken[Example]
    batch: int
    weight: float


class Share(NamedTuple):
    """What a process computes of one source in one step: micro-batches."""

    name: str
    weight: float
    batches: Sequence[Any]


def open_sources(recipe: Recipe) -> list[Source]:
    """The training data of a recipe, and of what it mixes with that (`also`)."""
    every = [recipe.data, *recipe.also]
    return [
        Source(d.source, SkipBroken(open_split(d, "train")), d.batch or recipe.train.batch, d.weight) for d in every
    ]


def sizes_of(sources: Sequence[Source]) -> list[tuple[str, int]]:
    """The name of each, and its number of examples."""
    return [(source.name, len(source.data)) for source in sources]


def tell_broken(sources: Sequence[Source]) -> None:
    """Print which pictures of each were skipped, if any."""
    for source in sources:
        if source.data.broken:
            print(f"{source.name}: {source.data.summary()}")


def prefetched(
    stage: Stage, sources: Sequence[Source], first: int, rank: int = 0, processes: int = 1
) -> Iterator[list[Share]]:
    """The shares of process `rank` in every step from `first` on, prepared by threads while the step before computes.

    Raises ValueError where a batch does not divide by the processes.
    """
    settings = stage.built.recipe.train
    for source in sources:
        if source.batch % processes:
            raise ValueError(f"a batch of {source.batch} of {source.name} does not divide by {processes} processes")

    def prepare(step: int) -> list[Share]:
        return [share(step, number, source) for number, source in enumerate(sources)]

    def share(step: int, number: int, source: Source) -> Share:
        count = source.batch // processes
        places = order(step, source.batch, len(source.data), settings.seed + number)[rank * count :][:count]
        size = settings.micro_batch or count
        batches = [stage.batch([source.data[i] for i in places[at : at + size]]) for at in range(0, count, size)]
        return Share(source.name, source.weight, batches)

    with ThreadPoolExecutor(settings.workers) as pool:
        waiting: list[Future[list[Share]]] = []
        for step in range(first, settings.steps):
            while len(waiting) <= settings.workers and step + len(waiting) < settings.steps:
                waiting.append(pool.submit(prepare, step + len(waiting)))
            yield waiting.pop(0).result()


def order(step: int, batch: int, size: int, seed: int) -> list[int]:
    """Which examples a step sees: epoch after epoch, each in its own order. A pure function: resuming is exact."""
    places = range(step * batch, (step + 1) * batch)
    return [int(shuffled(seed, p // size, size)[p % size]) for p in places]


@lru_cache(maxsize=8)
def shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch, four bytes an example: all that is kept of the data in the host's memory."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(size, dtype=np.uint32))
