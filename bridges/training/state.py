"""What a run needs to go on as if it had never stopped. The order of the data is a function of the step: not kept."""

import io
import json
from dataclasses import fields
from pathlib import Path

import torch

from bridges import adapter
from bridges.checkpoint import Assembled, Built, check_towers, plain, read_config
from bridges.config import Lora, Recipe
from bridges.files import write

STATE, METRICS = "trainer/state.pt", "metrics.jsonl"


def save_state(output: Path, built: Built, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The step, the exact weights of bridge and adapter, optimizer, random generator: one file, replaced in one go."""
    buffer = io.BytesIO()
    state = {"step": step, "bridge": built.model.bridge.state_dict(), "optimizer": optimizer.state_dict()}
    if isinstance(built, Assembled):
        state["adapter"] = adapter.state(built.model.language)
    torch.save({**state, "random": torch.get_rng_state()}, buffer)
    write(output / STATE, buffer.getvalue())


def restore(output: Path, built: Built, optimizer: torch.optim.Optimizer) -> int:
    """Bring a run back to where it was saved and return its step; 0 where nothing was saved yet.

    Raises ValueError when the recipe or the towers are not those of the run.
    """
    if not (output / STATE).exists():
        return 0
    config = read_config(output)
    check_towers(output, config, built)
    refuse_other_recipe(output, config, built.recipe)
    state = torch.load(output / STATE, weights_only=True, map_location="cpu")
    built.model.bridge.load_state_dict(state["bridge"])
    if built.recipe.lora is not None and isinstance(built, Assembled):
        adapter.load_state(built.model.language, state["adapter"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    forget_after(output / METRICS, state["step"])
    return state["step"]


def steps_done(output: Path) -> int:
    """After how many steps a run was saved last; 0 where there is none."""
    return torch.load(output / STATE, weights_only=True, mmap=True)["step"] if (output / STATE).exists() else 0


def refuse_other_recipe(output: Path, config: dict, recipe: Recipe) -> None:
    """What decides the weights must be as it was; how often to look and to save may change."""
    free = {"evaluate_every", "evaluate_size", "save_every", "log_every", "workers", "micro_batch", "tensorboard"}
    now = {
        "bridge": plain(recipe.bridge),
        "data": plain(vars(recipe.data)),
        "language": vars(recipe.language),
        "vision": vars(recipe.vision),
        "lora": vars(recipe.lora) if recipe.lora else dict.fromkeys(f.name for f in fields(Lora)),
        "objectives": recipe.objectives,
        **{f"also.{number}": plain(vars(data)) for number, data in enumerate(recipe.also)},
        "train": {k: plain(v) for k, v in vars(recipe.train).items() if k not in free},
    }
    if len(config["also"]) != len(recipe.also):
        raise ValueError(
            f"{output} was trained with {len(config['also'])} data beside the first (also), the recipe has "
            f"{len(recipe.also)}; resume needs the same"
        )
    config = {**config, "lora": config.get("lora") or {}}
    config = {**config, **{f"also.{number}": data for number, data in enumerate(config["also"])}}
    for part, values in now.items():
        for key, value in values.items():
            if config[part].get(key) != value:
                was = config[part].get(key)
                raise ValueError(
                    f"{output} was trained with {part}.{key} {was!r}, the recipe says {value!r}; resume needs the same"
                )


def forget_after(metrics: Path, step: int) -> None:
    """Drop the lines of steps that will be done again."""
    if metrics.exists():
        lines = metrics.read_text().splitlines(keepends=True)
        write(metrics, "".join(line for line in lines if json.loads(line)["step"] <= step).encode())
