"""`bridges fewshot`: how a checkpoint does with a few demonstrations in front of a query, and with more of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bridges.checkpoint import load
from bridges.evaluation.binding import binding, binding_text
from bridges.evaluation.fewshot_bench import Bench, Plan
from bridges.evaluation.fewshot_report import plot, table_text
from bridges.evaluation.fewshot_tasks import read_form
from bridges.files import write
from bridges.inference.demonstrations import Choice

RESULTS = "fewshot.json"
SHOTS = {**dict.fromkeys(("caption", "vqa", "classify"), "0,4,8,16"), "binding": "1,3,5"}
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def fewshot(
    checkpoint: str | Path,
    data: str | None = None,
    task: Literal["caption", "vqa", "classify", "binding"] = "caption",
    shots: str | None = None,
    choose: Choice = "fixed",
    queries: int = 100,
    seeds: int = 3,
    template: str | None = None,
    kind: str | None = None,
    pool: int = 1000,
    text_shots: int = 2,
    batch: int = 32,
) -> dict[str, Any]:
    """Measure a checkpoint with each number of demonstrations; print, write and return the figures.

    Figures of other tasks and choices stay in fewshot.json. Raises ValueError where the data or the template does not
    suit the task, or the demonstrations do not fit the context.
    """
    folder, console, counts = Path(checkpoint), Console(), numbers(shots or SHOTS[task])
    given = {"queries": (queries, 2), "seeds": (seeds, 1), "pool": (pool, 1), "batch": (batch, 1)}
    for name, (value, least) in {**given, "text_shots": (text_shots, 0)}.items():
        if value < least:
            raise ValueError(f"--{name} {value}: give at least {least}")
    if task == "binding":
        for name, value in {"data": data, "template": template, "kind": kind}.items():
            if value:
                raise ValueError(f"--{name} has no meaning for binding, which makes its own episodes; leave it out")
        result = binding(load(folder), counts, queries, batch, console)
        write_results(folder, "binding", result)
        console.print(binding_text(result))
        return result
    plan = Plan(task, counts, choose, queries, seeds, kind, pool, batch, text_shots)
    form = read_form(task, template)
    bench = Bench(load(folder), data, plan, form, console)
    return measured(folder, bench, console)


def numbers(shots: str) -> tuple[int, ...]:
    """`0,4,8` in order, each once. ValueError for what is no number of demonstrations."""
    try:
        counts = sorted({int(number) for number in shots.split(",")})
    except ValueError:
        counts = [-1]
    if counts[0] < 0:
        raise ValueError(f"--shots {shots}: give numbers of demonstrations, such as 0,4,8,16")
    return tuple(counts)


def measured(folder: Path, bench: Bench, console: Console) -> dict[str, Any]:
    """Every trial; the table, the plot and the figures of it."""
    with Progress(*COLUMNS, console=console) as progress:
        result = bench.run(progress)
    plan = bench.plan
    picture = folder / f"fewshot_{plan.task}_{plan.choose}.svg"
    write(picture, plot(result).encode())
    write_results(folder, f"{plan.task} {plan.choose}", result)
    Console(width=max(console.width, 100)).print(table_text(result))
    console.print(f"{folder / RESULTS} and {picture} written", highlight=False)
    return result


def write_results(folder: Path, name: str, result: Mapping[str, Any]) -> None:
    """Beside those measured before."""
    path = folder / RESULTS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write(path, json.dumps({**known, name: result}, indent=2).encode())
