"""Pictures of other shapes than the encoder's: squashed, on a canvas, or their middle; the same after loading."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bridges.build import build
from bridges.checkpoint import load, save_checkpoint
from bridges.config import Recipe
from bridges.recipe import recipe_from
from bridges.towers.framing import framed
from bridges.towers.vision import VisionTower

MEAN = (0.5, 0.0, 1.0)


def striped() -> Image.Image:
    """Red on the left, green in the middle, blue on the right: three squares."""
    image = Image.new("RGB", (96, 32), "lime")
    image.paste("red", (0, 0, 32, 32))
    image.paste("blue", (64, 0, 96, 32))
    return image


def at(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(image)[y, x])


def test_each_mode_shows_what_it_says() -> None:
    squashed, canvas, middle = (framed(striped(), mode, (24, 24), MEAN) for mode in ("resize", "pad", "crop"))
    assert squashed.size == canvas.size == (24, 24)
    assert [at(squashed, x, 12) for x in (2, 12, 21)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert [at(canvas, x, 12) for x in (2, 12, 21)] == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    assert at(canvas, 12, 2) == at(canvas, 12, 21) == (128, 0, 255)
    assert middle.size == (32, 32)
    assert [at(middle, x, 16) for x in (0, 16, 31)] == [(0, 255, 0)] * 3
    assert framed(striped(), None, (24, 24), MEAN).size == (96, 32)
    assert framed(Image.new("L", (1, 500)), "pad", (24, 24), MEAN).size == (24, 24)


def test_the_tower_sees_it_and_its_fingerprint_tells(tiny_clip: Path) -> None:
    towers = {mode: VisionTower(str(tiny_clip), image_mode=mode) for mode in (None, "resize", "pad", "crop")}
    pixels = {mode: tower.preprocess([striped()]) for mode, tower in towers.items()}
    assert torch.equal(pixels["crop"], pixels[None])  # CLIP's own processor crops
    assert not torch.equal(pixels["pad"], pixels["crop"])
    assert not torch.equal(pixels["pad"], pixels["resize"])
    assert len({tower.fingerprint() for tower in towers.values()}) == 4
    square = Image.effect_noise((32, 32), 50)
    assert all(torch.equal(tower.preprocess([square]), towers[None].preprocess([square])) for tower in towers.values())


def test_it_is_saved_with_the_checkpoint(recipe: Recipe) -> None:
    recipe.vision.image_mode = "pad"
    made = build(recipe)
    save_checkpoint(Path(recipe.output), made)
    loaded = load(recipe.output)
    assert torch.equal(loaded.model.vision.preprocess([striped()]), made.model.vision.preprocess([striped()]))
    assert loaded.model.vision.image_mode == "pad"


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="image_mode"):
        recipe_from({"output": "x", "vision": {"image_mode": "squash"}})
