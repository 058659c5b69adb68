"""The language model over several texts, each as if it stood alone, after one that was read before.

What was read before is kept once, for all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from bridges.data.template import Encoded
from bridges.inference.decoding import Begun
from bridges.inference.features import Features
from bridges.inference.lines import Lines, lay
from bridges.inference.scoring import Tree
from bridges.model import BridgedModel
from bridges.sight import Sight, sight


@dataclass(frozen=True)
class Kept:
    """A text that was read: keys and values of each layer, where it looks, and what blocks see of its pictures."""

    keys_values: list[tuple[Tensor, Tensor]]
    looks: Int[Tensor, "1 t"]
    memory: Float[Tensor, "n m w"] | None

    def __len__(self) -> int:
        return self.looks.shape[1]


class Read(NamedTuple):
    """Logits where they tell something; the cache and the sight to go on with; the memory of the new pictures."""

    logits: Float[Tensor, "s vocab"]
    cache: Cache
    sight: Sight | None
    memory: Float[Tensor, "n m w"] | None


def read(
    model: BridgedModel, features: Features, texts: Sequence[Encoded], lines: Lines, kept: Kept | None = None
) -> Read:
    """Lines of texts, each after what is kept."""
    pictures = [image for text in texts for image in text.images]
    slots, memory = model.see(features=features(pictures), asked=[words for text in texts for words in text.asked])
    cache = model.language.cache_after(kept.keys_values) if kept else model.language.empty_cache()
    seen = sight_of(model, memory, lines, kept)
    embeds, mask = model.embed(lines.ids, slots), additive(lines.sees, model.language.dtype)
    logits = model.language(embeds, mask, lines.positions, lines.told, cache, seen)
    return Read(logits, cache, seen, memory)


def keep(model: BridgedModel, features: Features, text: Encoded) -> Kept:
    """Read a text once, for all that will follow it."""
    lines = lay([text], [Tree()], 0, features.device)
    found = read(model, features, [text], lines)
    layers: Any = found.cache.layers
    return Kept([(layer.keys, layer.values) for layer in layers], lines.looks, found.memory)


@torch.no_grad()
def begin_after(model: BridgedModel, features: Features, texts: Sequence[Encoded], kept: Kept) -> Begun:
    """Read each text for itself after what is kept; answers will follow."""
    lines = lay(texts, [Tree()] * len(texts), len(kept), features.device, room=0)
    found = read(model, features, texts, lines, kept)
    rows, ends = lines.told
    sight = found.sight and Sight(
        found.sight.blocks, found.sight.seen, found.sight.mask[rows[:, None], :, ends[:, None]]
    )
    return Begun(found.logits, found.cache, lines.sees[rows, ends].long(), lines.positions[rows, ends] + 1, sight)


def sight_of(model: BridgedModel, memory: Tensor | None, lines: Lines, kept: Kept | None) -> Sight | None:
    """What new columns see of the pictures of their own text, and of those before it as far as the bridge allows.

    Unless the bridge sees `all`, an older picture is seen only by what stands before the first of a text's own.
    """
    if not model.bridge.blocks:
        return None
    assert memory is not None, "blocks inside the language model need memory to read"
    count, width = lines.ids.shape
    if kept is None or kept.memory is None:
        return sight(model.bridge, memory, lines.looks, lines.sees[..., -width:])
    last = model.bridge.sees == "last"
    before = kept.memory[-1:] if last else kept.memory
    looks, memory = lines.looks + len(before), torch.cat([before, memory])
    if last:
        return sight(model.bridge, memory, looks, lines.sees[..., -width:])
    square = F.pad(lines.sees, (0, 0, len(kept), 0))
    return sight(model.bridge, memory, torch.cat([kept.looks.expand(count, -1), looks], dim=1), square).of(
        slice(len(kept), None)
    )


def additive(sees: Bool[Tensor, "b w all"], dtype: torch.dtype) -> Float[Tensor, "b 1 w all"]:
    """The mask that transformers takes: 0 where a column is seen."""
    blocked = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return rearrange(blocked.masked_fill_(~sees, torch.finfo(dtype).min), "b q k -> b 1 q k")
