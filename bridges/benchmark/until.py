"""Seconds of training to a held-out loss: this toolkit beside its peers, all from the same start, on the same steps."""

import json as writer
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from bridges.benchmark.contest import Racer, Task
from bridges.benchmark.standings import machine, what
from bridges.benchmark.train import contest, lap, named, running, settled
from bridges.files import write
from bridges.recipe import read_recipe

USUAL = ["tuned"]


def train_until(
    recipe: str,
    loss: float,
    steps: int = 4,
    texts: int = 1,
    contestant: Sequence[str] = (),
    vision: str | None = None,
    language: str | None = None,
    batch: int | None = None,
    questions: float | None = None,
    json: str | None = None,
    console: Console | None = None,
) -> list[Racer]:
    """Print, and return, how long the contestants take to this loss (nats a target) of the recipe's held-out pictures.

    It is measured after every so many steps; that time does not count, but that of encoding pictures, and of keeping
    what is seen, does. They take turns, as far as the recipe's steps go. Raises ValueError as `train`.
    """
    read = read_recipe(recipe)
    names = named(contestant or USUAL, steps, texts, read)
    told = console or Console()
    with TemporaryDirectory() as folder:
        read = settled(read, vision, language, batch, questions, Path(folder))
        if steps > read.train.steps:
            raise ValueError(f"a look after {steps} steps, and train.steps is {read.train.steps}; look earlier")
        task = Task(read, texts, read.train.steps, Path(folder), read.train.evaluate_size)
        with contest(task, names) as racers:
            still = running(racers)
            for _ in range(read.train.steps // steps):
                for racer in still:
                    racer.laps.append(lap(racer, steps))
                still = [racer for racer in still if not racer.laps[-1].held_out <= loss]
                if not still:
                    break
    state = machine()
    told.print(table(racers, task, loss, steps), state)
    if json is not None:
        found = {"machine": state, "recipe": asdict(read), "texts": texts, "until": loss, "steps a look": steps}
        each = {racer.name: figures(racer, loss, steps) for racer in running(racers)}
        write(Path(json), writer.dumps({**found, "contestants": each}, indent=1, default=str).encode())
    return racers


def seconds(racer: Racer, steps: int) -> float:
    """Of training so far."""
    return sum(lap.seconds * steps for lap in racer.laps)


def figures(racer: Racer, loss: float, steps: int) -> dict[str, Any]:
    return {
        "reached": bool(racer.laps) and racer.laps[-1].held_out <= loss,
        "seconds": seconds(racer, steps),
        "laps": [asdict(lap) for lap in racer.laps],
    }


def table(racers: Sequence[Racer], task: Task, loss: float, steps: int) -> Table:
    """A line each."""
    settings = task.recipe.train
    title = (
        f"to a loss of {loss:g} nats a target of {task.held} held-out pictures, looked at after every {steps} steps; "
        f"{settings.batch} pictures x {task.texts} texts a step"
    )
    shown = Table("", "seconds", "steps", "loss then", "ours is", title=title)
    first = seconds(racers[0], steps)
    for racer in racers:
        if racer.absent or racer.told is None:
            shown.add_row(what(racer, task), f"takes no part: {racer.absent}", *[""] * 3)
            continue
        reached = racer.laps[-1].held_out <= loss
        shown.add_row(
            what(racer, task),
            f"{seconds(racer, steps):.1f}" + ("" if reached else ", not reached"),
            str(steps * len(racer.laps)),
            f"{racer.laps[-1].held_out:.4f}",
            f"{seconds(racer, steps) / first:.2f}x" if reached and racer is not racers[0] else "",
        )
    return shown
