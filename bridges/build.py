"""From a recipe to objects: two frozen towers, and a bridge in the state before its first step."""

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from bridges import adapter
from bridges.base import Bridge, bridge_class
from bridges.config import Lora, Recipe
from bridges.data.template import IMAGE_TOKEN_ID, Template
from bridges.interop.blip2 import is_blip2, read_blip2
from bridges.model import BridgedModel
from bridges.pairs import PairModel
from bridges.saved import check_towers, load_adapter, read_weights
from bridges.towers.encoder_decoder import language_tower
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower


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
    `dtype` is the towers', by default what the machine runs fastest.
    """
    vision = vision_tower(recipe, dtype)
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
    assembled = assemble(vision, bridge, language, recipe)
    for kind, lora in loras(recipe).items():
        adapter.attach(towers_of(assembled)[kind], lora)
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
    if recipe.lora is not None:
        raise ValueError("lora: there is no language model to put it on; leave it out for objectives")
    if recipe.vision.lora is not None:
        raise ValueError("vision.lora: pairs are told apart by what a frozen encoder sees; leave it out for objectives")
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


def vision_tower(recipe: Recipe, dtype: torch.dtype | None = None) -> VisionTower:
    chosen = recipe.vision
    return VisionTower(
        chosen.name,
        chosen.layer,
        chosen.keep_cls,
        chosen.revision,
        dtype,
        image_mode=chosen.image_mode,
        tiles=chosen.tiles,
        image_size=chosen.image_size,
    )


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


def start_from(start: str | None, built: Built) -> None:
    """Begin with the bridge of another checkpoint, if one is named: of this stage, or of one before."""
    if start is None:
        return
    folder = Path(start).expanduser()
    if is_blip2(folder):
        weights = read_blip2(folder)
    else:
        check_towers(folder, towers_of(built))
        weights = read_weights(folder)
    try:
        built.model.bridge.adopt(weights)
    except ValueError as error:
        raise ValueError(f"start {folder}: its bridge {error}") from error
    for kind, name in adapter.FOLDERS.items():
        if not (folder / name).is_dir():
            continue
        if kind not in loras(built.recipe):
            raise ValueError(
                f"start {folder}: its bridge was trained beside an adapter; give the recipe the same "
                f"{adapter.KEYS[kind]}, or fold it into the {kind} model first: bridges merge {folder} --output FOLDER"
            )
        load_adapter(towers_of(built)[kind], folder)


def loras(recipe: Recipe) -> dict[adapter.Kind, Lora]:
    """The adapters that a recipe asks for, by the name of their tower."""
    asked: dict[adapter.Kind, Lora | None] = {"language": recipe.lora, "vision": recipe.vision.lora}
    return {kind: lora for kind, lora in asked.items() if lora is not None}


def towers_of(built: Built) -> dict[str, VisionTower | LanguageTower]:
    """Its frozen towers by their names in a recipe."""
    language = {"language": built.model.language} if isinstance(built, Assembled) else {}
    return {"vision": built.model.vision, **language}


def trained(built: Built) -> list[nn.Parameter]:
    """All that trains, known by place: the bridge, and the adapters of the towers."""
    own = [p for p in built.model.bridge.parameters() if p.requires_grad]
    return own + [p for tower in towers_of(built).values() for p in adapter.parameters(tower)]
