"""From a recipe to objects, and from objects to a small folder and back: the only place that ties the two together."""

import inspect
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
from torch import Tensor, nn

from bridges import __version__, adapter
from bridges.base import Bridge, bridge_class
from bridges.config import Recipe, recipe_from
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.files import finish, write
from bridges.interop.blip2 import is_blip2, read_blip2
from bridges.model import BridgedModel
from bridges.pairs import PairModel
from bridges.towers.encoder_decoder import language_tower
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

WEIGHTS, CONFIG, CARD = "bridge.safetensors", "config.yaml", "README.md"


class Assembled(NamedTuple):
    """A model, and what is needed to talk to it."""

    model: BridgedModel
    template: Template
    recipe: Recipe


class Paired(NamedTuple):
    """A model that compares pictures and captions, and has no language model."""

    model: PairModel
    recipe: Recipe


Built = Assembled | Paired


def build(recipe: Recipe, fresh: bool = True, dtype: torch.dtype | None = None) -> Assembled:
    """Frozen towers and a fresh bridge (or that of the checkpoint `start`), in the state before the first step.

    Nothing is awake: who trains says `model.train()`. Unless `fresh`, the bridge's weights are to be loaded yet.
    `dtype` is the language model's, by default what the machine runs fastest.
    """
    vision = vision_tower(recipe)
    language = language_tower(recipe.language.name, recipe.language.revision, dtype, recipe.language.quantize)
    torch.manual_seed(recipe.train.seed)
    bridge = build_bridge(recipe.bridge, vision.dim, vision.num_patches, language.dim, language.num_layers)
    if language.context is not None and bridge.num_slots >= language.context:
        raise ValueError(
            f"a picture takes {bridge.num_slots} slots, and {language.name} knows {language.context} positions in all; "
            "choose fewer queries, or merge more patches"
        )
    if bridge.blocks and (language.has_encoder or not language.layers):
        raise ValueError(
            f"{recipe.bridge['name']} puts blocks between the layers of a decoder, and {recipe.language.name} "
            + ("has an encoder; choose a causal language model" if language.has_encoder else "shows no list of layers")
        )
    if vision.tiler and bridge.blocks and bridge.sees == "last":
        raise ValueError(
            f"vision.tiles: with {recipe.bridge['name']} a text sees the last image alone, and that is no tile but the "
            "whole picture; set bridge.sees to all, or leave vision.tiles out"
        )
    if fresh:
        bridge.begin()
        bridge.match_scale(language.embedding_rms())
    if recipe.lora is not None:
        adapter.attach(language, recipe.lora)
    assembled = assemble(vision, bridge, language, recipe)
    start_from(recipe.start, assembled)
    return assembled


def assemble(vision: VisionTower, bridge: Bridge, language: LanguageTower, recipe: Recipe) -> Assembled:
    """The model of its three parts, asleep, and the template in which the recipe says to talk to it."""
    said = recipe.language
    read = bridge.reads_instructions
    template = Template(language.tokenizer, bridge.num_slots, said.template, said.system, read, vision.tiler)
    return Assembled(BridgedModel(vision, bridge, language, IMAGE_TOKEN_ID).eval(), template, recipe)


def build_pairs(recipe: Recipe, fresh: bool = True) -> Paired:
    """A frozen vision tower and a bridge that reads captions itself, for a recipe with `objectives`; as `build`."""
    if recipe.vision.tiles:
        raise ValueError("vision.tiles: a pair is one image and its caption; leave it out for objectives")
    vision = vision_tower(recipe)
    torch.manual_seed(recipe.train.seed)
    bridge = build_bridge(recipe.bridge, vision.dim, vision.num_patches, 0, 0)
    if not hasattr(bridge, "heads"):
        raise ValueError(
            f"objectives {', '.join(recipe.objectives)} need a bridge that reads pairs: {{name: qformer, reads: pairs}}"
        )
    if fresh:
        bridge.begin()
    paired = Paired(PairModel(vision, bridge).eval(), recipe)
    start_from(recipe.start, paired)
    return paired


def vision_tower(recipe: Recipe) -> VisionTower:
    chosen = recipe.vision
    return VisionTower(
        chosen.name,
        chosen.layer,
        chosen.keep_cls,
        chosen.revision,
        image_mode=chosen.image_mode,
        tiles=chosen.tiles,
        image_size=chosen.image_size,
    )


