"""Another bridge between the same two towers, which are not loaded again."""

from pathlib import Path

from bridges.build import Assembled, assemble, build_bridge, loras, towers_of
from bridges.saved import check_towers, load_weights, recipe_of


def with_bridge(assembled: Assembled, folder: Path) -> Assembled:
    """The bridge and the template of a checkpoint.

    Raises ValueError where it was trained between other towers, or one of the two beside an adapter.
    """
    vision, language = assembled.model.vision, assembled.model.language
    recipe = recipe_of(folder)
    if recipe.objectives:
        raise ValueError(f"{folder} is of the first stage, without a language model; give it a second stage")
    check_towers(folder, towers_of(assembled))
    if beside := loras(recipe) or loras(assembled.recipe):
        whose = folder if loras(recipe) else "the checkpoint in use"
        raise ValueError(
            f"{whose} has LoRA on its {' and '.join(beside)} model, and a bridge is only changed between models "
            f"without; open the other one by itself: bridges chat {folder}"
        )
    bridge = build_bridge(recipe.bridge, vision.dim, vision.num_patches, language.dim, language.num_layers)
    load_weights(bridge, folder)
    vision.tile(recipe.vision.tiles)
    return assemble(vision, bridge.to(language.device), language, recipe)
