"""Training steps of this toolkit and of its peers side by side: first that they compute the same, then how fast.

Every contestant has a process of its own; they take turns, A B A B, so that whatever else this machine does meets all.
"""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from bridges.benchmark import ours, theirs
from bridges.benchmark.contest import Failed, Lap, Racer, Task, take_part
from bridges.benchmark.rounds import enough
from bridges.benchmark.shapes import LANGUAGE, VISION, language_shape, vision_shape
from bridges.benchmark.standings import machine, table, write_standings
from bridges.benchmark.techniques import OURS
from bridges.config import Recipe
from bridges.recipe import read_recipe
from bridges.towers.precision import fastest_dtype

EXACT, ROUGH = (1e-4, 1e-4), (2e-2, 0.5)
"""How far first loss and gradient may be apart, relative to their size: in fp32, in bfloat16. Thirty layers in bfloat16
round the gradient of a fresh bridge by half of its size (measured: 0.49 from fp32's, whatever attention computes in;
two contestants 0.13 and 0.28 apart that in fp32 are within 1e-5), which the table tells; `BRIDGES_DTYPE=float32` shows
whether they are equal."""
WARM = 1
USUAL = ["tuned", "default"]


def train(
    recipe: str,
    rounds: int = 3,
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
    """Print, and return, how long the contestants take over the same steps, and what they need of memory.

    Nothing is timed unless first loss and gradient are those of `ours`. Raises ValueError where they are not, and for
    what cannot be compared.
    """
    enough(rounds)
    read = read_recipe(recipe)
    names = named(contestant or USUAL, steps, texts, read)
    told = console or Console()
    with TemporaryDirectory() as folder:
        read = settled(read, vision, language, batch, questions, Path(folder))
        task = Task(read, texts, steps=WARM + 1 + rounds * steps, folder=Path(folder))
        with contest(task, names) as racers:
            race(racers, rounds, steps)
    state = machine()
    told.print(table(racers, task, rounds, steps), state)
    if json is not None:
        write_standings(Path(json), racers, task, rounds, steps, state)
    return racers


def named(contestant: Sequence[str], steps: int, texts: int, recipe: Recipe) -> list[str]:
    """Ours, and those that are to be beside it. ValueError for one that there is not, or for nothing to do."""
    known = [*OURS, *theirs.THEIRS]
    if wrong := [name for name in contestant if name not in known]:
        raise ValueError(f"no contestant {wrong[0]!r}; there are {', '.join(known)}")
    if recipe.vision.cache is None and any(name.endswith("-cache") for name in contestant):
        raise ValueError("the recipe keeps no features that one could do without; add vision: {cache: fp32} to it")
    if min(steps, texts) < 1:
        raise ValueError(f"{steps} steps a round, {texts} texts a picture: at least 1 of each")
    return ["ours", *(name for name in contestant if name != "ours")]


def settled(
    recipe: Recipe,
    vision: str | None,
    language: str | None,
    batch: int | None,
    questions: float | None,
    folder: Path,
) -> Recipe:
    """With other towers, batch, or share of questions; towers that only have a shape are made up in `folder`."""
    if questions is not None:
        recipe = replace(recipe, data=replace(recipe.data, questions=questions))
    if batch is not None:
        recipe = replace(recipe, train=replace(recipe.train, batch=batch))
    recipe = replace(recipe, output=str(folder / "run"), train=replace(recipe.train, micro_batch=None))
    if vision is not None:
        made = made_up(vision_shape, vision, folder / "vision") if vision in VISION else vision
        recipe = replace(recipe, vision=replace(recipe.vision, name=made, layer=-1))
    if language is not None:
        tokenizer = recipe.language.name
        made = made_up(language_shape, language, folder / "language", tokenizer) if language in LANGUAGE else language
        recipe = replace(recipe, language=replace(recipe.language, name=made))
    return recipe


def made_up(shape: Callable[..., None], name: str, folder: Path, *more: str) -> str:
    """Written in a process of its own, because one that once was large passes its peak of memory on."""
    maker = multiprocessing.get_context("spawn").Process(target=shape, args=(name, folder, *more))
    maker.start()
    maker.join()
    return str(folder)


@contextmanager
def contest(task: Task, names: Sequence[str]) -> Iterator[list[Racer]]:
    """All contestants, before their first step, those among them that take no part included.

    Raises ValueError where one does not compute the same. They end with the context.
    """
    absent = {name: "not installed" for name in names if name == "trl" and find_spec("trl") is None}
    racers: list[Racer] = []
    try:
        racers.append(start(task, "ours"))
        hear(racers[0])
        if racers[0].absent:
            raise ValueError(racers[0].absent)
        racers += [start(task, name) for name in names[1:] if name not in absent]
        for racer in racers[1:]:
            hear(racer)
        if len(running(racers)) == 1 < len(racers):
            raise ValueError(f"{racers[1].name} takes no part: {racers[1].absent}")
        compare(running(racers))
        unheard = [Racer(name, racers[0].pipe, None, absent=why) for name, why in absent.items()]
        yield sorted(racers + unheard, key=lambda racer: names.index(racer.name))
    finally:
        for racer in racers:
            racer.process.kill()
            racer.process.join()


def running(racers: Sequence[Racer]) -> list[Racer]:
    return [racer for racer in racers if not racer.absent]


def race(racers: Sequence[Racer], rounds: int, steps: int) -> None:
    """Round after round, each in its turn; then what each needed of memory."""
    for racer in running(racers):
        racer.parts = lap(racer, WARM).parts
    for _ in range(rounds):
        for racer in running(racers):
            racer.laps.append(lap(racer, steps))
    for racer in running(racers):
        racer.pipe.send(0)
        racer.memory = answer(racer)


def start(task: Task, name: str) -> Racer:
    context: Any = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    run = ours.run if name in OURS else theirs.run
    process = context.Process(target=take_part, args=(there, run, task, name), daemon=True)
    process.start()
    there.close()
    return Racer(name, here, process)


def hear(racer: Racer) -> None:
    """Wait until it is ready, or out."""
    told = answer(racer, strict=False)
    if isinstance(told, Failed):
        racer.absent = told.reason
    else:
        racer.told = told


def answer(racer: Racer, strict: bool = True) -> Any:
    """What it tells next. ValueError, if `strict`, where it has failed."""
    try:
        told = racer.pipe.recv()
    except EOFError:
        told = Failed("its process ended; was there too little memory?")
    if strict and isinstance(told, Failed):
        raise ValueError(f"{racer.name}: {told.reason}")
    return told


def lap(racer: Racer, steps: int) -> Lap:
    racer.pipe.send(steps)
    return answer(racer)


def compare(racers: Sequence[Racer]) -> None:
    """ValueError where a contestant's first step is not that of the first one."""
    first = racers[0].told
    assert first is not None
    wanted, exact = load_file(first.gradient), fastest_dtype() == torch.float32
    for racer in racers:
        assert racer.told is not None
        loss = abs(racer.told.loss - first.loss)
        gradient = distance(load_file(racer.told.gradient), wanted)
        racer.apart = (loss, gradient)
        most = EXACT if exact and racer.name != "default" else ROUGH
        alike = loss / abs(first.loss) <= most[0] and gradient <= most[1]
        if not alike or racer.told.size.targets != first.size.targets:
            raise ValueError(
                f"{racer.name} does not compute the same, so nothing is timed: loss {racer.told.loss:.6f} beside "
                f"{first.loss:.6f}, {racer.told.size.targets} targets beside {first.size.targets}, gradient off by "
                f"{gradient:.1e} of its size (at most {most[1]:.0e})"
            )


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Of two gradients, relative to the size of the second. Infinite where they are not of the same tensors."""
    if found.keys() != wanted.keys():
        return float("inf")
    apart = sum(float((found[key] - wanted[key]).square().sum()) for key in wanted)
    return (apart / sum(float(g.square().sum()) for g in wanted.values())) ** 0.5
