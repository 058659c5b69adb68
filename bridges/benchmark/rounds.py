"""Ways to do the same thing, timed in turns."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bridges.files import write
from bridges.towers.precision import CHOICE


def enough(rounds: int) -> None:
    """ValueError for fewer than 3."""
    if rounds < 3:
        raise ValueError(f"{rounds} rounds say little; take at least 3")


def differ(what: str, dtype: torch.dtype, console: Console) -> None:
    """Ways that ought to be equal are not: ValueError in float32; in formats that round more it is told, no more."""
    if dtype in (torch.float32, torch.float64):
        raise ValueError(what)
    rounds = f"{str(dtype).removeprefix('torch.')} rounds; {CHOICE}=float32 shows whether they are equal"
    console.print(f"{what} ({rounds})", style="yellow", highlight=False, markup=False, soft_wrap=True)


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in every round, one way after the other in each.

    What a first run has to set up is not to be in it: run each way once before.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            began = perf_counter()
            run()
            seconds[way].append(perf_counter() - began)
    return seconds


def figures(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of each way the median, the least and the most; and how many times longer than the first it takes."""
    first = median(next(iter(seconds.values())))
    return {
        way: {"median": median(times), "least": min(times), "most": max(times), "times": median(times) / first}
        for way, times in seconds.items()
    }


def table(title: str, seconds: Mapping[str, Sequence[float]], beside: Mapping[str, Mapping[str, object]]) -> Table:
    """A row for each way; `beside` are further columns, by their heads."""
    shown = Table(title, "median s", "least", "most", "times the first", *beside)
    for way, found in figures(seconds).items():
        times = (f"{found[name]:.4f}" for name in ("median", "least", "most"))
        shown.add_row(way, *times, f"{found['times']:.1f}", *(str(column[way]) for column in beside.values()))
    return shown


def write_figures(path: str | None, what: str, checkpoint: str, found: Mapping[str, Any]) -> None:
    """As JSON, with the conditions; nothing without a path."""
    if path:
        told = {"what": what, "checkpoint": checkpoint, "torch": torch.__version__, "threads": torch.get_num_threads()}
        write(Path(path), json.dumps({**told, **found}, indent=2).encode())
