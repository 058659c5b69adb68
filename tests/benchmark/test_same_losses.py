"""Fifty steps of training with each technique off, or on: every loss is that of plain training to 1e-5.

All is in float64, but for features that are kept: what float32 rounds differently AdamW spreads (2e-4 were seen).
"""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from bridges import model as splice
from bridges.benchmark.contest import Task, examples
from bridges.benchmark.ours import open_gates
from bridges.benchmark.techniques import TECHNIQUES, settle
from bridges.data.conversation import Example
from bridges.recipe import recipe_from
from bridges.training.engine import Engine
from bridges.training.feed import Share
from bridges.training.loop import adam, train_step
from bridges.training.stage import language_stage

STEPS, TEXTS = 50, 2
BRIDGES: dict[str, dict[str, Any]] = {
    "projector": {"name": "projector", "depth": 2, "merge": "average", "factor": 2},
    "flamingo": dict(name="flamingo", latents=3, depth=1, resampler_heads=2, heads=2, head_dim=8, inner=24, offset=1),
}


@pytest.fixture(scope="module", params=["projector", pytest.param("flamingo", marks=pytest.mark.slow)])
def task(
    request: pytest.FixtureRequest, tiny_clip: Path, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Task:
    folder = tmp_path_factory.mktemp("run")
    given = {
        "output": str(folder / "run"),
        "vision": {"name": str(tiny_clip), "cache": "fp32"},
        "language": {"name": str(tiny_llama), "system": "You are a helpful assistant."},
        "bridge": BRIDGES[request.param],
        "data": {"source": "scenes", "size": 16},
        "train": {"batch": 2, "lr": 3e-3},
    }
    return Task(recipe_from(given), TEXTS, STEPS, folder)


@pytest.fixture(scope="module")
def steps(task: Task) -> list[list[Example]]:
    return examples(task)


def losses(task: Task, steps: list[list[Example]], name: str) -> list[float]:
    stage = language_stage(task.recipe)
    settle(stage, name)
    model: Any = stage.built.model.train()
    open_gates(model.bridge, 0.5)
    model.double()
    engine = Engine(Accelerator(cpu=True), model, adam(model, task.recipe))
    shares = ([Share("scenes", 1.0, [stage.batch(some)])] for some in steps)
    found = [train_step(engine, share, task.recipe.train.clip, stage.loss)["loss"] for share in shares]
    if stage.store is not None:
        assert stage.store.encoded == len({id(example) for some in steps for example in some}), "nothing was kept"
    return found


@pytest.fixture(scope="module")
def plain(task: Task, steps: list[list[Example]]) -> list[float]:
    """With nothing that spares work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splice, "LONGEST_LINE", splice.LONGEST_LINE)  # which doing without `lines` changes
        found = losses(task, steps, "plain")
    assert found[-1] < found[0] - 0.2, "nothing was learnt, so every run is alike"
    return found


@pytest.mark.parametrize("name", ["ours", *(f"no-{technique}" for technique in TECHNIQUES)])
def test_training_without_a_technique_has_the_losses_of_plain_training(
    task: Task, steps: list[list[Example]], plain: list[float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice, "LONGEST_LINE", splice.LONGEST_LINE)
    found = losses(task, steps, name)
    far = max(abs(a - b) for a, b in zip(found, plain, strict=True))
    print(f"{name}: {far:.1e}")
    assert far < 1e-5, f"a loss of {name} is {far:.1e} off"
