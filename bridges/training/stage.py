"""What a run trains, and on what: all in which a bridge to a language model and one that compares pairs differ."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridges.build import Assembled, Built, build, build_pairs
from bridges.config import Recipe
from bridges.data.batch import Batch, collate, rows_of
from bridges.data.conversation import Example
from bridges.data.pairs import pair_of
from bridges.data.pictures import MapStyle
from bridges.objectives.controls import CONTROLS, controlled
from bridges.objectives.language import language_loss
from bridges.objectives.pairs import PairObjective, held_out_pairs, pair_batch
from bridges.store import Store, open_store

Loss = Callable[[Any, Any], tuple[Tensor, dict[str, float]]]
Figures = dict[str, dict[str, float]]


@dataclass
class Stage:
    """The model, how examples become a batch of it, and what is minimised.

    `loss(model, batch)` is summed over the batch's targets; beside it stand its parts, if it has any.
    `held_out(batch)` measures, and changes nothing.
    """

    built: Built
    store: Store | None
    batch: Callable[[Sequence[Example]], Any]
    loss: Loss
    held_out: Callable[[Any], Figures]


def open_stage(recipe: Recipe) -> Stage:
    """The stage of a recipe. ValueError for anything in it that the user can mend."""
    if (best := recipe.train.best) and (best == "caption_nll") == bool(recipe.objectives):
        known = "recall@1, matching and captioning are" if recipe.objectives else "caption_nll is"
        raise ValueError(f"train.best {best} is not measured in this stage; {known}")
    if recipe.vision.cache and recipe.vision.lora:
        raise ValueError("vision.cache keeps what a frozen encoder sees, and vision.lora trains it: leave one out")
    return pair_stage(recipe) if recipe.objectives else language_stage(recipe)


def language_stage(recipe: Recipe) -> Stage:
    """The language model says what the assistant says."""
    assembled = build(recipe)
    if recipe.train.gradient_checkpointing:
        assembled.model.language.checkpoint_gradients()
    return stage_of(assembled)


def stage_of(assembled: Assembled) -> Stage:
    """Of a model that is built."""
    store = open_store(assembled)
    return Stage(
        assembled,
        store,
        lambda examples: make_batch(assembled, examples, store),
        said_loss,
        lambda batch: {"caption_nll": held_out_nll(assembled, batch)},
    )


def said_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """`language_loss`, which has no parts."""
    return language_loss(model, batch)[0], {}


def make_batch(
    assembled: Assembled, examples: Sequence[Example], store: Store | None = None, share: bool = True
) -> Batch:
    """Examples to tensors, with features where there is a store. Texts about the same pictures `share` a row, where the
    language model can. ValueError where no token of them is a target."""
    model, template, recipe = assembled
    share = share and model.language.shares(recipe.data.max_length)
    rows = [r for e in examples for r in rows_of(e, template, recipe.data.max_length, share)]
    batch = collate(rows, None if store else model.vision.preprocess)
    if not batch.num_targets:
        raise ValueError(
            "not one token of the first texts is a target: the assistant says nothing, or data.max_length cuts it off; "
            "look at them with `bridges inspect RECIPE`"
        )
    if store:
        batch.features = store([image for row in rows for image in row.images])
    return batch


@torch.no_grad()
def held_out_nll(assembled: Assembled, batch: Batch) -> dict[str, float]:
    """Held-out loss (nats a target) with the right pictures, each other's, and grey ones."""
    model, features = assembled.model, batch.features
    if features is None:
        assert batch.pixel_values is not None
        features = model.vision(batch.pixel_values)
    result = {}
    for control in CONTROLS:
        seen = Batch(**{**vars(batch), "pixel_values": None, "features": controlled(features, model.vision, control)})
        loss, targets = language_loss(model, seen)
        result[control] = float(loss) / targets
    return result


def pair_stage(recipe: Recipe) -> Stage:
    """Pictures and captions are compared, matched, and written, without a language model."""
    objective = PairObjective(recipe.objectives)
    if recipe.train.batch < 2:
        raise ValueError("train.batch 1: a pair alone has no negatives to be told from; give it at least 2")
    if recipe.train.micro_batch not in (None, recipe.train.batch):
        raise ValueError(
            "train.micro_batch: pairs are compared within a whole batch; leave it out, or lower train.batch"
        )
    if recipe.data.prefix:
        raise ValueError("data.prefix splits captions for a language model; pairs need whole ones: leave it out")
    paired = build_pairs(recipe)
    store = open_store(paired)
    return Stage(
        paired,
        store,
        lambda examples: pair_batch(paired.model, examples, store),
        lambda model, batch: model(objective, batch),
        lambda batch: held_out_pairs(paired.model, batch),
    )


def refuse_equal_captions(stage: Stage, data: MapStyle[Example]) -> None:
    """ValueError where pairs are to be told apart by their captions, and the captions of 32 of them are all equal."""
    if not stage.built.recipe.objectives:
        return
    captions = {pair_of(data[i * len(data) // 32])[1].strip().lower() for i in range(32)}
    if len(captions) == 1:
        raise ValueError(
            f"all captions are {captions.pop()!r}: pictures cannot be told apart by them; give each its own, "
            "or train with a language model"
        )
