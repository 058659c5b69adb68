"""What the tests of LoRA share, whichever tower has it: an adapter that has been trained, a batch, runs with one."""

from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import said_afresh
from PIL import Image
from safetensors.torch import load_file

from bridges import adapter
from bridges.build import Assembled, build, loras, trained
from bridges.checkpoint import load, save_checkpoint
from bridges.config import Lora, Recipe
from bridges.data.batch import Batch, collate, rows_of
from bridges.data.conversation import Conversation, Example, Turn, ask
from bridges.objectives.language import language_loss, target_nll
from bridges.saved import WEIGHTS
from bridges.training import loop
from bridges.training.loop import train

LORA = Lora(targets=["q_proj", "down_proj"], rank=4, alpha=8)  # on the tiny language models


@torch.no_grad()
def disturb(tower: adapter.Tower, seed: int = 0) -> None:
    """As if the adapter had been trained: both of its matrices count."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters(tower):
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def examples(pictures: list[Image.Image]) -> list[Example]:
    """Three conversations behind one system turn; two about one picture, one about none."""
    said = [Turn("system", ["Be brief. The answer is four, I think."])]
    texts = [ask(f"What is {w}?", f"A {w}.", pictures[0]) for w in ("cat", "bird")]
    texts += [Conversation([Turn("user", ["Is it a dog?"]), Turn("assistant", ["No."])])]
    return [Example([Conversation([*said, *t.turns]) for t in some]) for some in (texts[:2], texts[2:])]


def batch_of(assembled: Assembled, some: list[Example]) -> Batch:
    rows = [r for e in some for r in rows_of(e, assembled.template)]
    return collate(rows, assembled.model.vision.preprocess)


def assert_bridge_and_adapter_train(assembled: Assembled, batch: Batch) -> set[str]:
    """A step moves them, and nothing else. Returns the names of what moved."""
    parameters = dict(assembled.model.named_parameters())
    before = {name: p.clone() for name, p in parameters.items()}
    optimizer = torch.optim.AdamW(trained(assembled), lr=1e-2)
    language_loss(assembled.model, batch)[0].backward()
    optimizer.step()
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert moved == {name for name in parameters if name.startswith("bridge.") or ".lora_" in name}
    assert moved == {name for name, p in parameters.items() if p.grad is not None}
    assert len(moved) == len(trained(assembled))
    return moved


def longest_moves(run: Recipe) -> dict[str, float]:
    """How far the first step of a run moves each parameter, at the place where it moves it farthest."""
    run = replace(run, train=replace(run.train, steps=1, warmup=1))
    before, after = build(run).model, load(train(run)).model
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name: float((p - q).detach().abs().max()) for (name, p), q in pairs}


def assert_a_fresh_process_reads_it_alike(assembled: Assembled, batch: Batch) -> Path:
    """Save a model; another process loads it and says the same. Returns the folder."""
    folder = Path(assembled.recipe.output)
    save_checkpoint(folder, assembled)
    with torch.no_grad():
        expected = target_nll(assembled.model, batch)
    torch.testing.assert_close(said_afresh(folder, batch), expected, atol=1e-6, rtol=1e-6)
    assert asdict(load(folder).recipe) == asdict(assembled.recipe)
    return folder


def assert_resumed_equals_uninterrupted(run: Recipe, folder: Path) -> Recipe:
    """A run in one go, and one that is cut after its first save and resumed: the same weights, to the bit.

    Returns the recipe of the second.
    """
    whole, recipe = train(replace(run, output=str(folder / "whole"))), replace(run, output=str(folder / "cut"))

    class Stopped(Exception):
        pass

    saved = loop.save_run

    def stop(*arguments: Any) -> None:
        saved(*arguments)
        raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_run", stop)
        with pytest.raises(Stopped):
            train(recipe)
    cut = train(deepcopy(recipe), resume=True)
    for name in (WEIGHTS, *(adapter.WEIGHTS[kind] for kind in loras(run))):
        one, other = load_file(whole / name), load_file(cut / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items()), name
    return recipe
