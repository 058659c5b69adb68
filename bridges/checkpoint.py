"""A trained model as a small folder to hand over, and back."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save

from bridges import __version__, adapter
from bridges.build import Assembled, Built, Paired, build, build_pairs, loras, towers_of, trained
from bridges.files import write
from bridges.saved import CONFIG, WEIGHTS, check_towers, describe, load_adapter, load_weights, recipe_of
from bridges.towers.precision import fastest_device

CARD = "README.md"


def save_checkpoint(folder: Path, built: Built) -> None:
    """Write the bridge's weights, adapters in peft's own format, the recipe with the towers' fingerprints, a card.

    Each file replaces its predecessor in one go. Raises ValueError when the disk is full; nothing is half-written then.
    """
    model, recipe = built.model, built.recipe
    towers = {kind: describe(tower) for kind, tower in towers_of(built).items()}
    config = {"version": __version__, **asdict(recipe), "towers": towers}
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.bridge.state_dict().items()}
    write(folder / WEIGHTS, save(weights))
    for tower in towers_of(built).values():
        for name, content in adapter.files(tower).items():
            write(folder / name, content)
    write(folder / CONFIG, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True).encode())
    write(folder / CARD, card(built).encode())


def load(folder: str | Path) -> Assembled:
    """The model of a checkpoint folder, on this machine's accelerator where there is one.

    ValueError when towers or weights are not the ones it was trained with.
    """
    recipe = recipe_of(Path(folder))
    if recipe.objectives:
        raise ValueError(
            f"{folder} is of the first stage, without a language model: `bridges retrieve {folder}` compares pictures "
            f"and texts, and a second stage with `start: {folder}` learns to talk"
        )
    built = build(recipe, fresh=False)
    fill(built, Path(folder))
    built.model.to(fastest_device())
    return built


def load_pairs(folder: str | Path) -> Paired:
    """Like `load`, of a checkpoint of the first stage."""
    recipe = recipe_of(Path(folder))
    if not recipe.objectives:
        raise ValueError(
            f"{folder} was not trained on pairs: pictures and texts are compared by a recipe with objectives"
        )
    built = build_pairs(recipe, fresh=False)
    fill(built, Path(folder))
    built.model.to(fastest_device())
    return built


def fill(built: Built, folder: Path) -> None:
    """Take the weights of a checkpoint, if its towers are these."""
    check_towers(folder, towers_of(built))
    load_trained(built, folder)


def load_trained(built: Built, folder: Path) -> None:
    """Take the weights of the bridge, then those of each adapter. ValueError where some are missing or do not fit.

    Whether the towers are those of the checkpoint is for the caller to check (`check_towers`).
    """
    load_weights(built.model.bridge, folder)
    for kind in loras(built.recipe):
        load_adapter(towers_of(built)[kind], folder)


def plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def card(built: Built) -> str:
    """A model card: what it is, and the command that uses it."""
    recipe = built.recipe
    names = [tower.name for tower in towers_of(built).values()]
    number = sum(p.numel() for p in trained(built))
    kind = f"`{recipe.bridge['name']}`"
    kind += f" and LoRA on the {' and '.join(loras(recipe))} model" if loras(recipe) else ""
    return (
        f"---\nlibrary_name: mm-bridges\nbase_model: [{', '.join(names)}]\n---\n\n"
        f"# A bridge {'from ' + ' to '.join(names) if len(names) > 1 else 'on ' + names[0]}\n\n"
        f"{kind}, {number:,} trained parameters, {built.model.bridge.shape()}, "
        f"{recipe.train.steps} steps of {recipe.train.batch} on `{recipe.data.source}`. "
        "The towers are frozen and not in here.\n\n"
        f"```\nbridges {'retrieve . --images FOLDER --text TEXT' if recipe.objectives else 'chat .'}\n```\n"
    )
