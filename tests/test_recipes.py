"""Every YAML that comes with the library is a recipe whose bridge can be built."""

from pathlib import Path

import pytest

from bridges.checkpoint import build_bridge
from bridges.config import read_recipe
from bridges.data.template import TEMPLATES

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

# width and patches of the encoders that recipes name, as published
ENCODERS = {
    "bundled:efficientnet-lite0": (1280, 49),
    "openai/clip-vit-large-patch14": (1024, 256),
    "openai/clip-vit-large-patch14-336": (1024, 576),
}
WIDTHS = {"bundled:smollm2-135m-instruct": (576, 30), "lmsys/vicuna-7b-v1.5": (4096, 32)}


def test_there_are_recipes() -> None:
    assert {"demo", "minigpt4_align", "minigpt4_instruct", "llava15_align", "llava15_instruct"} <= {
        p.stem for p in RECIPES
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses_and_its_bridge_builds(path: Path) -> None:
    recipe = read_recipe(path)
    dim, patches = ENCODERS[recipe.vision.name]
    bridge = build_bridge(recipe.bridge, dim, patches, *WIDTHS[recipe.language.name])
    assert 0 < bridge.num_slots <= 576
    assert recipe.language.template in ("chat", *TEMPLATES)
    assert len(path.read_text().splitlines()) <= 40


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_has_its_command_on_top(path: Path) -> None:
    top = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any("bridges" in line for line in top)
    if "start" in path.read_text():
        assert Path(read_recipe(path).start or "").name in {read_recipe(p).output.split("/")[-1] for p in RECIPES}
