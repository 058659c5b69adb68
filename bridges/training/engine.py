"""One device, or several that share every step: what the loop asks of them. DeepSpeed's side of it is in zero.py."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, gather_object
from torch import Tensor, nn

from bridges.checkpoint import plain
from bridges.config import Recipe

Moments = dict[str, dict[str, Tensor]]
"""Of every parameter that trains, by its name: AdamW's `step`, `exp_avg`, `exp_avg_sq`, whole and in fp32."""
KEPT = ("exp_avg", "exp_avg_sq")


class Engine:
    """Every process has the whole model; several average the gradients of what trains (DDP).

    `model` is what a step calls: the bare one, wrapped.
    """

    def __init__(self, accelerator: Accelerator, bare: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.accelerator, self.bare = accelerator, bare
        self.model: Any
        self.optimizer: Any
        self.model, self.optimizer = accelerator.prepare(bare, optimizer)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.bare.named_parameters() if p.requires_grad}

    def sharing(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward: processes exchange gradients only after the `last` micro-batch of a step."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # Accelerate's own would divide by what its launcher says of accumulation

    def update(self, clip: float) -> float:
        """Clip and step. Returns the norm of the gradient before; where it is not finite nothing is changed."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained().values(), clip))
        if norm < float("inf"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return norm

    def whole(self) -> AbstractContextManager[Any]:
        """Within it every process can read all that trains. All of them have to enter it."""
        return nullcontext()

    def moments(self, step: int) -> Moments:  # noqa: ARG002
        """The optimizer's state after `step` steps, the same whatever the engine. All processes have to ask."""
        state = self.optimizer.state
        return {
            name: {key: state[p][key].detach().cpu() for key in ("step", *KEPT)}
            for name, p in self.trained().items()
            if p in state
        }

    def set_moments(self, found: Moments) -> None:
        """Go on with what `moments` gave, under this engine or another, on any number of processes."""
        for name, parameter in self.trained().items():
            if name in found:
                kept = {key: found[name][key].clone().to(parameter.device) for key in KEPT}
                self.optimizer.state[parameter] = {"step": found[name]["step"].clone(), **kept}


def open_accelerator(recipe: Recipe) -> Accelerator:
    """Who takes part: this process alone, or those that torchrun or `accelerate launch` started.

    Raises ValueError where the launcher asks for what is not done here, or the processes do not agree on the recipe.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError("accelerate is set up for FSDP, which this does not do; use --engine zero3, or plain DDP")
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise ValueError(
            f"accelerate is set up for mixed precision {precision}; set it to no: a bridge trains in fp32, and the "
            "frozen towers take what the machine runs fastest by themselves"
        )
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"  # `chosen_engine` has read it; DeepSpeed is asked directly
    for name in recipe.train.track:
        if find_spec(name) is None:
            raise ValueError(f"train.track: {name} is not installed: pip install {name}, or leave it out")
    PartialState(cpu=torch.accelerator.current_accelerator(check_available=True) is None)
    # not every head of a pair model has a part in every loss
    unused = DistributedDataParallelKwargs(find_unused_parameters=bool(recipe.objectives))
    project = ProjectConfiguration(recipe.output, logging_dir=recipe.output)
    trackers: Any = list(recipe.train.track) or None
    accelerator = Accelerator(kwargs_handlers=[unused], project_config=project, log_with=trackers)
    refuse_disagreement(recipe, accelerator.process_index)
    return accelerator


def refuse_disagreement(recipe: Recipe, rank: int) -> None:
    """ValueError where processes were started with different recipes: the first key in which one differs."""
    every = gather_object([flat(plain(asdict(recipe)))])
    for other, its in enumerate(every):
        for key in sorted({*its, *every[0]}):
            if its.get(key) != every[0].get(key):
                raise ValueError(
                    f"process {other} was started with {key} {its.get(key)!r}, process 0 with {every[0].get(key)!r}; "
                    f"start all with the same recipe (told by process {rank})"
                )


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    inner = [flat(v, f"{prefix}.{key}" if prefix else str(key)) for key, v in value.items()]
    return {key: v for part in inner for key, v in part.items()}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Dropout is a function of the step and the process, as the order of the data is: there is no state to keep."""
    torch.manual_seed(((seed % 2**20) * 2**22 + step) * 2**16 + rank)
