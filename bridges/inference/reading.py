"""The language model over several texts end to end, each as if it stood alone, after one that was read before.

What was read before is kept once and copied for nobody, nothing is padded, and a text that has ended costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache

from bridges.data.template import Encoded
from bridges.inference.decoding import greedy
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
    cache = model.language.empty_cache()
    count = len(lines.ids)
    for index, (keys, values) in enumerate(kept.keys_values if kept else ()):  # a copy: a cache is changed in place
        cache.update(keys.expand(count, -1, -1, -1), values.expand(count, -1, -1, -1), index)
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


def speak(
    model: BridgedModel, found: Read, lines: Lines, longest: int, ended: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """The likeliest tokens after each text, in its line: `longest` of them or until it has `ended`."""
    rows, ends = lines.ends
    said: list[list[int]] = [[] for _ in rows]
    speaking, tokens = list(range(len(said))), greedy(found.logits)
    sees, positions = lines.sees[rows, ends], lines.positions[rows, ends]
    looks = found.sight and found.sight.mask[rows, 0, ends]
    while True:
        for text, token in zip(speaking, tokens.tolist(), strict=True):
            said[text].append(token)
        going = [place for place, text in enumerate(speaking) if not ended(said[text]) and len(said[text]) < longest]
        if not going:
            return said
        speaking = [speaking[place] for place in going]
        rows, tokens, positions = rows[going], tokens[going], positions[going] + 1
        columns = torch.cat([torch.arange(int(n), device=rows.device) for n in rows.bincount() if n])
        at, shape = (rows, columns), (len(lines.ids), int(columns.max()) + 1)  # the others of a line are padding
        sees = torch.cat([sees[going], F.one_hot(columns, shape[1]).bool()], dim=1)
        ids, places, mask = tokens.new_zeros(shape), positions.new_zeros(shape), sees.new_zeros(*shape, sees.shape[1])
        mask[..., -shape[1] :] = torch.eye(shape[1], dtype=torch.bool, device=mask.device)  # padding sees itself
        ids[at], places[at], mask[at] = tokens, positions, sees
        seen = None
        if found.sight and looks is not None:
            looks = looks[going]
            some = looks.new_zeros(*shape, looks.shape[1])
            some[at] = looks
            seen = Sight(found.sight.blocks, found.sight.seen, some[:, None])
        embeds = model.language.embed(ids)
        logits = model.language(embeds, additive(mask, model.language.dtype), places, at, found.cache, seen)
        tokens = greedy(logits)
