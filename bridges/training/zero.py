"""DeepSpeed's ZeRO: the devices share the optimizer (1), the gradients (2), all weights, frozen ones too (3)."""

import json
import os
import socket
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from bridges.config import Recipe
from bridges.training.engine import KEPT, Engine, Moments

SETTINGS = Path(__file__).parents[2] / "recipes" / "deepspeed"
Settings = dict[str, Any]


class Zero(Engine):
    """All that `Engine` does, by DeepSpeed."""

    def __init__(
        self, accelerator: Accelerator, bare: Any, optimizer: torch.optim.Optimizer, settings: Settings
    ) -> None:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # compiles for minutes; processes on a CPU have gloo
        )
        self.accelerator, self.bare = accelerator, bare
        self.stage: int = settings["zero_optimization"]["stage"]
        if self.stage == 3:
            # A process whose texts have no picture, or whose prefix is kept already, would not run these, and the
            # others would wait for it for ever: the encoder is fetched whole, pictures or not, unless its adapter has
            # it look at something every time; no prefix is kept.
            deepspeed.utils.set_z3_leaf_module(bare.vision, not bare.vision.adapters)
            bare.keeps_prefix = False
        self.model, self.optimizer, _, _ = deepspeed.initialize(model=bare, optimizer=optimizer, config=settings)
        self.optimizer: Any

    def sharing(self, last: bool) -> AbstractContextManager[None]:
        self.model.set_gradient_accumulation_boundary(last)
        return super().sharing(True)

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    def update(self, clip: float) -> float:  # noqa: ARG002
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def whole(self) -> AbstractContextManager[Any]:
        import deepspeed

        if self.stage < 3:
            return super().whole()
        return deepspeed.zero.GatheredParameters(list({*self.bare.bridge.parameters(), *self.trained().values()}))

    def moments(self, step: int) -> Moments:
        steps = torch.tensor(float(step))
        names = self.trained().items()
        return {name: {"step": steps, **{key: self._joined(p, key).cpu() for key in KEPT}} for name, p in names}

    def set_moments(self, found: Moments) -> None:
        step = next(iter(found.values()))["step"]
        for flat in self._flat():  # DeepSpeed makes them at the first step only
            kept = {key: torch.zeros_like(flat) for key in KEPT}
            self.optimizer.optimizer.state[flat] = {"step": step.clone(), **kept}
        for name, parameter in self.trained().items():
            for key in KEPT if name in found else ():
                own, place = self._own(parameter, key)
                value = found[name][key].to(own.device).flatten()
                value = F.pad(value, (0, place.stop - value.numel())) if place.stop > value.numel() else value
                own.copy_(value[place])

    def _flat(self) -> list[Tensor]:
        """What this process keeps of all that trains, in one row for each group."""
        zero = self.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _own(self, parameter: Any, key: str) -> tuple[Tensor, slice]:
        """What this process keeps of a parameter's state, to read and to write, and where that stands in the whole.

        DeepSpeed's `safe_get_full_optimizer_state` knows that of the first group of parameters alone.
        """
        state = self.optimizer.optimizer.state
        if self.stage == 3:
            group, start, size = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
            first = size * self.accelerator.process_index
        elif (here := parameter._hp_mapping) is None:
            return torch.zeros(0, device=parameter.device), slice(0, 0)
        else:
            group, address = here.param_group_index, here.hp_fragment_address
            start, size, first = address.start, address.numel, here.lp_fragment_address.start
        return state[self._flat()[group]][key].narrow(0, start, size), slice(first, first + size)

    def _joined(self, parameter: Any, key: str) -> Tensor:
        """The whole of a parameter's state, from all processes."""
        shape = parameter.ds_shape if self.stage == 3 else parameter.shape
        own, place = self._own(parameter, key)
        longest = max(shape.numel(), own.numel() * self.accelerator.num_processes if self.stage == 3 else 0)
        whole = torch.zeros(longest, device=own.device)
        whole[place] = own
        dist.all_reduce(whole)
        return whole[: shape.numel()].view(shape)


