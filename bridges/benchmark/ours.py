"""This toolkit as a contestant: its own stage, engine and step; and without one technique, to see what that gives."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from bridges import model as splice
from bridges.benchmark.contest import FIRST, Clock, Task, examples, held_out, ready
from bridges.build import Assembled
from bridges.data.batch import Batch, collate, rows_of
from bridges.data.conversation import Example
from bridges.data.template import IGNORE_INDEX
from bridges.layout import PADDING, predecessors
from bridges.store import Store
from bridges.training.ahead import fill
from bridges.training.engine import open_accelerator
from bridges.training.feed import Share
from bridges.training.loop import adam, backward, train_step
from bridges.training.stage import Loss, Stage, language_stage, make_batch
from bridges.training.zero import open_engine


def without_prefix(stage: Stage) -> None:
    whole: Any = stage.built.model
    whole.keeps_prefix = False


def without_sharing(stage: Stage) -> None:
    assert isinstance(stage.built, Assembled)
    model, template, recipe = stage.built

    def apart(examples: Sequence[Example]) -> Batch:
        rows = [row for e in examples for row in rows_of(e, template, recipe.data.max_length, share=False)]
        return collate(rows, model.vision.preprocess)

    stage.batch = apart


def without_lines(stage: Stage) -> None:  # noqa: ARG001  the others change the stage
    splice.LONGEST_LINE = 0


def with_all_logits(stage: Stage) -> None:
    stage.loss = loss_of_all_logits


def with_whole_graph(stage: Stage) -> None:
    built: Any = stage.built
    built.model.language.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())


def with_cache(stage: Stage) -> None:
    """In a folder of its own, so that nothing is there yet."""
    assert isinstance(stage.built, Assembled)
    model, _, recipe = stage.built
    folder = Path(recipe.output) / "features"
    stage.store = Store(model.vision, model.bridge, "fp32", recipe.vision.cache_gb * 1e9, folder)
    stage.batch = partial(make_batch, stage.built, store=stage.store)


OURS: dict[str, tuple[str, Callable[[Stage], None]]] = {
    "ours": ("", lambda stage: None),  # noqa: ARG005
    "cache": ("ours, features from disk", with_cache),
    "no-prefix": ("ours, constant prefix computed in every row", without_prefix),
    "no-sharing": ("ours, a row and a picture for each text", without_sharing),
    "no-lines": ("ours, rows side by side, padded", without_lines),
    "all-logits": ("ours, logits at every token", with_all_logits),
    "whole-graph": ("ours, gradients down to the words", with_whole_graph),
}
"""What it is, and what is done to the stage."""


def loss_of_all_logits(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The same loss, with the head, and all layers, over every token."""
    at = (batch.segments != PADDING).nonzero(as_tuple=True)
    rows, columns = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    images = (batch.pixel_values, batch.features, batch.asked, batch.looks)
    logits = model(batch.input_ids, batch.segments, batch.positions, at, *images)
    place = torch.zeros_like(batch.input_ids)
    place[at] = torch.arange(len(at[0]), device=place.device)
    said = logits[place[rows, predecessors(batch.segments)[rows, columns]]]
    said = said.to(torch.promote_types(said.dtype, torch.float32))
    return F.cross_entropy(said, batch.labels[rows, columns], reduction="sum"), {}


def run(pipe: Connection, task: Task, name: str) -> None:
    """Take part; `ours` also leaves the bridge's first weights for all others."""
    recipe, settings = task.recipe, task.recipe.train
    stage = language_stage(recipe)
    OURS[name][1](stage)
    model: Any = stage.built.model.train()
    open_gates(model.bridge)
    if name == "ours":
        save_file(model.bridge.state_dict(), task.folder / FIRST)
    accelerator = open_accelerator(recipe)
    engine = open_engine(accelerator, model, adam(model, recipe), None)
    steps = examples(task)
    ahead = encoded(stage.store, steps) if name == "cache" and stage.store is not None else (0.0, 0)
    held = [stage.batch(some) for some in held_out(task)]

    def prepared(step: int) -> list[Share]:
        return [Share(recipe.data.source, 1.0, [stage.batch(steps[step])])]

    first = prepared(0)[0]
    loss, targets, _ = backward(engine, first, stage.loss, last=True)
    gradient = {key: p.grad for key, p in engine.trained().items() if p.grad is not None}
    named = {key.removeprefix("bridge."): g for key, g in gradient.items()}
    pipe.send(ready(task, name, loss / targets, (targets, first.batches[0].input_ids.numel()), named, ahead))
    engine.optimizer.zero_grad()

    with ThreadPoolExecutor(1) as pool:
        step, coming = 0, pool.submit(prepared, 0)
        while count := pipe.recv():
            clock = Clock()
            for _ in range(count):
                shares, step = coming.result(), step + 1
                coming = pool.submit(prepared, step % task.steps)
                figures = train_step(engine, shares, settings.clip, stage.loss)
                clock.tick(figures["loss"], int(figures["targets"]))
            wait([coming])  # as many batches are prepared in a lap as are used in it
            lap = clock.lap()
            pipe.send(replace(lap, held_out=loss_of(model, held, stage.loss)) if held else lap)


def encoded(store: Store, steps: Sequence[Sequence[Example]]) -> tuple[float, int]:
    """Keep all pictures of some steps; the seconds that it takes, and how many they are."""
    every = list({id(example): example for step in steps for example in step}.values())
    began = perf_counter()
    fill(store, [(every, len(every))], 0, 1, Console(quiet=True))
    return perf_counter() - began, len(store)


@torch.no_grad()
def loss_of(model: Any, batches: Sequence[Batch], loss: Loss) -> float:
    """Mean, asleep."""
    model.eval()
    total = sum(float(loss(model, batch)[0]) for batch in batches)
    model.train()
    return total / sum(batch.num_targets for batch in batches)


def open_gates(bridge: torch.nn.Module) -> None:
    """A block whose gate is shut gives its weights no gradient that could be compared."""
    with torch.no_grad():
        for key, parameter in bridge.named_parameters():
            if key.endswith("_gate"):
                parameter.fill_(0.5)
