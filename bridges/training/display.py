"""What a person sees of a run: a first line, a bar with an ETA, and metrics.jsonl."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bridges.config import Recipe
from bridges.model import BridgedModel
from bridges.training.state import METRICS


def counts(model: BridgedModel) -> str:
    """Who trains and who is frozen, with the number of parameters of each."""

    def size(part: Any) -> str:
        return f"{sum(p.numel() for p in part.parameters()):,}"

    return (
        f"trains: bridge ({size(model.bridge)} parameters)   frozen: {model.vision.name} ({size(model.vision)}), "
        f"{model.language.name} ({size(model.language)})"
    )


class Display:
    """Shows and logs a run on the main process; keeps still on the others."""

    def __init__(self, recipe: Recipe, model: BridgedModel, first: int, main: bool) -> None:
        self.settings, self.main, self.first = recipe.train, main, first
        self.console = Console(quiet=not main)
        self.console.print(counts(model), highlight=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, console=self.console, disable=not (main and self.console.is_terminal))
        self.task = self.bar.add_task("training", total=self.settings.steps, completed=first)
        self.file = (Path(recipe.output) / METRICS).open("a") if main else None
        self.board = None
        if recipe.train.tensorboard and main:
            from torch.utils.tensorboard import SummaryWriter  # extra [tensorboard]

            self.board = SummaryWriter(recipe.output)
        self.began = self.since = time.monotonic()
        self.losses: list[float] = []
        self.targets = 0
        self.lr = 0.0

    def __enter__(self) -> "Display":
        self.bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        if self.file:
            self.file.close()
        if self.board:
            self.board.close()

    def advance(self, step: int, loss: float, targets: int, lr: float) -> None:
        self.losses.append(loss)
        self.targets, self.lr = self.targets + targets, lr
        rate = self.settings.batch * (step - self.first) / (time.monotonic() - self.began)
        text = f"loss {loss:.3f}  lr {lr:.1e}  {rate:.1f} samples/s"
        self.bar.update(self.task, completed=step, description=text)

    def log(self, step: int) -> None:
        """One line of metrics.jsonl: means since the last."""
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        count = len(self.losses)
        row = {
            "step": step,
            "loss": sum(self.losses) / count,
            "lr": self.lr,
            "samples_per_second": self.settings.batch * count / seconds,
            "targets_per_second": self.targets / seconds,
            "seconds": time.monotonic() - self.began,
        }
        self.losses, self.targets = [], 0
        self._write(row)
        if self.main and not self.console.is_terminal:
            left = (self.settings.steps - step) * (time.monotonic() - self.began) / (step - self.first)
            self.console.print(
                f"step {step}/{self.settings.steps}  loss {row['loss']:.3f}  lr {self.lr:.1e}  "
                f"{row['samples_per_second']:.1f} samples/s  ETA {left / 60:.1f} min",
                highlight=False,
            )

    def validation(self, step: int, nll: dict[str, float]) -> None:
        self._write({"step": step, "validation": {"caption_nll": nll}})
        told = "  ".join(f"{control} {value:.3f}" for control, value in nll.items())
        self.console.print(f"step {step}  held-out loss:  {told}", highlight=False)

    def _write(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.board:
            flat = row.get("validation", {}).get("caption_nll") or {k: v for k, v in row.items() if k != "step"}
            for name, value in flat.items():
                self.board.add_scalar(
                    f"validation/{name}" if "validation" in row else f"train/{name}", value, row["step"]
                )
