"""This toolkit as a contestant: its own stage, engine and step, with all that spares it work or with less."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from bridges.benchmark.contest import FIRST, Clock, Size, Task, examples, held_out, ready
from bridges.benchmark.multiplications import counted
from bridges.benchmark.parts import Parts
from bridges.benchmark.techniques import settle
from bridges.data.batch import Batch
from bridges.data.conversation import Example
from bridges.store import Store
from bridges.training.ahead import fill
from bridges.training.engine import Engine, open_accelerator
from bridges.training.feed import Share
from bridges.training.loop import adam, backward, train_step
from bridges.training.stage import Loss, language_stage
from bridges.training.zero import open_engine


def run(pipe: Connection, task: Task, name: str) -> None:
    """Take part; `ours` also leaves the bridge's first weights for all others."""
    recipe, settings = task.recipe, task.recipe.train
    stage = language_stage(recipe)
    settle(stage, name)
    accelerator = open_accelerator(recipe)
    model: Any = stage.built.model.to(accelerator.device).train()
    open_gates(model.bridge, 0.5)
    if name == "ours":
        save_file(model.bridge.state_dict(), task.folder / FIRST)
    engine = open_engine(accelerator, model, adam(model, recipe), None)
    steps = examples(task)
    # towards a loss every picture is encoded when it comes, in the time that counts; rounds are those of later epochs
    ahead = encoded(stage.store, steps) if stage.store is not None and not task.held else (0.0, 0)
    held = [stage.batch(some) for some in held_out(task)]

    def prepared(step: int) -> list[Share]:
        return [Share(recipe.data.source, 1.0, [stage.batch(steps[step])])]

    pipe.send(ready(task, name, *first_step(engine, prepared(0)[0], stage.loss), ahead))
    parts = Parts()
    parts.watch("vision", model.vision)
    parts.watch("forward", model)
    parts.watch("backward", engine, "backward")

    with ThreadPoolExecutor(1) as pool:
        step, coming = 0, pool.submit(prepared, 0)
        while count := pipe.recv():
            clock = Clock(parts)
            for _ in range(count):
                shares, step = coming.result(), step + 1
                coming = pool.submit(prepared, step % task.steps)
                figures = train_step(engine, shares, settings.clip, stage.loss)
                clock.tick(figures["loss"], int(figures["targets"]))
            wait([coming])  # as many batches are prepared in a lap as are used in it
            lap = clock.lap()
            pipe.send(replace(lap, held_out=loss_of(engine, held, stage.loss)) if held else lap)


def first_step(engine: Engine, share: Share, loss: Loss) -> tuple[float, Size, dict[str, torch.Tensor]]:
    """Mean loss, size, and gradients by the bridge's own names, of a step that changes nothing."""
    (total, targets, _), flops = counted(lambda: backward(engine, share, loss, last=True))
    found = {key.removeprefix("bridge."): p.grad for key, p in engine.trained().items() if p.grad is not None}
    engine.optimizer.zero_grad()
    return total / targets, Size(targets, share.batches[0].input_ids.numel(), flops), found


def encoded(store: Store, steps: Sequence[Sequence[Example]]) -> tuple[float, int]:
    """Keep all pictures of some steps; the seconds that it takes, and how many they are."""
    every = list({id(example): example for step in steps for example in step}.values())
    began = perf_counter()
    fill(store, [(every, len(every))], 0, 1, Console(quiet=True))
    return perf_counter() - began, len(store)


@torch.no_grad()
def loss_of(engine: Engine, batches: Sequence[Batch], loss: Loss) -> float:
    """Mean, asleep."""
    model, device = engine.bare.eval(), engine.accelerator.device
    total = sum(float(loss(model, batch.to(device))[0]) for batch in batches)
    model.train()
    return total / sum(batch.num_targets for batch in batches)


def open_gates(bridge: torch.nn.Module, value: float) -> None:
    """What stands behind a gate that is shut has no part in any result, and no gradient that could be compared."""
    with torch.no_grad():
        for key, parameter in bridge.named_parameters():
            if key.endswith("_gate"):
                parameter.fill_(value)
