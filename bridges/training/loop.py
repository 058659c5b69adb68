"""The training loop, top to bottom: towers, bridge, data, steps; each periodic job is one `if`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch import Tensor, nn

from bridges.build import loras, trained
from bridges.config import Recipe, Train
from bridges.data.pictures import SkipBroken
from bridges.data.sources import open_split, told
from bridges.files import prepare_output
from bridges.interrupt import Stop, interruptible
from bridges.recipe import read_recipe
from bridges.saved import CONFIG
from bridges.training.display import Display
from bridges.training.engine import Engine, open_accelerator, seed_step
from bridges.training.feed import Share, Source, open_sources, prefetched, sizes_of, tell_broken
from bridges.training.regression import start_at_words
from bridges.training.stage import Figures, Loss, Stage, open_stage, refuse_equal_captions
from bridges.training.state import restore, save_best, save_run, steps_done
from bridges.training.zero import chosen_engine, open_engine, zero_settings


def train(recipe: Recipe, resume: bool = False, engine: str | None = None) -> Path:
    """Train the recipe's bridge and leave a checkpoint in its output folder, which is returned.

    Writes `metrics.jsonl` as it goes. Ctrl-C saves first. `engine` is `ddp`, `zero1`, `zero2`, `zero3` or a file of
    DeepSpeed settings. Raises ValueError for anything the user can mend.
    """
    engine = chosen_engine(engine)
    recipe = after_its_start(recipe, resume, engine)
    settings, output = recipe.train, Path(recipe.output)
    accelerator = open_accelerator(recipe)
    zero = zero_settings(engine, recipe, accelerator.num_processes)
    if not resume and (output / CONFIG).exists():
        raise ValueError(f"{output} already holds a checkpoint; go on with --resume, or name another --output")
    prepare_output(output, needed=0)
    stage = open_stage(recipe)
    model: Any = stage.built.model.to(accelerator.device).train()
    prepare_output(output, needed=20 * sum(p.numel() for p in trained(stage.built)))
    sources = open_sources(recipe)
    if accelerator.is_main_process:
        print(*(told(source.name, source.data.rows) for source in sources), sep="\n")
        if stage.store:
            print(stage.store.summary())
    refuse_equal_captions(stage, sources[0].data)
    held = validation_batch(stage, min(settings.evaluate_size, settings.batch * 4))
    first, moments = restore(stage.built, sizes_of(sources)) if resume else (0, {})
    if not first:
        start_at_words(stage, sources[0].data, Console(quiet=not accelerator.is_main_process))
    accelerator.wait_for_everyone()

    with Display(stage.built, first, accelerator) as display, interruptible() as stop:
        run = open_engine(accelerator, model, adam(model, recipe), zero)
        if moments:
            run.set_moments(moments)
        step, stopped = take_steps(run, stage, sources, held, display, stop)
    if accelerator.is_main_process:
        tell_broken(sources)
    if stopped:
        raise KeyboardInterrupt(
            f"stopped after step {step} of {settings.steps} and saved in {output}; add --resume to go on"
        )
    return output


def take_steps(
    run: Engine, stage: Stage, sources: Sequence[Source], held: Any, display: Display, stop: Stop
) -> tuple[int, bool]:
    """The steps after those that `display` knows of, to the end or to Ctrl-C. Returns the last; was it Ctrl-C?

    `held` is the batch of held-out examples that is looked at now and then.
    """
    settings, accelerator = stage.built.recipe.train, run.accelerator
    step, asked = display.first, False
    feed = prefetched(stage, sources, display.first, accelerator.process_index, accelerator.num_processes)
    for step, shares in enumerate(feed, start=display.first + 1):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, replace(settings, lr=group["peak"]))
        seed_step(settings.seed, step, accelerator.process_index)
        figures = train_step(run, shares, settings.clip, stage.loss)
        display.advance(step, figures, run.optimizer.param_groups[0]["lr"])
        asked = bool(summed(accelerator, torch.tensor(int(stop.asked), device=accelerator.device)))
        if step % settings.log_every == 0 or step == settings.steps:
            display.log(step)
        if step % settings.evaluate_every == 0 or step == settings.steps:
            held_out, watched = measured(stage, run, held)
            display.validation(step, held_out)
            display.bridge(step, watched)
            save_best(run, stage.built)
        if step % settings.save_every == 0 or step == settings.steps or asked:
            save_run(run, stage.built, sizes_of(sources), step)
            if stage.store:
                stage.store.flush()
        if asked:
            break
    return step, asked


def after_its_start(recipe: Recipe, resume: bool, engine: str) -> Recipe:
    """Where a recipe starts from another recipe: run that one, or what is left of it, and start from its output."""
    if recipe.start is None or not recipe.start.endswith(".yaml"):
        return recipe
    first = read_recipe(recipe.start)
    if steps_done(Path(first.output)) < first.train.steps:
        print(f"first {recipe.start}, which leaves {first.output}")
        train(first, resume, engine)
    return replace(recipe, start=first.output)


def train_step(run: Engine, shares: Sequence[Share], clip: float, objective: Loss) -> dict[str, float]:
    """One update. Of each source: the summed loss of its micro-batches over the number of all its targets, on all
    processes, times its weight; these are added up (Flamingo, arXiv 2204.14198, equation 2).

    Returns the weighted mean `loss` (nats a target), the number of `targets`, the parts of the loss, if it has any,
    and the `loss/<source>` of each, if there are several. Raises ValueError at a NaN or infinity, before it does harm.
    """
    parts, losses, targets = {}, [], 0
    for index, share in enumerate(shares):
        total, count, more = backward(run, share, objective, last=index == len(shares) - 1)
        losses, targets, parts = [*losses, total / count], targets + count, {**parts, **more}
    weights = [share.weight for share in shares]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    norm = run.update(clip) if math.isfinite(mean) else math.nan
    if not math.isfinite(norm):
        where = first_broken(run.bare, shares[-1].batches[-1].to(run.accelerator.device), objective)
        raise ValueError(f"loss {mean}, gradient norm {norm}: {where}")
    if len(shares) > 1:
        parts |= {f"loss/{share.name}": loss for share, loss in zip(shares, losses, strict=True)}
    return {"loss": mean, "targets": targets, **parts}


def backward(run: Engine, share: Share, objective: Loss, last: bool) -> tuple[float, int, dict[str, float]]:
    """Add the gradients of one source. Returns its summed loss and its targets, over all processes, and parts of it.

    Processes average their gradients, once, after the `last` source's last micro-batch; the sum over all is wanted.
    """
    accelerator, parts = run.accelerator, {}
    device = accelerator.device
    targets = int(summed(accelerator, torch.tensor(sum(b.num_targets for b in share.batches), device=device)))
    scale = share.weight * accelerator.num_processes / targets
    total = torch.zeros((), device=device)
    for index, batch in enumerate(share.batches):
        with run.sharing(last and index == len(share.batches) - 1):
            loss, parts = objective(run.model, batch.to(device))
            run.backward(loss * scale)
        total += loss.detach()
    return float(summed(accelerator, total)), targets, parts


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
    gradients = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {gradients[0] if gradients else '?'} is not finite; lower train.lr"


def validation_batch(stage: Stage, size: int) -> Any:
    """The first held-out examples, as one batch."""
    data = SkipBroken(open_split(stage.built.recipe.data, "val"))
    return stage.batch([data[i] for i in range(min(size, len(data)))])


def measured(stage: Stage, run: Engine, batch: Any) -> tuple[Figures, Figures]:
    """The held-out figures, measured asleep (no dropout), and what the bridge says of itself."""
    stage.built.model.eval()
    with run.whole():
        figures = stage.held_out(batch.to(run.accelerator.device)), stage.built.model.bridge.watched()
    stage.built.model.train()
    return figures


def summed(accelerator: Accelerator, value: Tensor) -> Tensor:
    """Over all processes."""
    total = accelerator.reduce(value)
    assert isinstance(total, Tensor)
    return total


def learning_rate(step: int, settings: Train) -> float:
    """Linear warm-up, then a cosine down to `min_lr` (not up to it) at the last step; `step` counts from 1."""
    if step <= settings.warmup:
        return settings.lr * step / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    least = min(settings.min_lr, settings.lr)
    return least + (settings.lr - least) * 0.5 * (1 + math.cos(math.pi * done))


def adam(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW on the bridge, and on each adapter at a rate of its own. Every group holds the `peak` of its rate."""
    settings = recipe.train
    groups = parameter_groups(model.bridge, settings)
    for kind, lora in loras(recipe).items():
        own = replace(settings, lr=lora.lr or settings.lr)
        groups += parameter_groups(nn.ModuleList(getattr(model, kind).adapters), own)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, fused=True)


def parameter_groups(part: nn.Module, settings: Train) -> list[dict[str, Any]]:
    """What trains of the bridge, or of an adapter. Weight decay on matrices only: biases, norms and gates are left
    alone."""
    own = [p for p in part.parameters() if p.requires_grad]
    kinds = [([p for p in own if p.ndim > 1], settings.weight_decay), ([p for p in own if p.ndim <= 1], 0.0)]
    return [{"params": some, "weight_decay": decay, "peak": settings.lr} for some, decay in kinds if some]
