"""The training loop, top to bottom: towers, bridge, data, steps; each periodic job is one `if`."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from bridges.checkpoint import CONFIG, Assembled, build, prepare_output, save_checkpoint
from bridges.config import Recipe, Train
from bridges.data.batch import Batch, collate, rows_of
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.interrupt import interruptible
from bridges.model import BridgedModel
from bridges.objectives.controls import CONTROLS, controlled
from bridges.objectives.language import language_loss
from bridges.training.display import Display
from bridges.training.state import restore, save_state


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train the recipe's bridge and leave a checkpoint in its output folder, which is returned.

    Writes `metrics.jsonl` as it goes. Ctrl-C saves first. Raises ValueError for anything the user can mend.
    """
    settings, output = recipe.train, Path(recipe.output)
    if not resume and (output / CONFIG).exists():
        raise ValueError(f"{output} already holds a checkpoint; go on with --resume, or name another --output")
    prepare_output(output, needed=0)
    accelerator = Accelerator()
    assembled = build(recipe)
    model = assembled.model.to(accelerator.device)
    prepare_output(output, needed=20 * sum(p.numel() for p in model.bridge.parameters()))
    data = SkipBroken(open_split(recipe.data, "train"))
    held_out = validation_batch(assembled, min(settings.evaluate_size, settings.batch * 4))
    optimizer = torch.optim.AdamW(parameter_groups(model.bridge, settings), lr=settings.lr, betas=settings.betas)
    first = restore(output, assembled, optimizer) if resume else 0
    wrapped: Any
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    with Display(recipe, model, first, accelerator.is_main_process) as display, interruptible() as stop:
        step = first
        for step, batches in enumerate(prefetched(assembled, data, accelerator, first), start=first + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            loss, targets = train_step(accelerator, wrapped, batches, optimizer, settings.clip)
            display.advance(step, loss, targets, optimizer.param_groups[0]["lr"])
            if step % settings.log_every == 0 or step == settings.steps:
                display.log(step)
            if step % settings.evaluate_every == 0 or step == settings.steps:
                display.validation(step, held_out_nll(model, held_out.to(accelerator.device)))
            due = step % settings.save_every == 0 or step == settings.steps or stop.asked
            if due and accelerator.is_main_process:
                save_checkpoint(output, assembled)
                save_state(output, assembled, optimizer, step)
            if stop.asked:
                break
    if accelerator.is_main_process and data.broken:
        print(data.summary())
    if stop.asked:
        raise KeyboardInterrupt(
            f"stopped after step {step} of {settings.steps} and saved in {output}; add --resume to go on"
        )
    return output


def train_step(
    accelerator: Accelerator,
    model: BridgedModel,
    batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    clip: float,
) -> tuple[float, int]:
    """One update from several micro-batches: their summed loss over the number of all targets, on all processes.

    Returns the mean loss (nats a target) and that number. Raises ValueError at a NaN or infinity, before it does harm.
    """
    device = accelerator.device
    targets = int(summed(accelerator, torch.tensor(sum(b.num_targets for b in batches), device=device)))
    total = torch.zeros((), device=device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss, _ = language_loss(model, batch.to(device))
            # processes average their gradients; the sum over all is wanted
            accelerator.backward(loss * (accelerator.num_processes / targets))
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    mean = float(summed(accelerator, total)) / targets
    if not math.isfinite(mean) or (norm is not None and not math.isfinite(float(norm))):
        where = first_broken(accelerator.unwrap_model(model), batches[-1].to(device))
        raise ValueError(f"loss {mean}, gradient norm {norm}: {where}")
    optimizer.step()
    optimizer.zero_grad()
    return mean, targets


def first_broken(model: BridgedModel, batch: Batch) -> str:
    """Where NaN or infinity comes from: the first module, in the order of computation, that puts one out."""
    broken: list[str] = []

    def look(name: str, output: Any) -> None:
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, torch.Tensor)]
        if any(t.is_floating_point() and not t.isfinite().all() for t in tensors):
            broken.append(name)

    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite"
    hooks = [m.register_forward_hook(lambda _m, _i, out, n=n: look(n, out)) for n, m in model.named_modules() if n]
    with torch.no_grad():
        language_loss(model, batch)
    for hook in hooks:
        hook.remove()
    if broken:
        return f"the first module with such an output is {broken[0]}; lower train.lr or look at this batch's pictures"
    gradients = [n for n, p in model.bridge.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of bridge.{gradients[0] if gradients else '?'} is not finite; lower train.lr"


def held_out_nll(model: BridgedModel, batch: Batch) -> dict[str, float]:
    """Held-out loss (nats a target) with the right pictures, each other's, and grey ones."""
    assert batch.pixel_values is not None
    with torch.no_grad():
        features = model.vision(batch.pixel_values)
        result = {}
        for control in CONTROLS:
            seen = Batch(
                **{**vars(batch), "pixel_values": None, "features": controlled(features, model.vision, control)}
            )
            loss, targets = language_loss(model, seen)
            result[control] = float(loss) / targets
    return result


def validation_batch(assembled: Assembled, size: int) -> Batch:
    """The first held-out examples, as one batch."""
    data = SkipBroken(open_split(assembled.recipe.data, "val"))
    return make_batch(assembled, [data[i] for i in range(min(size, len(data)))])


def make_batch(assembled: Assembled, examples: Sequence[Any]) -> Batch:
    """Examples to tensors. ValueError where no token of them is a target."""
    model, template, recipe = assembled
    share = model.language.shares(recipe.data.max_length)
    rows = [r for e in examples for r in rows_of(e, template, recipe.data.max_length, share)]
    batch = collate(rows, model.vision.preprocess)
    if not batch.num_targets:
        raise ValueError(
            "not one token of the first texts is a target: the assistant says nothing, or data.max_length cuts it off; "
            "look at them with `bridges inspect RECIPE`"
        )
    return batch


def prefetched(assembled: Assembled, data: Any, accelerator: Accelerator, first: int) -> Iterator[list[Batch]]:
    """The micro-batches of every step from `first` on, prepared by threads while the step before computes."""
    settings = assembled.recipe.train
    share = settings.batch // accelerator.num_processes
    if share * accelerator.num_processes != settings.batch:
        raise ValueError(f"train.batch {settings.batch} does not divide by {accelerator.num_processes} processes")
    size = settings.micro_batch or share

    def prepare(step: int) -> list[Batch]:
        places = order(step, settings.batch, len(data), settings.seed)[accelerator.process_index * share :][:share]
        return [make_batch(assembled, [data[i] for i in places[at : at + size]]) for at in range(0, share, size)]

    with ThreadPoolExecutor(settings.workers) as pool:
        waiting: list[Future[list[Batch]]] = []
        for step in range(first, settings.steps):
            while len(waiting) <= settings.workers and step + len(waiting) < settings.steps:
                waiting.append(pool.submit(prepare, step + len(waiting)))
            yield waiting.pop(0).result()


def summed(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Over all processes."""
    total = accelerator.reduce(value)
    assert isinstance(total, Tensor)
    return total


def order(step: int, batch: int, size: int, seed: int) -> list[int]:
    """Which examples a step sees: epoch after epoch, each in its own order. A pure function: resuming is exact."""
    places = range(step * batch, (step + 1) * batch)
    shuffled = {e: np.random.default_rng([seed, e]).permutation(size) for e in {p // size for p in places}}
    return [int(shuffled[p // size][p % size]) for p in places]


def learning_rate(step: int, settings: Train) -> float:
    """Linear warm-up, then a cosine down to `min_lr` at the last step; `step` counts from 1."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(bridge: nn.Module, settings: Train) -> list[dict[str, Any]]:
    """Weight decay on matrices only: biases, norms and gates are left alone."""
    matrices = [p for p in bridge.parameters() if p.ndim > 1]
    others = [p for p in bridge.parameters() if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
