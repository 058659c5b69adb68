"""`bridges plan`: what a run takes, before it is paid for: parameters, memory, tokens, steps and time.

A step of two and one of four examples are computed on this machine, and what they take is carried on to the recipe's
batch along a line: what is there once, and what each example adds.
"""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bridges.checkpoint import Assembled, towers_of
from bridges.config import Recipe
from bridges.data.batch import Batch
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.training.loop import parameter_groups
from bridges.training.stage import Stage, open_stage

PROBES = (2, 4)
GPU_RATE = 50e12
"""Operations a second that a consumer GPU gives a frozen language model in bfloat16: a round figure, not a promise."""
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Step:
    """What one step takes: bytes beyond what is always there, while it computes and while AdamW steps; seconds."""

    compute: int
    update: int
    seconds: float

    @property
    def transient(self) -> int:
        return max(self.compute, self.update)


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of a recipe on this machine, in the number format that it uses for frozen weights."""

    trained: int
    frozen: dict[str, int]
    """Parameters of each tower."""
    weights: float
    state: int
    """Bytes of what trains: its weights and AdamW's two moments. Gradients come and go with a step."""
    once: float
    each: float
    """Bytes of computing a step that are there once, and that each example of a micro-batch adds."""
    update: int
    """Bytes of gradients and of what AdamW makes beside them, after that."""
    positions: float
    slots: int
    targets: float
    """Of a mean example."""
    seconds: float
    """A step of the recipe's micro-batches."""

    def memory(self, micro_batch: int) -> float:
        """Bytes at the peak of a step with micro-batches of this size."""
        return self.weights + self.state + max(self.update, self.once + self.each * micro_batch)


def plan_of(recipe: Recipe, stage: Stage | None = None) -> Plan:
    """Compute two small steps of the recipe, and carry on. Raises ValueError for what the user can mend."""
    stage = stage or open_stage(recipe)
    data = SkipBroken(open_split(recipe.data, "train"))
    model: Any = stage.built.model
    model.train()
    small, large = (measure(stage, [data[i % len(data)] for i in range(count)], drop=True) for count in PROBES)
    each = max(0.0, (large.compute - small.compute) / (PROBES[1] - PROBES[0]))
    batch = stage.batch([data[i] for i in range(min(32, len(data)))])
    count = min(32, len(data))
    return Plan(
        trained=sum(p.numel() for p in model.bridge.parameters() if p.requires_grad),
        frozen={tower.name: sum(p.numel() for p in tower.parameters()) for tower in towers_of(stage.built).values()},
        weights=float(sum(bytes_of(tower) for tower in towers_of(stage.built).values())),
        state=state_of(model.bridge),
        once=max(0.0, small.compute - PROBES[0] * each),
        each=each,
        update=large.update,
        positions=int((batch.segments >= 0).sum()) / count if isinstance(batch, Batch) else float(batch.ids.shape[1]),
        slots=getattr(model.bridge, "num_slots", 0),
        targets=batch.num_targets / count,
        seconds=large.seconds / PROBES[1] * recipe.train.batch,
    )


def measure(stage: Stage, examples: Sequence[Any], drop: bool = False) -> Step:
    """One micro-batch forward and backward, and AdamW's step, the second of two: the first makes AdamW's moments.

    With `drop`, `compute` leaves out the gradients: they grow as activations go, and hide them where there are few.
    """
    model: Any = stage.built.model
    kept = {name: tensor.clone() for name, tensor in model.bridge.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model.bridge, stage.built.recipe.train), lr=0.0)
    batch = stage.batch(examples)

    def compute() -> None:
        stage.loss(model, batch)[0].backward()

    compute()
    optimizer.step()
    optimizer.zero_grad()
    began = time.perf_counter()
    computing = peak(compute)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.bridge.parameters() if p.grad is not None)
    updating = gradients + peak(optimizer.step)
    seconds = time.perf_counter() - began
    optimizer.zero_grad()
    if drop:
        trained = [p for p in model.bridge.parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained]
        computing = peak(compute)
        for hook in hooks:
            hook.remove()
    found = Step(computing, updating, seconds)
    model.bridge.load_state_dict(kept)
    return found


def peak(work: Callable[[], None]) -> int:
    """The most bytes of CPU tensors that `work` holds at once beyond those that were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results: Any = profiled.profiler
    events = results.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def state_of(bridge: nn.Module) -> int:
    """Weights of the bridge, and AdamW's two moments of those that train."""
    return bytes_of(bridge) + 2 * sum(p.numel() * p.element_size() for p in bridge.parameters() if p.requires_grad)


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
    micro = recipe.train.micro_batch or recipe.train.batch
    console.print(grid(lines_of(found, recipe, micro)))
    console.print("\nmemory of a step, by the micro-batch (train.micro_batch)", highlight=False)
    half = halved(found, stage)
    sizes = sorted({1, 2, 4, 8, 16, 32, 64, micro})
    table = Table(
        "micro-batch", "here", "GPU, bfloat16", "frozen in 4 bits", *(["fits " + str(gpu)] if limit else []), box=None
    )
    for size in (s for s in sizes if s <= recipe.train.batch):
        on_gpu = half.memory(size)
        fits = ["yes" if on_gpu * 1.1 < limit else "no"] if limit else []
        table.add_row(
            str(size), *(gigabytes(m) for m in (found.memory(size), on_gpu, on_gpu - 0.75 * half.weights)), *fits
        )
    console.print(table)
    if limit:
        most = int((limit / 1.1 - half.weights - half.state - half.once) // max(half.each, 1))

        most = 0 if half.memory(1) * 1.1 > limit else most
        told = f"micro-batches up to {most}" if most > 0 else "not even one example: choose smaller towers"
        console.print(f"\na GPU of {gpu}, a tenth of it kept free, takes {told}", highlight=False)


def halved(found: Plan, stage: Stage) -> Plan:
    """On a GPU frozen weights, and what passes through them, take two bytes; what trains keeps four."""
    wide = stage.built.model.vision.dtype == torch.float32
    share = 0.5 if wide and isinstance(stage.built, Assembled) else 1.0
    weights = found.weights * (0.5 if wide else 1.0)
    return Plan(**{**vars(found), "weights": weights, "each": found.each * share})


def lines_of(found: Plan, recipe: Recipe, micro: int) -> list[tuple[str, str]]:
    settings = recipe.train
    frozen = sum(found.frozen.values())
    work = (
        4 * frozen * found.positions * settings.batch * settings.steps
    )  # forward and backward, 2 a parameter and token
    return [
        ("trains", f"{found.trained:,} parameters; {gigabytes(found.state)} with AdamW's moments"),
        *((f"frozen {name}", f"{size:,} parameters") for name, size in found.frozen.items()),
        ("frozen weights", f"{gigabytes(found.weights)} here; in 4 bits {gigabytes(frozen / 2)}"),
        (
            "an example",
            f"{found.positions:.0f} positions, {found.targets:.0f} of them targets; {found.slots} slots a picture",
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


def grid(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in lines:
        table.add_row(name, value)
    return table
