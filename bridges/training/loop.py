"""The training loop, top to bottom: towers, bridge, data, steps; each periodic job is one `if`."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from bridges.checkpoint import CONFIG, save_checkpoint
from bridges.config import Recipe, Train, read_recipe
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split
from bridges.files import prepare_output
from bridges.interrupt import interruptible
from bridges.training.display import Display
from bridges.training.stage import Figures, Loss, Stage, open_stage, refuse_equal_captions
from bridges.training.state import restore, save_state, steps_done


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Train the recipe's bridge and leave a checkpoint in its output folder, which is returned.

    Writes `metrics.jsonl` as it goes. Ctrl-C saves first. Raises ValueError for anything the user can mend.
    """
    recipe = after_its_start(recipe, resume)
    settings, output = recipe.train, Path(recipe.output)
    if not resume and (output / CONFIG).exists():
        raise ValueError(f"{output} already holds a checkpoint; go on with --resume, or name another --output")
    prepare_output(output, needed=0)
    # not every head of a pair model has a part in every loss
    accelerator = Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=bool(recipe.objectives))]
    )
    stage = open_stage(recipe)
    model: Any = stage.built.model.to(accelerator.device).train()
    prepare_output(output, needed=20 * sum(p.numel() for p in model.bridge.parameters()))
    data = SkipBroken(open_split(recipe.data, "train"))
    refuse_equal_captions(stage, data)
    held = validation_batch(stage, min(settings.evaluate_size, settings.batch * 4))
    optimizer = torch.optim.AdamW(parameter_groups(model.bridge, settings), lr=settings.lr, betas=settings.betas)
    first = restore(output, stage.built, optimizer) if resume else 0
    wrapped: Any
    wrapped, optimizer = accelerator.prepare(model, optimizer)

    with Display(stage.built, first, accelerator.is_main_process) as display, interruptible() as stop:
        step = first
        for step, batches in enumerate(prefetched(stage, data, accelerator, first), start=first + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            figures = train_step(accelerator, wrapped, batches, optimizer, settings.clip, stage.loss)
            display.advance(step, figures, optimizer.param_groups[0]["lr"])
            if step % settings.log_every == 0 or step == settings.steps:
                display.log(step)
            if step % settings.evaluate_every == 0 or step == settings.steps:
                display.validation(step, held_out(stage, held, accelerator.device))
            due = step % settings.save_every == 0 or step == settings.steps or stop.asked
            if due and accelerator.is_main_process:
                save_checkpoint(output, stage.built)
                save_state(output, stage.built, optimizer, step)
            if stop.asked:
                break
    if accelerator.is_main_process and data.broken:
        print(data.summary())
    if stop.asked:
        raise KeyboardInterrupt(
            f"stopped after step {step} of {settings.steps} and saved in {output}; add --resume to go on"
        )
    return output


def after_its_start(recipe: Recipe, resume: bool) -> Recipe:
    """Where a recipe starts from another recipe: run that one, or what is left of it, and start from its output."""
    if recipe.start is None or not recipe.start.endswith(".yaml"):
        return recipe
    first = read_recipe(recipe.start)
    if steps_done(Path(first.output)) < first.train.steps:
        print(f"first {recipe.start}, which leaves {first.output}")
        train(first, resume)
    return replace(recipe, start=first.output)


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    batches: Sequence[Any],
    optimizer: torch.optim.Optimizer,
    clip: float,
    objective: Loss,
) -> dict[str, float]:
    """One update from several micro-batches: their summed loss over the number of all targets, on all processes.

    Returns the mean `loss` (nats a target), the number of `targets`, and the parts of the loss, if it has any.
    Raises ValueError at a NaN or infinity, before it does harm.
    """
    device = accelerator.device
    targets = int(summed(accelerator, torch.tensor(sum(b.num_targets for b in batches), device=device)))
    total, parts = torch.zeros((), device=device), {}
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss, parts = objective(model, batch.to(device))
            # processes average their gradients; the sum over all is wanted
            accelerator.backward(loss * (accelerator.num_processes / targets))
        total += loss.detach()
    norm = accelerator.clip_grad_norm_(model.parameters(), clip)
    mean = float(summed(accelerator, total)) / targets
    if not math.isfinite(mean) or (norm is not None and not math.isfinite(float(norm))):
        where = first_broken(accelerator.unwrap_model(model), batches[-1].to(device), objective)
        raise ValueError(f"loss {mean}, gradient norm {norm}: {where}")
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": mean, "targets": targets, **parts}


def first_broken(model: Any, batch: Any, objective: Loss) -> str:
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
        objective(model, batch)
    for hook in hooks:
        hook.remove()
    if broken:
        return f"the first module with such an output is {broken[0]}; lower train.lr or look at this batch's pictures"
    gradients = [n for n, p in model.bridge.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of bridge.{gradients[0] if gradients else '?'} is not finite; lower train.lr"


def validation_batch(stage: Stage, size: int) -> Any:
    """The first held-out examples, as one batch."""
    data = SkipBroken(open_split(stage.built.recipe.data, "val"))
    return stage.batch([data[i] for i in range(min(size, len(data)))])


def held_out(stage: Stage, batch: Any, device: torch.device) -> Figures:
    """Measured asleep: no dropout."""
    stage.built.model.eval()
    figures = stage.held_out(batch.to(device))
    stage.built.model.train()
    return figures


def prefetched(stage: Stage, data: Any, accelerator: Accelerator, first: int) -> Iterator[list[Any]]:
    """The micro-batches of every step from `first` on, prepared by threads while the step before computes."""
    settings = stage.built.recipe.train
    share = settings.batch // accelerator.num_processes
    if share * accelerator.num_processes != settings.batch:
        raise ValueError(f"train.batch {settings.batch} does not divide by {accelerator.num_processes} processes")
    size = settings.micro_batch or share

    def prepare(step: int) -> list[Any]:
        places = order(step, settings.batch, len(data), settings.seed)[accelerator.process_index * share :][:share]
        return [stage.batch([data[i] for i in places[at : at + size]]) for at in range(0, share, size)]

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
    trained = [p for p in bridge.parameters() if p.requires_grad]
    matrices, others = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    return [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