def start_from(start: str | None, built: Built) -> None:
    """Begin with the bridge of another checkpoint, if one is named: of this stage, or of one before."""
    if start is None:
        return
    folder = Path(start).expanduser()
    if is_blip2(folder):
        weights = read_blip2(folder)
    else:
        check_towers(folder, read_config(folder), built)
        weights = read_weights(folder)
    try:
        built.model.bridge.adopt(weights)
    except ValueError as error:
        raise ValueError(f"start {folder}: its bridge {error}") from error
    if not (folder / adapter.FOLDER).is_dir():
        return
    if built.recipe.lora is None:
        raise ValueError(
            f"start {folder}: its bridge was trained beside an adapter; give the recipe the same lora, or fold it into "
            f"the language model first: bridges merge {folder} --output FOLDER"
        )
    assert isinstance(built, Assembled)
    load_adapter(built.model.language, folder)


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


def save_checkpoint(folder: Path, built: Built) -> None:
    """Write the bridge's weights, the adapter in peft's own format, the recipe with the towers' fingerprints, a card.

    Each file replaces its predecessor in one go. Raises ValueError when the disk is full; nothing is half-written then.
    """
    model, recipe = built.model, built.recipe
    towers = {kind: describe(tower) for kind, tower in towers_of(built).items()}
    config = {"version": __version__, **asdict(recipe), "towers": towers}
    weights = {name: tensor.detach().float().cpu().contiguous() for name, tensor in model.bridge.state_dict().items()}
    write(folder / WEIGHTS, save(weights))
    for name, content in (adapter.files(built.model.language) if isinstance(built, Assembled) else {}).items():
        write(folder / name, content)
    write(folder / CONFIG, yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True).encode())
    write(folder / CARD, card(built).encode())


def load(folder: str | Path) -> Assembled:
    """The model of a checkpoint folder. ValueError when towers or weights are not the ones it was trained with."""
    recipe = recipe_of(Path(folder))
    if recipe.objectives:
        raise ValueError(
            f"{folder} is of the first stage, without a language model: `bridges retrieve {folder}` compares pictures "
            f"and texts, and a second stage with `start: {folder}` learns to talk"
        )
    built = build(recipe, fresh=False)
    fill(built, Path(folder))
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
    return built


def recipe_of(folder: Path) -> Recipe:
    """The recipe that a checkpoint was trained with."""
    config = read_config(folder)
    kept = {key: value for key, value in config.items() if key not in ("version", "towers")}
    recipe = recipe_from(kept, source=str(folder / CONFIG))
    recipe.start = None  # its weights come from here
    return recipe


def fill(built: Built, folder: Path) -> None:
    """Take the weights of a checkpoint, if its towers are these."""
    check_towers(folder, read_config(folder), built)
    load_weights(built.model.bridge, folder)
    if isinstance(built, Assembled) and built.recipe.lora is not None:
        load_adapter(built.model.language, folder)


def load_adapter(language: LanguageTower, folder: Path) -> None:
    """Into a tower that has one of this kind. ValueError where it is missing or does not fit."""
    weights = read_weights(folder, adapter.WEIGHTS)
    try:
        adapter.load_state(language, weights)
    except ValueError as error:
        raise ValueError(f"{folder / adapter.WEIGHTS} {error}") from error


def trained(built: Built) -> list[nn.Parameter]:
    """All that trains, known by place: the bridge, and the adapter of the language tower."""
    own = [p for p in built.model.bridge.parameters() if p.requires_grad]
    return own + (adapter.parameters(built.model.language) if isinstance(built, Assembled) else [])


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


def towers_of(built: Built) -> dict[str, VisionTower | LanguageTower]:
    """Its frozen towers by their names in a recipe."""
    language = {"language": built.model.language} if isinstance(built, Assembled) else {}
    return {"vision": built.model.vision, **language}


def check_towers(folder: Path, config: dict[str, Any], built: Built) -> None:
    """A bridge speaks only between the towers that it was trained with; a first stage had no language model."""
    for kind, tower in towers_of(built).items():
        was, now = config["towers"].get(kind), describe(tower)
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


def read_weights(folder: Path, name: str = WEIGHTS) -> dict[str, Tensor]:
    try:
        return load_file(folder / name)
    except FileNotFoundError:
        raise ValueError(f"no weights in {folder}: {name} is missing") from None
    except SafetensorError as error:
        raise ValueError(f"{folder / name} is broken ({error}); was the copy cut short?") from error


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
    kind = f"`{recipe.bridge['name']}`" + (" and LoRA on the language model" if recipe.lora else "")
    return (
        f"---\nlibrary_name: mm-bridges\nbase_model: [{', '.join(names)}]\n---\n\n"
        f"# A bridge {'from ' + ' to '.join(names) if len(names) > 1 else 'on ' + names[0]}\n\n"
        f"{kind}, {number:,} trained parameters, {built.model.bridge.shape()}, "
        f"{recipe.train.steps} steps of {recipe.train.batch} on `{recipe.data.source}`. "
        "The towers are frozen and not in here.\n\n"
        f"```\nbridges {'retrieve . --images FOLDER --text TEXT' if recipe.objectives else 'chat .'}\n```\n"
    )
