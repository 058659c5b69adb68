"""What came out of a contest: a table to read, JSON to keep, and on what machine."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from bridges import __version__
from bridges.benchmark.contest import Racer, Task
from bridges.benchmark.multiplications import peak
from bridges.benchmark.techniques import OURS
from bridges.benchmark.techniques import told as words
from bridges.files import write
from bridges.towers.precision import fastest_device, fastest_dtype

PEERS = {"projector": "Llava", "qformer": "Blip2", "flamingo": "Idefics"}


def what(racer: Racer, task: Task) -> str:
    """What a contestant is, in words."""
    if racer.name in OURS:
        told = racer.told
        kept = f" ({told.pictures} pictures encoded before, in {told.ahead:.1f} s)" if told and told.pictures else ""
        return words(racer.name) + kept
    model, dtype = PEERS.get(task.recipe.bridge["name"], "?"), str(fastest_dtype()).removeprefix("torch.")
    return {
        "tuned": f"{model} + Trainer, tuned: {dtype}, sdpa",
        "default": f"{model} + Trainer, as it comes: bfloat16",
        "trl": f"{model} + TRL's SFTTrainer, {dtype}",
    }[racer.name]


def times_faster(first: Racer, other: Racer) -> list[float]:
    """How often the first is done while the other is done once, round by round."""
    return [theirs.seconds / ours.seconds for ours, theirs in zip(first.laps, other.laps, strict=True)]


def alone(racer: Racer, racers: Sequence[Racer]) -> str:
    """What one of ours gains over doing without all techniques, if that takes part."""
    plain = next((other for other in racers if other.name == "plain"), None)
    if plain is None or plain is racer or racer.name not in OURS:
        return ""
    return ratio(times_faster(racer, plain))


def ratio(times: Sequence[float]) -> str:
    return f"{median(times):.2f}x [{min(times):.2f} – {max(times):.2f}]"


def table(racers: Sequence[Racer], task: Task, rounds: int, steps: int) -> Table:
    """A line each; figures are medians of the rounds, with the least and the most in brackets."""
    recipe = task.recipe
    told = racers[0].told
    assert told is not None
    count = recipe.train.batch * task.texts
    title = (
        f"{rounds} rounds of {steps} steps: {recipe.train.batch} pictures x {task.texts} texts, {told.size.targets} "
        f"targets in the first; first loss {told.loss:.5f}"
    )
    best = peak(fastest_device(), fastest_dtype())
    heads = ("samples/s", "targets/s", "s a step", "cpu s", "see / forward / back", "tokens", "GFLOP", "of peak")
    heads += ("peak GB", "gradient off")
    shown = Table(
        "", *heads, "ours is", "beside plain", title=title, caption=f"peak: a large product, {best / 1e9:.0f} GFLOP/s"
    )
    for racer in racers:
        if racer.absent or racer.told is None:
            shown.add_row(what(racer, task), f"takes no part: {racer.absent}", *[""] * 11)
            continue
        seconds = [lap.seconds for lap in racer.laps]
        middle = median(seconds)
        size = racer.told.size
        shown.add_row(
            what(racer, task),
            f"{count / middle:.2f} [{count / max(seconds):.2f} – {count / min(seconds):.2f}]",
            f"{median(lap.targets for lap in racer.laps) / middle:.1f}",
            f"{middle:.2f}",
            f"{median(lap.cpu for lap in racer.laps):.2f}",
            " / ".join(f"{racer.parts.get(part, 0.0):.0%}" for part in ("vision", "forward", "backward")),
            str(size.tokens),
            f"{size.flops / 1e9:.0f}",
            f"{size.flops / middle / best:.0%}",
            f"{racer.memory / 1e9:.2f}",
            f"{racer.apart[1]:.0e}",
            "" if racer is racers[0] else ratio(times_faster(racers[0], racer)),
            alone(racer, racers),
        )
    return shown


def machine() -> str:
    """Versions, threads and load, in a line."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate"))
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"bridges {__version__}, {versions}, Python {platform.python_version()}; {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} cores, load {load}. The vision tower is the same module for all, inside each one's step."
    )


def write_standings(path: Path, racers: Sequence[Racer], task: Task, rounds: int, steps: int, state: str) -> None:
    """Everything that was measured."""
    result: dict[str, Any] = {
        "machine": state,
        "recipe": asdict(task.recipe),
        "texts": task.texts,
        "rounds": rounds,
        "steps": steps,
        "contestants": {
            racer.name: {
                "what": what(racer, task),
                "absent": racer.absent,
                "first loss": racer.told and racer.told.loss,
                "loss apart": racer.apart[0],
                "gradient apart": racer.apart[1],
                "size": racer.told and asdict(racer.told.size),
                "parts": racer.parts,
                "peak bytes": racer.memory,
                "times slower than ours": times_faster(racers[0], racer) if racer.laps else [],
                "laps": [asdict(lap) for lap in racer.laps],
            }
            for racer in racers
        },
    }
    write(path, json.dumps(result, indent=1, default=str).encode())
