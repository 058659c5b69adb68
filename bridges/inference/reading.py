"""The language model over several texts end to end, each as if it stood alone, after one that was read before.

What was read before is kept once and copied for nobody, nothing is padded, and a text that has ended costs nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
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


def evenly(count: int, most: int) -> int:
    """How many of `count` at once, `most` at most, so that no few are left over in the end."""
    return ceil(count / max(1, ceil(count / most)))


def parts(sizes: Sequence[int], most: int, longest: int | float, more: int, room: int | float) -> list[slice]:
    """Which texts stand together: about equally many, `most` at most, with `longest` tokens in all at most.

    After each of them `more` tokens may follow, with which they still fit the `room`.
    """
    starts, together = [0], evenly(len(sizes), most)
    for place in range(1, len(sizes)):
        count, columns = place + 1 - starts[-1], sum(sizes[starts[-1] : place + 1])
        if count > together or columns > longest or columns + count * more > room:
            starts.append(place)
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(sizes)], strict=True)] if sizes else []


@dataclass(frozen=True)
class Line:
    """Texts, each followed by the inner nodes of its tree. Two texts after one kept column, the first with two nodes:

            kept | a  b  cat car | c        a   sees  x | x . . . | .
                                            b         x | x x . . | .
                                            cat       x | x x x . | .
                                            car       x | x x . x | .
                                            c         x | . . . . | x

    `told` are the columns whose logits tell the next token, the last of each text (also in `ends`) and its nodes.
    """

    ids: Int[Tensor, "1 w"]
    positions: Int[Tensor, "1 w"]
    looks: Int[Tensor, "1 w"]
    sees: Bool[Tensor, "1 w all"]
    told: list[int]
    ends: list[int]


def lay(texts: Sequence[Encoded], trees: Sequence[Tree], before: int, device: torch.device) -> Line:
    """Texts in a line after `before` kept columns; their pictures are numbered through all."""
    ids, positions, looks, told, ends = [], [], [], [], []
    pictures = [0, *accumulate(len(text.images) for text in texts)]
    width = sum(len(text.ids) + len(tree.inner) for text, tree in zip(texts, trees, strict=True))
    sees = torch.zeros(width, width, dtype=torch.bool)
    for text, tree, first in zip(texts, trees, pictures, strict=False):
        start, size = len(ids), len(text.ids)
        place = {node: start + size + number for number, node in enumerate(tree.inner)}
        sees[start : start + size, start : start + size] = torch.ones(size, size, dtype=torch.bool).tril()
        depths = []
        for node, column in place.items():
            chain = [place[above] for above in tree.ancestors(node)]
            sees[column, [*range(start, start + size), *chain]] = True
            depths.append(before + size + len(chain) - 1)
        ids += [*text.ids, *(tree.tokens[node] for node in place)]
        positions += [*range(before, before + size), *depths]
        own = [look + first * (look > 0) for look in text.looks]
        looks += own + own[-1:] * len(place)
        ends.append(start + size - 1)
        told += [ends[-1], *place.values()]
    one, two, three = (torch.tensor([values], device=device) for values in (ids, positions, looks))
    return Line(one, two, three, F.pad(sees, (before, 0), value=True)[None].to(device), told, ends)


class Read(NamedTuple):
    """Logits where they tell something; the cache and the sight to go on with; the memory of the new pictures."""

    logits: Float[Tensor, "s vocab"]
    cache: Cache
    sight: Sight | None
    memory: Float[Tensor, "n m w"] | None


def read(
    model: BridgedModel, features: Features, texts: Sequence[Encoded], line: Line, kept: Kept | None = None
) -> Read:
    """A line of texts, after what is kept."""
    pictures = [image for text in texts for image in text.images]
    slots, memory = model.see(features=features(pictures), asked=[words for text in texts for words in text.asked])
    cache = model.language.empty_cache()
    for index, (keys, values) in enumerate(kept.keys_values if kept else ()):  # a copy: a cache is changed in place
        cache.update(keys, values, index)
    seen = sight_of(model, memory, line, kept)
    columns = torch.tensor(line.told, device=line.ids.device)
    embeds, mask = model.embed(line.ids, slots), additive(line.sees, model.language.dtype)
    logits = model.language(embeds, mask, line.positions, (torch.zeros_like(columns), columns), cache, seen)
    return Read(logits, cache, seen, memory)


def keep(model: BridgedModel, features: Features, text: Encoded) -> Kept:
    """Read a text once, for all that will follow it."""
    line = lay([text], [Tree()], 0, features.device)
    found = read(model, features, [text], line)
    layers: Any = found.cache.layers
    return Kept([(layer.keys, layer.values) for layer in layers], line.looks, found.memory)


def sight_of(model: BridgedModel, memory: Tensor | None, line: Line, kept: Kept | None) -> Sight | None:
    """What new columns see of the pictures of their own text, and of those before it as far as the bridge allows.

    Unless the bridge sees `all`, an older picture is seen only by what stands before the first of a text's own.
    """
    if not model.bridge.blocks:
        return None
    assert memory is not None, "blocks inside the language model need memory to read"
    width = line.ids.shape[1]
    if kept is None or kept.memory is None:
        return sight(model.bridge, memory, line.looks, line.sees[..., -width:])
    looks, memory = line.looks + len(kept.memory), torch.cat([kept.memory, memory])
    if model.bridge.sees == "last":
        return sight(model.bridge, memory, looks, line.sees[..., -width:])
    square = F.pad(line.sees, (0, 0, len(kept), 0))
    return sight(model.bridge, memory, torch.cat([kept.looks, looks], dim=1), square).of(slice(len(kept), None))


def additive(sees: Bool[Tensor, "1 w all"], dtype: torch.dtype) -> Float[Tensor, "1 1 w all"]:
    """The mask that transformers takes: 0 where a column is seen."""
    blocked = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return rearrange(blocked.masked_fill_(~sees, torch.finfo(dtype).min), "b q k -> b 1 q k")


def speak(
    model: BridgedModel, found: Read, line: Line, longest: int, ended: Callable[[Sequence[int]], bool]
) -> list[list[int]]:
    """The likeliest tokens after each text of a line, `longest` of them or until it has `ended`."""
    said: list[list[int]] = [[] for _ in line.ends]
    speaking, tokens = list(range(len(said))), greedy(found.logits)
    ends = torch.tensor(line.ends, device=line.ids.device)
    sees, positions = line.sees[0, ends], line.positions[0, ends]
    while True:
        for text, token in zip(speaking, tokens.tolist(), strict=True):
            said[text].append(token)
        going = [place for place, text in enumerate(speaking) if not ended(said[text]) and len(said[text]) < longest]
        if not going:
            return said
        speaking = [speaking[place] for place in going]
        places = torch.arange(len(going), device=ends.device)
        ends, tokens, positions = ends[going], tokens[going][None], positions[going] + 1
        sees = torch.cat([sees[going], torch.eye(len(going), dtype=torch.bool, device=sees.device)], dim=1)
        seen = found.sight and Sight(found.sight.blocks, found.sight.seen, found.sight.mask[:, :, ends])
        mask, at = additive(sees[None], model.language.dtype), (torch.zeros_like(places), places)
        logits = model.language(model.language.embed(tokens), mask, positions[None], at, found.cache, seen)
        tokens = greedy(logits)
