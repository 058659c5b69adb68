"""What a person sees of a run: a first line, a bar with an ETA, and metrics.jsonl."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from bridges import adapter
from bridges.build import Built, towers_of
from bridges.files import write
from bridges.training.engine import flat

METRICS = "metrics.jsonl"


def counts(built: Built) -> str:
    """Who trains and who is frozen, with the number of parameters of each."""

    def size(part: nn.Module, trains: bool) -> int:
        return sum(p.numel() for p in part.parameters() if p.requires_grad == trains)

    bridge = built.model.bridge
    frozen = [f"{tower.name} ({size(tower, False):,})" for tower in towers_of(built).values()]
    frozen += [f"of the bridge {size(bridge, False):,}"] if size(bridge, False) else []
    trains = [f"bridge ({size(bridge, True):,} parameters)"]
    for kind, tower in towers_of(built).items():
        beside = sum(p.numel() for p in adapter.parameters(tower))
        trains += [f"{kind} adapter ({beside:,})"] if beside else []
    return f"trains: {', '.join(trains)}   frozen: {', '.join(frozen)}"


class Display:
    """Shows and logs a run on the main process; keeps still on the others."""

    def __init__(self, built: Built, first: int, accelerator: Accelerator) -> None:
        recipe, main = built.recipe, accelerator.is_main_process
        self.settings, self.main, self.first, self.accelerator = recipe.train, main, first, accelerator
        self.batch = sum(data.batch or recipe.train.batch for data in (recipe.data, *recipe.also))
        self.console = Console(quiet=not main)
        self.console.print(counts(built), highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not (main and self.console.is_terminal))
        self.task = self.bar.add_task("training", total=self.settings.steps, completed=first)
        if main:
            forget_after(Path(recipe.output) / METRICS, first)
        self.file = (Path(recipe.output) / METRICS).open("a") if main else None
        if recipe.train.track:
            told = {key: v if isinstance(v, (int, float, str)) else str(v) for key, v in flat(asdict(recipe)).items()}
            accelerator.init_trackers("bridges", told)
        self.began = self.since = time.monotonic()
        self.figures: list[dict[str, float]] = []
        self.lr = 0.0

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        if self.file:
            self.file.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def advance(self, step: int, figures: dict[str, float], lr: float) -> None:
        self.figures.append(figures)
        self.lr = lr
        rate = self.batch * (step - self.first) / (time.monotonic() - self.began)
        text = f"loss {figures['loss']:.3f}  lr {lr:.1e}  {rate:.1f} samples/s"
        self.bar.update(self.task, completed=step, description=text)

    def log(self, step: int) -> None:
        """One line of metrics.jsonl: means since the last."""
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        count = len(self.figures)
        means = {name: sum(f[name] for f in self.figures) / count for name in self.figures[0] if name != "targets"}
        row = {
            "step": step,
            **means,
            "lr": self.lr,
            "samples_per_second": self.batch * count / seconds,
            "targets_per_second": sum(f["targets"] for f in self.figures) / seconds,
            "seconds": time.monotonic() - self.began,
        }
        self.figures = []
        self._write(row)
        if self.main and not self.console.is_terminal:
            left = (self.settings.steps - step) * (time.monotonic() - self.began) / (step - self.first)
            self.console.print(
                f"step {step}/{self.settings.steps}  loss {row['loss']:.3f}  lr {self.lr:.1e}  "
                f"{row['samples_per_second']:.1f} samples/s  ETA {left / 60:.1f} min",
                highlight=False,
            )

    def validation(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        self._write({"step": step, "validation": figures})
        self._tell(step, {f"held-out {name.replace('_', ' ')}": values for name, values in figures.items()})

    def bridge(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        """What the bridge says of itself, if anything."""
        if figures:
            self._write({"step": step, "bridge": figures})
            self._tell(step, figures)

    def _tell(self, step: int, figures: dict[str, dict[str, float]]) -> None:
        for name, values in figures.items():
            told = "  ".join(f"{which} {value:.3f}" for which, value in values.items())
            self.console.print(f"step {step}  {name}:  {told}", highlight=False)

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.settings.track:
            train = {"train": {k: v for k, v in row.items() if k != "step"}}
            nested = row.get("validation") or row.get("bridge") or train
            values = {f"{group}/{name}": value for group, values in nested.items() for name, value in values.items()}
            self.accelerator.log(values, step=row["step"])


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        write(metrics, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