def chosen_engine(engine: str | None) -> str:
    """The engine of the command line; without one what `accelerate launch` was told; else `ddp`.

    Raises ValueError where there is none of that name, or DeepSpeed is not installed.
    """
    if engine is None and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        engine = file if file != "none" else f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if torch.accelerator.current_accelerator(check_available=True) is None:
        os.environ["DS_ACCELERATOR"] = "cpu"  # where it is installed it is asked for its opinion, used or not
    if engine in (None, "ddp"):
        return "ddp"
    names = ["ddp", *sorted(path.stem for path in SETTINGS.glob("*.json"))]
    if engine not in names and not engine.endswith(".json"):
        raise ValueError(
            f"no engine {engine!r}: there are {', '.join(names)}, or your own DeepSpeed settings (a .json)"
        )
    if find_spec("deepspeed") is None:
        raise ValueError(
            f"--engine {engine} needs DeepSpeed, which is not installed: pip install 'mm-bridges[deepspeed]'"
        )
    if "RANK" not in os.environ:  # started without a launcher: DeepSpeed wants a group, if of one
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": free.getsockname()[1]}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in alone.items()}})
    return engine


def zero_settings(engine: str, recipe: Recipe, processes: int) -> Settings | None:
    """DeepSpeed's settings for an engine; None for `ddp`.

    Raises ValueError where there are none, or they contradict the recipe, which decides (`auto` always agrees).
    """
    if engine == "ddp":
        return None
    path = Path(engine) if engine.endswith(".json") else SETTINGS / f"{engine}.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no DeepSpeed settings {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no JSON: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict) or given.get("zero_optimization", {}).get("stage") not in (1, 2, 3):
        raise ValueError(f"{path}: zero_optimization.stage should say 1, 2 or 3")
    refuse_contradiction(path, given, recipe, processes)
    if given["zero_optimization"]["stage"] == 3 and recipe.objectives:
        raise ValueError(
            f"{path}: zero_optimization.stage 3 shares out a language model, and objectives need none; take 2"
        )
    kept = {key: value for key, value in without_auto(given).items() if key not in ("optimizer", "fp16", "bf16")}
    own = {"train_batch_size": processes, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    quiet = {"steps_per_print": 10**9, "zero_allow_untested_optimizer": True}
    return {**kept, **own, **quiet, "gradient_clipping": recipe.train.clip}


def refuse_contradiction(path: Path, given: Settings, recipe: Recipe, processes: int) -> None:
    """ValueError at the first key that says otherwise than the recipe."""
    train = recipe.train
    micro = train.micro_batch or max(1, train.batch // processes)
    adam = {"lr": train.lr, "betas": list(train.betas), "weight_decay": train.weight_decay, "eps": 1e-8}
    wanted: dict[str, tuple[Any, str]] = {
        "train_batch_size": (train.batch, "train.batch"),
        "train_micro_batch_size_per_gpu": (micro, "train.micro_batch"),
        "gradient_accumulation_steps": (-(-train.batch // (micro * processes)), "train.batch and train.micro_batch"),
        "gradient_clipping": (train.clip, "train.clip"),
        "optimizer.type": ("AdamW", "optimizer"),
        **{f"optimizer.params.{key}": (value, f"train.{key}") for key, value in adam.items()},
        "scheduler": (None, "schedule, a warm-up and a cosine,"),
        "fp16.enabled": (False, "precision of the bridge, fp32,"),
        "bf16.enabled": (False, "precision of the bridge, fp32,"),
    }
    for key, (value, name) in wanted.items():
        found: Any = given
        for part in key.split("."):
            found = found.get(part, "auto") if isinstance(found, dict) else "auto"
        if found not in ("auto", value):
            raise ValueError(
                f"{path}: {key} is {found!r}, and the recipe's {name} says {value!r}; leave {key} out, or say the same"
            )


def without_auto(value: Any) -> Any:
    """Settings without those that say `auto`: DeepSpeed's own defaults then hold."""
    if not isinstance(value, dict):
        return value
    return {key: without_auto(inner) for key, inner in value.items() if inner != "auto"}


def open_engine(
    accelerator: Accelerator, bare: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings | None
) -> Engine:
    """DDP, or DeepSpeed where there are settings of it."""
    return Zero(accelerator, bare, optimizer, settings) if settings else Engine(accelerator, bare, optimizer)
