"""What a run takes of memory and time, from computing a small step of it here.

A micro-batch of two and one of four examples are computed, and what they take is carried on to the recipe's along a
line: what is there once, and what each example adds.
"""

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bridges.build import Assembled, Built, towers_of, trained
from bridges.config import Recipe
from bridges.data.batch import Batch
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.towers.language import LanguageTower
from bridges.training.loop import adam
from bridges.training.stage import Stage, open_stage

PROBES = (2, 4)


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of a recipe on this machine, in the number format that it uses for frozen weights."""

    trained: int
    """Parameters of the bridge, and of adapters."""
    frozen: dict[str, int]
    """Parameters of each tower."""
    weights: float
    narrow: float
    """Bytes of the frozen weights, here and with every number in two bytes at most."""
    inside: bool
    """Whether a frozen language model is in between: what passes through it is as narrow as its weights."""
    state: int
    """Bytes of what trains: its weights and AdamW's two moments."""
    gradients: int
    once: float
    each: float
    """Bytes of computing a step that are there once, and that each example of a micro-batch adds, without gradients."""
    update: int
    """Bytes of gradients and of what AdamW makes beside them, after that."""
    batch: int
    """Examples a step, of all data that it mixes: gradients stay from one micro-batch to the next."""
    positions: float
    slots: int
    targets: float
    """Of a mean example."""
    seconds: float
    """A step of the recipe's micro-batches."""

    def memory(self, micro_batch: int) -> float:
        """Bytes at the peak of a step with micro-batches of this size."""
        stay = self.gradients if micro_batch < self.batch else 0
        return self.weights + self.state + max(self.update, stay + self.once + self.each * micro_batch)


def plan_of(recipe: Recipe, stage: Stage | None = None) -> Plan:
    """Compute two small micro-batches of the recipe, and carry on. Raises ValueError for what the user can mend."""
    stage = stage or open_stage(recipe)
    data = SkipBroken(open_split(recipe.data, "train"))
    model: Any = stage.built.model
    model.train()
    count = min(32, len(data))
    batch = stage.batch([data[i] for i in range(count)])
    # before it counts: what is made at the first step only
    _, small, large = (computing(stage, [data[i % len(data)] for i in range(n)]) for n in (PROBES[0], *PROBES))
    each = max(0.0, (large[0] - small[0]) / (PROBES[1] - PROBES[0]))
    gradients, update = updating(stage.built)
    return Plan(
        trained=sum(p.numel() for p in trained(stage.built)),
        frozen={tower.name: parameters_of(tower) for tower in towers_of(stage.built).values()},
        weights=frozen_bytes(stage.built, widest=8),
        narrow=frozen_bytes(stage.built, widest=2),
        inside=isinstance(stage.built, Assembled),
        state=state_of(stage.built),
        gradients=gradients,
        once=max(0.0, small[0] - PROBES[0] * each),
        each=each,
        update=update,
        batch=sum(d.batch or recipe.train.batch for d in (recipe.data, *recipe.also)),
        positions=int((batch.segments >= 0).sum()) / count if isinstance(batch, Batch) else float(batch.ids.shape[1]),
        slots=model.bridge.num_slots,
        targets=batch.num_targets / count,
        seconds=large[1] / PROBES[1] * recipe.train.batch,
    )


def parameters_of(tower: nn.Module) -> int:
    """Frozen ones; a quantized weight counts as many as it stands for."""
    packed: list[Any] = tower.quantized if isinstance(tower, LanguageTower) else []
    inside = {id(layer.weight) for layer in packed}
    rest = sum(p.numel() for p in tower.parameters() if not p.requires_grad and id(p) not in inside)
    return rest + sum(layer.in_features * layer.out_features for layer in packed)


def frozen_bytes(built: Built, widest: int) -> float:
    """Of the towers' weights and buffers, with numbers of `widest` bytes at most."""
    tensors = [t for tower in towers_of(built).values() for t in (*tower.parameters(), *tower.buffers())]
    frozen = [t for t in tensors if not t.requires_grad]
    return float(sum(t.numel() * min(t.element_size(), widest if t.is_floating_point() else 8) for t in frozen))


def state_of(built: Built) -> int:
    """Weights of the bridge and of adapters, and AdamW's two moments of those that train."""
    still = [t for t in (*built.model.bridge.parameters(), *built.model.bridge.buffers()) if not t.requires_grad]
    return sum(t.numel() * t.element_size() for t in still) + sum(
        3 * p.numel() * p.element_size() for p in trained(built)
    )


def on_gpu(found: Plan) -> Plan:
    """There frozen weights, and what passes through them, take two bytes; what trains keeps four."""
    through = 0.5 if found.inside and found.narrow < found.weights else 1.0
    return replace(found, weights=found.narrow, each=found.each * through)


def computing(stage: Stage, examples: Sequence[Any]) -> tuple[int, float]:
    """Bytes and seconds of a micro-batch forward and backward.

    Gradients are dropped as they come: they grow as activations go, and would hide these where there are few.
    """
    batch = stage.batch(examples)

    def work() -> None:
        stage.loss(stage.built.model, batch)[0].backward()

    hooks = [p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None)) for p in trained(stage.built)]
    began = time.perf_counter()
    try:
        return peak(work), time.perf_counter() - began
    finally:
        for hook in hooks:
            hook.remove()


def updating(built: Built) -> tuple[int, int]:
    """Bytes of the gradients, and of these with what AdamW makes beside them; no weight changes."""
    optimizer = adam(built.model, built.recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in trained(built):
        parameter.grad = torch.zeros_like(parameter)
    gradients = sum(p.numel() * p.element_size() for p in trained(built))
    optimizer.step()  # the first makes the moments
    beside = peak(optimizer.step)
    optimizer.zero_grad()
    return gradients, gradients + beside


def peak(work: Callable[[], object]) -> int:
    """The most bytes of CPU tensors that `work` holds at once beyond those that were there."""
    gc.collect()  # what nobody holds any more would go in between, and count as given back by the work
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler tells when it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    results: Any = profiled.profiler
    events = results.kineto_results.events()
    held = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
