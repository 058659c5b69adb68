"""One process of those that stream a big source, as torchrun starts it: what each step gets, and what that takes; then
a part of it again, as after a stop.

Writes JSON lines: the captions of each of its steps; and at 10 %, 50 % and 100 % of them how often a shard was opened
so far, and the memory of the process. `resident` counts what is mapped from disk, which the kernel may take back.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridges.config import Recipe
from bridges.data.conversation import Example
from bridges.recipe import recipe_from
from bridges.training.feed import open_sources, prefetched
from bridges.training.stage import open_stage


def memory() -> dict[str, float]:
    """MB of this process."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"own": "RssAnon", "mapped": "RssFile", "resident": "VmRSS"}
    return {name: int(lines[key].split()[0]) / 1e3 for name, key in names.items()}


def opened_shards() -> list[int]:
    """The running count of pictures that are read out of a shard."""
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        count[0] += event == "open" and str(arguments[0]).endswith(".tar")

    sys.addaudithook(hook)
    return count


def stream(recipe: Recipe, first: int, out: Path, opened: list[int]) -> None:
    """The steps from `first` on."""
    stage = open_stage(recipe)

    def batch(examples: list[Example]) -> Any:
        return [e.conversations[0].turns[1].content[0] for e in examples], stage.batch(examples)

    sources = open_sources(recipe)
    before, began = opened[0], time.monotonic()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    marks = {first + (recipe.train.steps - first) * part // 100 for part in (10, 50, 100)}
    with out.with_name(f"{out.name}.{rank}").open("w") as file:
        feed = prefetched(replace(stage, batch=batch), sources, first, rank, ranks)
        for step, shares in enumerate(feed, first + 1):
            said, tensors = shares[0].batches[0]
            assert len(tensors.pixel_values) == len(said)
            row = {"step": step, "said": said}
            if step in marks:
                row |= {"opened": opened[0] - before, "seconds": time.monotonic() - began, **memory()}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    recipe, opened = recipe_from(json.loads(sys.argv[1])), opened_shards()
    stream(recipe, 0, Path(recipe.output) / "whole", opened)
    recipe.train.steps = int(sys.argv[3])
    stream(recipe, int(sys.argv[2]), Path(recipe.output) / "again", opened)
