"""BLIP-2's first stage (arXiv 2301.12597, section 3.1): any weighted subset of its objectives in one pass."""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from bridges.data.conversation import Example
from bridges.data.pairs import PairBatch, collate_pairs, pair_of
from bridges.layers import KeysValues, apart
from bridges.objectives.captioning import SMOOTHING, captioning_loss
from bridges.objectives.contrastive import Compared, contrastive_loss, embed_images, embed_texts, sigmoid_loss
from bridges.objectives.gather import total
from bridges.objectives.matching import matching_loss
from bridges.pairs import PairModel
from bridges.qformer import Memory, QFormer

NAMES = ("contrastive", "sigmoid", "matching", "captioning")


class PairObjective:
    """`weights` of `contrastive`, `sigmoid`, `matching` and `captioning`, as many of them as are wanted.

    Raises ValueError for another name, or a weight that is not above 0.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        for name, weight in weights.items():
            if name not in NAMES:
                near = get_close_matches(name, NAMES, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}"
                raise ValueError(f"no objective {name!r}: {hint}")
            if weight <= 0:
                raise ValueError(f"objectives.{name} has weight {weight}; give it one above 0, or leave it out")
        self.weights = dict(weights)

    def __call__(self, model: PairModel, batch: PairBatch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The weighted loss, summed over the pairs of this process, and each part as a mean over them."""
        bridge = model.bridge
        assert isinstance(bridge, QFormer)
        features = seen(model, batch)
        memory = bridge.look(features)
        compared, kept = compare(bridge, memory, batch)
        parts: dict[str, Tensor] = {}
        if "contrastive" in self.weights:
            parts["contrastive"] = contrastive_loss(compared, bridge.heads)
        if "sigmoid" in self.weights:
            parts["sigmoid"] = sigmoid_loss(compared, bridge.heads)
        if "matching" in self.weights:
            parts["matching"], _, _ = matching_loss(bridge, features, memory, batch.ids, batch.real, compared)
        if "captioning" in self.weights:
            nats, tokens = captioning_loss(bridge, kept, batch.ids, batch.real, SMOOTHING)
            counts = total(torch.tensor([len(batch.ids), tokens], dtype=torch.float64, device=nats.device))
            parts["captioning"] = nats * float(counts[0] / counts[1])
        loss = torch.stack([self.weights[name] * part for name, part in parts.items()]).sum()
        return loss, {name: float(part.detach()) / len(batch.ids) for name, part in parts.items()}


def pair_batch(
    model: PairModel,
    examples: Sequence[Example],
    see: Callable[[Sequence[Image.Image]], Float[Tensor, "n p v"]] | None = None,
) -> PairBatch:
    """Examples to tensors, with the words of the bridge; with features of the pictures, where something can `see` them.

    ValueError where one is no picture with a caption.
    """
    bridge, pairs = model.bridge, [pair_of(e) for e in examples]
    assert isinstance(bridge, QFormer)
    batch = collate_pairs(pairs, bridge.words, None if see else model.vision.preprocess)
    if see:
        batch.features = see([picture for picture, _, _ in pairs])
    return batch


def seen(model: PairModel, batch: PairBatch) -> Float[Tensor, "b p v"]:
    """Vision features of a batch, in the precision of the bridge."""
    if batch.features is not None:
        return batch.features
    assert batch.pixel_values is not None
    return model.vision(batch.pixel_values).to(next(model.bridge.parameters()).dtype)


def compare(bridge: QFormer, memory: Memory, batch: PairBatch) -> tuple[Compared, list[KeysValues]]:
    """Pictures and captions, each embedded without sight of the other, in one pass; and what it kept."""
    hidden, kept = bridge.run(memory, batch.ids, apart(bridge.num_slots, batch.real))
    queries, first = hidden[:, : bridge.num_slots], hidden[:, bridge.num_slots]
    images, texts = embed_images(bridge.heads, queries), embed_texts(bridge.heads, first)
    return Compared(images, texts, batch.pictures, batch.captions), kept


@torch.no_grad()
def held_out_pairs(model: PairModel, batch: PairBatch) -> dict[str, dict[str, float]]:
    """How well held-out pairs find each other in this batch, are told from hard negatives, and are written.

    Each beside what a guess would give: one in the number of pairs, the more frequent answer, every word alike.
    """
    bridge = model.bridge
    assert isinstance(bridge, QFormer)
    features = seen(model, batch)
    memory = bridge.look(features)
    compared, kept = compare(bridge, memory, batch)
    nearest = compared.to_texts.argmax(1, keepdim=True)
    found = (compared.own | ~compared.negative).gather(1, nearest)  # an equal caption is as good
    _, difference, true = matching_loss(bridge, features, memory, batch.ids, batch.real, compared)
    nats, tokens = captioning_loss(bridge, kept, batch.ids, batch.real, 0.0)
    return {
        "recall@1": {"image": float(found.float().mean()), "chance": 1 / len(batch.ids)},
        "matching": {
            "image": float(((difference > 0) == true).float().mean()),
            "majority": 1 - float(true.float().mean()),
        },
        "captioning": {"image": float(nats) / max(1, tokens), "chance": math.log(bridge.words.size)},
    }
