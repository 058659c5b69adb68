"""What is in the folder of a checkpoint, read strictly: its recipe, its towers' fingerprints, its weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bridges import adapter
from bridges.base import Bridge
from bridges.config import Recipe
from bridges.files import finish
from bridges.recipe import recipe_from
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

WEIGHTS, CONFIG = "bridge.safetensors", "config.yaml"


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a checkpoint was trained with."""
    config = read_config(folder)
    kept = {key: value for key, value in config.items() if key not in ("version", "towers")}
    recipe = recipe_from(kept, source=str(folder / CONFIG))
    recipe.start = None  # its weights come from here
    return recipe


def read_config(folder: Path) -> dict[str, Any]:
    finish(folder)  # a save that was killed when it was whole, and not yet in place
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no checkpoint in {folder}: {CONFIG} is missing; `bridges train RECIPE` makes one")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / CONFIG} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or "towers" not in config:
        raise ValueError(f"{folder / CONFIG} is no checkpoint's: it does not say which towers")
    return config


def check_towers(folder: Path, towers: Mapping[str, VisionTower | LanguageTower]) -> None:
    """A bridge speaks only between the towers that it was trained with; a first stage had no language model."""
    known = read_config(folder)["towers"]
    for kind, tower in towers.items():
        was, now = known.get(kind), describe(tower)
        if was is not None and was != now:
            raise ValueError(
                f"{folder} was trained with the {kind} tower {was['name']} (width {was['dim']}, {was['fingerprint']}), "
                f"this is {now['name']} (width {now['dim']}, {now['fingerprint']}); give it the tower that it knows"
            )


def describe(tower: VisionTower | LanguageTower) -> dict[str, Any]:
    return {"name": tower.name, "dim": tower.dim, "fingerprint": tower.fingerprint()}


def load_weights(bridge: Bridge, folder: Path) -> None:
    """Strict: every tensor, none more, of the right shape."""
    try:
        bridge.load_state_dict(read_weights(folder), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS} does not fit the bridge of its {CONFIG}: {reason}") from error


def load_adapter(tower: adapter.Tower, folder: Path) -> None:
    """Into a tower that has one of this kind. ValueError where it is missing or does not fit."""
    name = adapter.WEIGHTS[adapter.kind_of(tower)]
    weights = read_weights(folder, name)
    try:
        adapter.load_state(tower, weights)
    except ValueError as error:
        raise ValueError(f"{folder / name} {error}") from error


def read_weights(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except FileNotFoundError:
        raise ValueError(f"no weights in {folder}: {name} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / name} is broken ({error}); was the copy cut short?") from error
