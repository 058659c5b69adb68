"""What `bridges plan` foretells is what a step then takes."""

from pathlib import Path

import pytest
from PIL import Image

from bridges.config import Recipe
from bridges.data.sources import open_split
from bridges.training.plan import measure, plan, plan_of, size_of, state_of
from bridges.training.stage import open_stage

BRIDGES = {
    "projector": {"name": "projector", "depth": 2},
    "qformer": {"name": "qformer", "queries": 4, "layers": 2, "width": 32, "heads": 2},
    "wide": {"name": "flamingo", "latents": 4, "depth": 1, "every": 1, "heads": 16, "head_dim": 64},  # AdamW takes most
    "flamingo": {"name": "flamingo", "latents": 4, "depth": 1, "every": 1, "heads": 2, "head_dim": 16},
}


def captions(recipe: Recipe, folder: Path) -> Recipe:
    lines = ["path,caption"]
    for number in range(40):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,{'A small cat ' * (1 + number % 3)}and {number} birds.")
    (folder / "a.csv").write_text("\n".join(lines))
    recipe.data.source = str(folder / "a.csv")
    recipe.train.batch = 16
    return recipe


@pytest.mark.parametrize("name", BRIDGES)
def test_memory_is_within_fifteen_percent_of_a_step(recipe: Recipe, tmp_path: Path, name: str) -> None:
    recipe = captions(recipe, tmp_path)
    recipe.bridge = BRIDGES[name]
    stage = open_stage(recipe)
    found = plan_of(recipe, stage)
    data = open_split(recipe.data, "train")
    stage.built.model.train()
    for size in (1, 8, 16):
        taken = measure(stage, [data[i] for i in range(size)]).transient
        foretold = max(found.update, found.once + found.each * size)
        print(f"{name}, {size} examples: foretold {foretold / 1e6:.2f} MB, taken {taken / 1e6:.2f} MB")
        always = found.weights + state_of(stage.built.model.bridge)
        assert found.memory(size) == pytest.approx(always + taken, rel=0.15)
        if size > 1:
            assert foretold == pytest.approx(taken, rel=0.15)


def test_a_plan_changes_nothing(recipe: Recipe, tmp_path: Path) -> None:
    stage = open_stage(captions(recipe, tmp_path))
    before = {name: tensor.clone() for name, tensor in stage.built.model.bridge.state_dict().items()}
    plan_of(recipe, stage)
    assert all(tensor.equal(before[name]) for name, tensor in stage.built.model.bridge.state_dict().items())


def test_it_says_what_fits(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(captions(recipe, tmp_path), "24GB")
    told = capsys.readouterr().out
    assert "fits 24GB" in told
    assert "takes micro-batches up to" in told
    plan(recipe, "1KB")
    assert "not even one example" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="such as 24GB"):
        plan(recipe, "big")


def test_sizes_are_read() -> None:
    assert [size_of(text) for text in ("24GB", "24 gb", "500M", "8")] == [24e9, 24e9, 5e8, 8]
