"""From a recipe to objects, and from objects to a small folder and back: the only place that ties the two together."""

import inspect
import shutil
from collections.abc import Callable
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from bridges import __version__
from bridges.base import Bridge, bridge_class
from bridges.config import Recipe, recipe_from
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.model import BridgedModel
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

WEIGHTS, CONFIG, CARD = "bridge.safetensors", "config.yaml", "README.md"


class Assembled(NamedTuple):
    """A model, and what is needed to talk to it."""

    model: BridgedModel
    template: Template
    recipe: Recipe


def build(recipe: Recipe) -> Assembled:
    """Frozen towers and a fresh bridge (or that of the checkpoint `start`), in the state before the first step."""
    vision = VisionTower(recipe.vision.name, recipe.vision.layer, recipe.vision.keep_cls, recipe.vision.revision)
    language = LanguageTower(recipe.language.name, recipe.language.revision)
    torch.manual_seed(recipe.train.seed)
    bridge = build_bridge(recipe.bridge, vision.dim, vision.num_patches, language.dim, language.num_layers)
    bridge.match_scale(language.embedding_rms())
    template = Template(language.tokenizer, bridge.num_slots, recipe.language.template, recipe.language.system)
    if recipe.start:
        check_towers(Path(recipe.start), read_config(Path(recipe.start)), vision, language)
        load_weights(bridge, Path(recipe.start))
    return Assembled(BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID), template, recipe)


def build_bridge(
    options: dict[str, Any], vision_dim: int, num_patches: int, language_dim: int, num_layers: int
) -> Bridge:
    """The bridge that a YAML describes.

    Raises ValueError for an option that it does not have (the nearest one is named), or a value of the wrong type.
    """
    if "name" not in options:
        raise ValueError("bridge: its name is missing, e.g. bridge: {name: projector}")
    options = dict(options)
    chosen = bridge_class(options.pop("name"))
    keywords = {p.name: p.default for p in inspect.signature(chosen).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in keywords:
            near = get_close_matches(key, keywords, n=1) or keywords
            raise ValueError(f"bridge {chosen.__name__} has no option {key!r}; did you mean {' or '.join(near)}?")
        if value is None and keywords[key] is not None:
            raise ValueError(f"bridge {chosen.__name__}: {key} has no value; give it one, or leave it out")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(
        chosen, skip={"vision_dim", "num_patches", "language_dim", "num_layers"}, fail_untyped=False
    )
    try:
        read = parser.parse_object(options)
    except ArgumentError as error:
        raise ValueError(f"bridge {chosen.__name__}: {' '.join(str(error).split())}") from error
    make: Callable[..., Bridge] = cast(Any, chosen)  # options differ from bridge to bridge
    return make(vision_dim, num_patches, language_dim, num_layers, **{key: read[key] for key in options})


def save_checkpoint(folder: Path, assembled: Assembled) -> None:
    """Write the bridge's weights, the recipe with the towers' fingerprints, and a model card.

    Each file replaces its predecessor in one go. Raises ValueError when the disk is full; nothing is half-written then.
    """
    model, _, recipe = assembled
    towers = {"vision": describe(model.vision), "language": describe(model.language)}
    config = {"version": __version__, **asdict(recipe), "towers": towers}
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.bridge.state_dict().items()}
    write(folder / WEIGHTS, save(weights))
    write(folder / CONFIG, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True).encode())
    write(folder / CARD, card(assembled).encode())


def load(folder: str | Path) -> Assembled:
    """The model of a checkpoint folder. ValueError when towers or weights are not the ones it was trained with."""
    folder = Path(folder)
    config = read_config(folder)
    recipe = recipe_from(
        {k: v for k, v in config.items() if k not in ("version", "towers")}, source=str(folder / CONFIG)
    )
    recipe.start = None  # its weights come from here
    assembled = build(recipe)
    check_towers(folder, config, assembled.model.vision, assembled.model.language)
    load_weights(assembled.model.bridge, folder)
    return assembled


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"no checkpoint in {folder}: {CONFIG} is missing; `bridges train RECIPE` makes one")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{folder / CONFIG} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or "towers" not in config:
        raise ValueError(f"{folder / CONFIG} is no checkpoint's: it does not say which towers")
    return config


def check_towers(folder: Path, config: dict[str, Any], vision: VisionTower, language: LanguageTower) -> None:
    """A bridge speaks only between the towers that it was trained with."""
    for kind, tower in (("vision", vision), ("language", language)):
        was, now = config["towers"][kind], describe(tower)
        if was != now:
            raise ValueError(
                f"{folder} was trained with the {kind} tower {was['name']} (width {was['dim']}, {was['fingerprint']}), "
                f"this is {now['name']} (width {now['dim']}, {now['fingerprint']}); give it the tower that it knows"
            )


def describe(tower: VisionTower | LanguageTower) -> dict[str, Any]:
    return {"name": tower.name, "dim": tower.dim, "fingerprint": tower.fingerprint()}


def load_weights(bridge: Bridge, folder: Path) -> None:
    """Strict: every tensor, none more, of the right shape."""
    path = folder / WEIGHTS
    try:
        bridge.load_state_dict(load_file(path), strict=True)
    except FileNotFoundError:
        raise ValueError(f"no weights in {folder}: {WEIGHTS} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is broken ({error}); was the copy cut short?") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit the bridge of its {CONFIG}: {reason}") from error


def write(path: Path, content: bytes) -> None:
    """Replace a file in one go: a crash leaves the old one or the new one. ValueError when there is no space."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise ValueError(f"cannot write {path}: {error.strerror}; {len(content) / 1e6:.1f} MB are needed") from error


def prepare_output(folder: Path, needed: int) -> None:
    """ValueError unless `folder` can be written and has room for `needed` bytes: known before training, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"output {folder} is a file, or lies in one; choose a folder") from None
    except OSError as error:
        raise ValueError(f"cannot make the output folder {folder}: {error.strerror}") from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB free, a checkpoint needs {needed / 1e6:.0f} MB; make room there"
        )


def plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def card(assembled: Assembled) -> str:
    model, _, recipe = assembled
    trained = sum(p.numel() for p in model.bridge.parameters())
    return (
        f"---\nlibrary_name: mm-bridges\nbase_model: [{recipe.vision.name}, {recipe.language.name}]\n---\n\n"
        f"# A bridge from {recipe.vision.name} to {recipe.language.name}\n\n"
        f"`{recipe.bridge['name']}`, {trained:,} trained parameters, {model.bridge.num_slots} slots an image, "
        f"{recipe.train.steps} steps of {recipe.train.batch} on `{recipe.data.source}`. "
        "The towers are frozen and not in here.\n\n"
        "```\nbridges chat .\n```\n"
    )
