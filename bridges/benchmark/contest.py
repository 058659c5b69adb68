"""What a contestant is given, what it tells, and how it is led; every one in a process of its own."""

import logging
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import nan
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from time import perf_counter, process_time
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bridges.benchmark.parts import Parts, wait
from bridges.config import Recipe
from bridges.data.conversation import Example
from bridges.data.pictures import MapStyle, SkipBroken
from bridges.data.sources import open_split
from bridges.training.feed import order

FIRST = "bridge.safetensors"


@dataclass(frozen=True)
class Task:
    """The recipe, `texts` of every picture drawn of all that it has, how many `steps` there may be, and a `folder` for
    the first weights.

    After every lap the loss of so many `held` out pictures is measured, outside of what is timed.
    """

    recipe: Recipe
    texts: int
    steps: int
    folder: Path
    held: int = 0


@dataclass(frozen=True)
class Size:
    """Of a step: targets; tokens that are computed with, padding included; floating-point operations of its products,
    but for those of the optimizer."""

    targets: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Ready:
    """The first step's mean loss (nats a target) and size, and where its gradient is: the bridge's, by our names.

    Before that so many pictures were encoded ahead, in so many seconds, by who keeps features.
    """

    loss: float
    size: Size
    gradient: Path
    ahead: float = 0.0
    pictures: int = 0


@dataclass(frozen=True)
class Lap:
    """Some steps: seconds a step on the wall and of all cores, targets a step, the last one's loss, and after it that
    of held-out pictures, where there are any. Of the first lap also the `parts` of its seconds, as shares."""

    seconds: float
    cpu: float
    targets: float
    loss: float
    held_out: float = nan
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """Why a contestant takes no part."""

    reason: str


@dataclass
class Racer:
    """A contestant and what it has told so far."""

    name: str
    pipe: Connection
    process: Any
    told: Ready | None = None
    apart: tuple[float, float] = (0.0, 0.0)
    parts: dict[str, float] = field(default_factory=dict)
    laps: list[Lap] = field(default_factory=list)
    memory: int = 0
    absent: str = ""


def examples(task: Task) -> list[list[Example]]:
    """The pictures of every step with `texts` of their texts, in the order in which training takes them.

    Raises ValueError for a picture with fewer.
    """
    settings, rows = task.recipe.train, opened(task, "train")
    steps = [order(step, settings.batch, len(rows), settings.seed) for step in range(task.steps)]
    known = {i: some(rows, i, task) for i in dict.fromkeys(i for places in steps for i in places)}
    return [[known[i] for i in places] for places in steps]


def held_out(task: Task) -> list[list[Example]]:
    """The pictures that all are measured on, in batches of the size of a step."""
    rows, size = opened(task, "val"), task.recipe.train.batch
    found = [some(rows, i, task) for i in range(min(task.held, len(rows)))]
    return [found[at : at + size] for at in range(0, len(found), size)]


def opened(task: Task, split: str) -> MapStyle[Example]:
    data = task.recipe.data
    if data.source == "scenes":  # enough of each to draw from, in the recipe's proportion
        data = replace(data, captions=data.captions * task.texts, questions=data.questions * task.texts)
    return SkipBroken(open_split(data, split))


def some(rows: MapStyle[Example], index: int, task: Task) -> Example:
    """Of one picture as many texts as are asked for, drawn alike for all. Raises ValueError where it has fewer."""
    there = rows[index].conversations
    if len(there) < task.texts:
        source = task.recipe.data.source
        raise ValueError(f"{source} has a picture with {len(there)} texts; ask for no more with --texts")
    return Example(Random(f"texts {index}").sample(there, task.texts))


def ready(
    task: Task,
    name: str,
    loss: float,
    size: Size,
    gradient: dict[str, Tensor],
    ahead: tuple[float, int] = (0.0, 0),
) -> Ready:
    """With the gradient in a file, in float32."""
    path = task.folder / f"{name}.safetensors"
    save_file({key: tensor.detach().float().cpu().contiguous() for key, tensor in gradient.items()}, path)
    return Ready(loss, size, path, *ahead)


class Clock:
    """Of one lap, and of the parts of its steps as long as these are on."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.wall, self.cpu, self.targets, self.steps, self.loss = perf_counter(), process_time(), 0, 0, 0.0

    def tick(self, loss: float, targets: int) -> None:
        self.steps, self.loss, self.targets = self.steps + 1, loss, self.targets + targets

    def lap(self) -> Lap:
        wait()
        wall, cpu = perf_counter() - self.wall, process_time() - self.cpu
        lap = Lap(wall / self.steps, cpu / self.steps, self.targets / self.steps, self.loss)
        return replace(lap, parts=self.parts.shares(wall)) if self.parts.on else lap


def peak_memory() -> int:
    """Bytes that this process has had at most: on an accelerator allocated, else resident."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def take_part(pipe: Connection, run: Callable[..., Any], task: Task, name: str) -> None:
    """The whole life of a contestant: `Ready` goes out; numbers of steps come in and laps go out, until 0 comes in;
    then its peak of memory."""
    logging.disable(logging.WARNING)
    try:
        run(pipe, task, name)
        pipe.send(peak_memory())
    except Exception as error:  # whatever a peer stumbles over is told, and never counted as slow
        pipe.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
