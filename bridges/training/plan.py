"""`bridges plan`: what a run takes, before it is paid for: parameters, memory, tokens, steps, time, and its choices."""

import re
from math import isnan

from rich.console import Console
from rich.table import Table

from bridges.config import Recipe
from bridges.training.choices import choices
from bridges.training.inspection import table
from bridges.training.probe import Plan, on_gpu, plan_of
from bridges.training.stage import open_stage

GPU_RATE = 50e12
"""Operations a second that a consumer GPU gives a frozen language model in bfloat16: a round figure, not a promise."""
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def size_of(text: str) -> float:
    """Bytes of `24GB`, `24 GB`, `500M`. Raises ValueError."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"gpu {text!r}: give its memory, such as 24GB")
    return float(found[1]) * UNITS[found[2].upper()]


def plan(recipe: Recipe, gpu: str | None = None) -> None:
    """Print the plan of a recipe, and what each choice costs."""
    limit = size_of(gpu) if gpu else None
    stage = open_stage(recipe)
    found, console = plan_of(recipe, stage), Console()
    half = on_gpu(found)
    micro = recipe.train.micro_batch or recipe.train.batch
    console.print(table(lines_of(found, recipe, micro)))
    console.print("\nmemory of a step, by the micro-batch (train.micro_batch)", highlight=False)
    shown = Table("micro-batch", "here", "GPU, bfloat16", *([f"fits {gpu}"] if limit else []), box=None)
    for size in (s for s in sorted({1, 2, 4, 8, 16, 32, 64, micro}) if s <= recipe.train.batch):
        fits = ["yes" if half.memory(size) * 1.1 < limit else "no"] if limit else []
        shown.add_row(str(size), gigabytes(found.memory(size)), gigabytes(half.memory(size)), *fits)
    console.print(shown)
    if limit:
        console.print(f"\na GPU of {gpu}, a tenth of it kept free, takes {most_of(half, limit)}", highlight=False)
    console.print(f"\nwhat choices cost, in micro-batches of {micro}", highlight=False)
    shown = Table("choice", "trains", "positions", "here", "GPU, bfloat16", "time", box=None)
    for name, other in choices(recipe, stage, found):
        sizes = (gigabytes(p.memory(micro)) for p in (other, on_gpu(other)))
        time = "–" if isnan(other.seconds) else f"{other.seconds / found.seconds:.2f}"
        shown.add_row(name, f"{other.trained:,}", f"{other.positions:.0f}", *sizes, time)
    console.print(shown)


def most_of(found: Plan, limit: float) -> str:
    """The largest micro-batch of a step for so many bytes, a tenth of which stays free."""
    sizes = [size for size in range(1, 1025) if found.memory(size) * 1.1 < limit]
    return f"micro-batches up to {max(sizes)}" if sizes else "not even one example: choose smaller towers"


def lines_of(found: Plan, recipe: Recipe, micro: int) -> list[tuple[str, str]]:
    settings = recipe.train
    frozen = sum(found.frozen.values())
    work = (
        4 * frozen * found.positions * settings.batch * settings.steps
    )  # forward and backward, 2 a parameter and token
    return [
        ("trains", f"{found.trained:,} parameters; {gigabytes(found.state)} with AdamW's moments"),
        *((f"frozen {name}", f"{size:,} parameters") for name, size in found.frozen.items()),
        ("frozen weights", f"{gigabytes(found.weights)} here, {gigabytes(found.narrow)} on a GPU"),
        (
            "an example",
            f"{found.positions:.0f} positions, {found.targets:.0f} of them targets; {found.slots} slots "
            + ("an image" if recipe.vision.tiles else "a picture"),
        ),
        ("its activations", f"{found.each / 1e6:.1f} MB; a position costs {found.each / found.positions / 1e6:.2f} MB"),
        (
            "a step",
            f"{settings.batch} examples in micro-batches of {micro}; peak {gigabytes(found.memory(micro))} here",
        ),
        (
            "the run",
            f"{settings.steps} steps, {found.positions * settings.batch * settings.steps / 1e6:.1f} million positions",
        ),
        ("time here", f"{found.seconds * settings.steps / 3600:.2f} h of computing"),
        ("time on a GPU", f"about {work / GPU_RATE / 3600:.2f} h at {GPU_RATE / 1e12:.0f} TFLOP/s"),
    ]


def gigabytes(size: float | int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
