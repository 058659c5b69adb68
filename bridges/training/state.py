"""What a run needs to go on as if it had never stopped. Data and dropout are functions of the step: not kept."""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bridges.adapter import KEYS
from bridges.build import Built, loras, towers_of
from bridges.checkpoint import load_trained, plain, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.files import finish, replacing, write
from bridges.saved import check_towers, read_config
from bridges.training.display import METRICS
from bridges.training.engine import Engine, Moments

STATE, STEPS, BEST = "trainer/state.pt", "steps", "best"
IN_NATS = ("caption_nll", "captioning")  # of the held-out figures those that are better when less


def save_run(engine: Engine, built: Built, sizes: Sequence[tuple[str, int]], step: int) -> None:
    """The checkpoint, and what is needed beside it to go on: all new, or all as it was. All processes have to ask.

    `sizes` are the names of the data and their numbers of examples. Raises ValueError when the disk is full.
    """
    moments, output = engine.moments(step), Path(built.recipe.output)
    with engine.whole():
        if engine.accelerator.is_main_process:
            buffer = io.BytesIO()
            torch.save({"step": step, "sizes": list(sizes), "optimizer": moments}, buffer)
            with replacing(output) as fresh:
                save_checkpoint(fresh, built)
                write(fresh / STATE, buffer.getvalue())
                if (keep := built.recipe.train.keep) > 1:
                    save_checkpoint(fresh / STEPS / f"{step:07}", built)
            for old in sorted((output / STEPS).glob("*"))[:-keep]:
                shutil.rmtree(old)
    engine.accelerator.wait_for_everyone()


def save_best(engine: Engine, built: Built) -> None:
    """A checkpoint in `best/`, where the last look at held-out data is the best so far by `train.best`.

    What was seen before is in metrics.jsonl, so a resumed run knows it. All processes have to ask.
    """
    if (name := built.recipe.train.best) is None:
        return
    output = Path(built.recipe.output)
    with engine.whole():
        if engine.accelerator.is_main_process:
            rows = map(json.loads, (output / METRICS).read_text().splitlines())
            seen = [row["validation"][name]["image"] for row in rows if "validation" in row]
            if seen[-1] == (min if name in IN_NATS else max)(seen):
                with replacing(output / BEST) as fresh:
                    save_checkpoint(fresh, built)
    engine.accelerator.wait_for_everyone()


def restore(built: Built, sizes: Sequence[tuple[str, int]]) -> tuple[int, Moments]:
    """Give the bridge the weights of its output folder; the step that they are of, and the optimizer's state there.

    (0, {}) where nothing was saved yet. Raises ValueError when recipe, data or towers are not those of the run.
    """
    output = Path(built.recipe.output)
    if not (state := read_state(output)):
        return 0, {}
    config = read_config(output)
    check_towers(output, towers_of(built))
    refuse_other_recipe(output, config, built.recipe)
    for (name, size), (_, was) in zip(sizes, state["sizes"], strict=True):
        if was != size:
            raise ValueError(
                f"{output} was trained with {was} examples of {name}, now there are {size}; resume needs the same"
            )
    load_trained(built, output)
    return state["step"], state["optimizer"]


def read_state(output: Path) -> dict[str, Any]:
    """What was saved last; nothing where there is no such file."""
    finish(output)
    path = output / STATE
    return torch.load(path, weights_only=True, mmap=True, map_location="cpu") if path.exists() else {}


def steps_done(output: Path) -> int:
    """After how many steps a run was saved last; 0 where there is none."""
    return read_state(output).get("step", 0)


def refuse_other_recipe(output: Path, config: dict, recipe: Recipe) -> None:
    """What decides the weights must be as it was; how often to look and to save may change."""
    looks = {"evaluate_every", "evaluate_size", "save_every", "log_every", "keep", "best", "track"}
    free = {*looks, "workers", "micro_batch", "gradient_checkpointing"}
    asked, none = loras(recipe), dict.fromkeys(f.name for f in fields(Lora))
    now = {
        "bridge": plain(recipe.bridge),
        "data": plain(vars(recipe.data)),
        "language": vars(recipe.language),
        "vision": {k: v for k, v in vars(recipe.vision).items() if k not in ("cache_gb", "lora")},
        **{KEYS[kind]: vars(asked[kind]) if kind in asked else none for kind in KEYS},
        "objectives": recipe.objectives,
        **{f"also.{number}": plain(vars(data)) for number, data in enumerate(recipe.also)},
        "train": {k: plain(v) for k, v in vars(recipe.train).items() if k not in free},
    }
    if len(config["also"]) != len(recipe.also):
        raise ValueError(
            f"{output} was trained with {len(config['also'])} data beside the first (also), the recipe has "
            f"{len(recipe.also)}; resume needs the same"
        )
    config = {**config, "lora": config.get("lora") or {}, "vision.lora": config["vision"].get("lora") or {}}
    config = {**config, **{f"also.{number}": data for number, data in enumerate(config["also"])}}
    for part, values in now.items():
        for key, value in values.items():
            if config[part].get(key) != value:
                was = config[part].get(key)
                raise ValueError(
                    f"{output} was trained with {part}.{key} {was!r}, the recipe says {value!r}; resume needs the same"
                )
