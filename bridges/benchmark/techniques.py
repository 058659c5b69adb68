"""What spares this toolkit work in training, each to be switched off, to see what it gives; none changes the loss."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridges import model as splice
from bridges.build import Assembled
from bridges.data.batch import Batch
from bridges.data.template import IGNORE_INDEX
from bridges.layout import PADDING, predecessors
from bridges.store import Store
from bridges.training.stage import Stage, make_batch


def batches(stage: Stage, share: bool = True) -> None:
    """Make them anew, of what the stage has now."""
    assert isinstance(stage.built, Assembled)
    stage.batch = partial(make_batch, stage.built, store=stage.store, share=share)


def without_cache(stage: Stage) -> None:
    stage.store = None
    batches(stage)


def without_prefix(stage: Stage) -> None:
    whole: Any = stage.built.model
    whole.keeps_prefix = False


def without_sharing(stage: Stage) -> None:
    batches(stage, share=False)


def without_lines(stage: Stage) -> None:  # noqa: ARG001  the others change the stage
    splice.LONGEST_LINE = 0


def with_all_logits(stage: Stage) -> None:
    stage.loss = loss_of_all_logits


def with_whole_graph(stage: Stage) -> None:
    built: Any = stage.built
    built.model.language.model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_())


TECHNIQUES: dict[str, tuple[str, Callable[[Stage], None]]] = {
    "cache": ("features from disk", without_cache),
    "prefix": ("the constant prefix kept", without_prefix),
    "sharing": ("texts sharing a picture's row", without_sharing),
    "lines": ("rows end to end", without_lines),
    "logits": ("logits only where something is learnt", with_all_logits),
    "graph": ("no gradient below the slots", with_whole_graph),
}
"""What each is, and how a stage does without. `cache` is one where the recipe has vision.cache."""
OURS = ["ours", "plain", *(f"{which}-{name}" for name in TECHNIQUES for which in ("no", "only"))]
"""With all, with none, without one, with one alone."""


def left_out(name: str) -> list[str]:
    """The techniques that a contestant of `OURS` does without."""
    which, _, chosen = name.partition("-")
    if which == "no":
        return [chosen]
    return [] if which == "ours" else [technique for technique in TECHNIQUES if technique != chosen]


def told(name: str) -> str:
    """A contestant of `OURS` in words."""
    which, _, chosen = name.partition("-")
    if not chosen:
        return {"ours": "this toolkit", "plain": "ours, nothing spared"}[which]
    return f"ours, {'without' if which == 'no' else 'only with'} {TECHNIQUES[chosen][0]}"


def settle(stage: Stage, name: str) -> None:
    """Leave out what this contestant does without. The features that it keeps are in a folder of its own."""
    if stage.store is not None:
        model, recipe = stage.built.model, stage.built.recipe
        folder = Path(recipe.output) / name
        stage.store = Store(model.vision, model.bridge, stage.store.form, stage.store.budget, folder)
        batches(stage)
    for technique in left_out(name):
        TECHNIQUES[technique][1](stage)


def loss_of_all_logits(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """The same loss, with the head, and all layers, over every token."""
    at = (batch.segments != PADDING).nonzero(as_tuple=True)
    rows, columns = (batch.labels != IGNORE_INDEX).nonzero(as_tuple=True)
    images = (batch.pixel_values, batch.features, batch.asked, batch.looks)
    logits = model(batch.input_ids, batch.segments, batch.positions, at, *images)
    place = torch.zeros_like(batch.input_ids)
    place[at] = torch.arange(len(at[0]), device=place.device)
    said = logits[place[rows, predecessors(batch.segments)[rows, columns]]]
    said = said.to(torch.promote_types(said.dtype, torch.float32))
    return F.cross_entropy(said, batch.labels[rows, columns], reduction="sum"), {}
