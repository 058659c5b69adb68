"""What each choice of a recipe costs: a plan for it, computed where that takes no other towers."""

from collections.abc import Iterator
from dataclasses import replace
from math import nan
from typing import Any

from torch import nn

from bridges import adapter
from bridges.build import Assembled, assemble, build_bridge, vision_tower
from bridges.config import Recipe
from bridges.training.probe import Plan, plan_of
from bridges.training.stage import Stage, stage_of

TILES = 4
BYTES = {"int8": 1.0, "nf4": 0.516}
"""Of a quantized weight; nf4 keeps a scale for 64 of them, itself in 8 bits (arXiv 2305.14314, section 3)."""


def choices(recipe: Recipe, stage: Stage, found: Plan) -> Iterator[tuple[str, Plan]]:
    """Names of keys with other values, and what the recipe takes with each. The last ones change the stage."""
    yield "as it is", found
    built = stage.built
    if not isinstance(built, Assembled):
        return
    yield from quantized(recipe, built, found)
    if built.model.bridge.blocks and "every" in recipe.bridge:
        yield from crossed(recipe, stage, built)
    if stage.store is None and (larger := enlarged(recipe, built)):
        yield larger
    if recipe.vision.tiles is None and not (built.model.bridge.blocks and built.model.bridge.sees == "last"):
        built.model.vision.tile(TILES)
        built.template.tiler = built.model.vision.tiler
        yield f"vision.tiles {TILES}", plan_of(recipe, stage)
        built.model.vision.tile(None)
        built.template.tiler = None
    if not recipe.train.gradient_checkpointing and not built.model.language.has_encoder:
        built.model.language.checkpoint_gradients()
        yield "gradient_checkpointing", plan_of(recipe, stage)


def quantized(recipe: Recipe, built: Assembled, found: Plan) -> Iterator[tuple[str, Plan]]:
    """The language model's linear layers in fewer bits: reckoned, so nobody knows the time."""
    model: Any = built.model.language.model
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if type(m) is nn.Linear and m is not head and not m.weight.requires_grad]
    if recipe.language.quantize or not layers:
        return
    count, wide = sum(m.weight.numel() for m in layers), layers[0].weight.element_size()
    for name, size in BYTES.items():
        here, narrow = found.weights - count * (wide - size), found.narrow - count * (min(wide, 2) - size)
        yield f"language.quantize {name}", replace(found, weights=here, narrow=narrow, seconds=nan)


def enlarged(recipe: Recipe, built: Assembled) -> tuple[str, Plan] | None:
    """Pictures of twice the side, where the encoder takes them and the bridge and the text have room for them."""
    language, side = built.model.language, 2 * built.model.vision.image_size[0]
    larger = replace(recipe, vision=replace(recipe.vision, image_size=side))
    try:
        vision = vision_tower(larger)
        bridge = build_bridge(recipe.bridge, vision.dim, vision.num_patches, language.dim, language.num_layers)
        assembled = assemble(vision, bridge, language, larger)
        if recipe.vision.lora is not None:
            adapter.attach(vision, recipe.vision.lora)
        assembled.model.to(language.device)
        return f"vision.image_size {side}", plan_of(larger, stage_of(assembled))
    except ValueError:
        return None


def crossed(recipe: Recipe, stage: Stage, built: Assembled) -> Iterator[tuple[str, Plan]]:
    """Blocks before half as many layers, and before twice as many, with fresh weights."""
    own, vision, language = built.model.bridge, built.model.vision, built.model.language
    every = recipe.bridge["every"]
    for other in sorted({max(1, every // 2), every * 2} - {every}):
        options = {**recipe.bridge, "every": other, "offset": min(recipe.bridge.get("offset", 0), other - 1)}
        if other <= language.num_layers:
            bridge = build_bridge(options, vision.dim, vision.num_patches, language.dim, language.num_layers)
            built.model.bridge = bridge.to(language.device)
            yield f"bridge.every {other}", plan_of(recipe, stage)
    built.model.bridge = own
