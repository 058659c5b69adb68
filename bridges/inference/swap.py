"""Another bridge between the same two towers, which are not loaded again."""

from pathlib import Path

from bridges.checkpoint import Assembled, build_bridge, check_towers, load_weights, read_config, recipe_of
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.model import BridgedModel


def with_bridge(assembled: Assembled, folder: Path) -> Assembled:
    """The bridge and the template of a checkpoint. ValueError where it was trained between other towers."""
    vision, language = assembled.model.vision, assembled.model.language
    config, recipe = read_config(folder), recipe_of(folder)
    if recipe.objectives:
        raise ValueError(f"{folder} is of the first stage, without a language model; give it a second stage")
    check_towers(folder, config, assembled)
    bridge = build_bridge(recipe.bridge, vision.dim, vision.num_patches, language.dim, language.num_layers)
    load_weights(bridge, folder)
    vision.tile(recipe.vision.tiles)
    template = Template(
        language.tokenizer,
        bridge.num_slots,
        recipe.language.template,
        recipe.language.system,
        bridge.reads_instructions,
        vision.tiler,
    )
    bridge.to(language.device)
    return Assembled(BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID).eval(), template, recipe)
