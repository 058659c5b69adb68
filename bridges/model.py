"""The splice: slots of the bridge take the image's positions among the embeddings, and the language model reads on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from bridges.base import Bridge, Visual
from bridges.sight import Sight, sight
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

PADDING = -1
SHARED = 0
LONGEST_LINE = 1024  # tokens; beyond it the blocks of the mask that nobody sees cost more than padding


@dataclass(frozen=True)
class Prefix:
    """What the language model keeps of text that stands before every row: computed once, since nothing in it trains."""

    ids: tuple[int, ...]
    keys_values: list[tuple[Tensor, Tensor]]


class BridgedModel(nn.Module):
    """A frozen vision tower, a bridge, a frozen language tower. All that trains is under `bridge`."""

    def __init__(self, vision: VisionTower, bridge: Bridge, language: LanguageTower, image_token_id: int) -> None:
        super().__init__()
        self.vision, self.bridge, self.language = vision, bridge, language
        self.image_token_id = image_token_id
        self._prefix = Prefix((), [])

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        segments: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]],
        pixel_values: Float[Tensor, "n 3 y x"] | None = None,
        features: Float[Tensor, "n p v"] | None = None,
        asked: Sequence[str] = (),
        looks: Int[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "s vocab"]:
        """Logits after the positions `at`. Images are pixels or vision features, those of all rows in reading order.

        `asked` is what is asked about each, where the bridge reads that; `looks` the number of the last image before
        each position, where blocks of the bridge stand in the language model.
        """
        slots, memory = self.see(pixel_values, features, asked)
        embeds = self.embed(input_ids, slots)
        shared = self._constant_prefix(input_ids, segments, positions, at)
        kept = segments != PADDING
        if not kept.all() and int(kept.sum()) <= LONGEST_LINE and self.language.shares(int(positions.max()) + 1):
            return self._read_in_line(embeds, input_ids, segments, positions, at, shared, memory, looks)
        cache = self._prefix_cache(input_ids[0, :shared], len(input_ids)) if shared else None
        return self._read(embeds, segments, positions, at, shared, cache, self.sight(memory, looks, segments))

    def _read_in_line(
        self,
        embeds: Float[Tensor, "b t d"],
        input_ids: Int[Tensor, "b t"],
        segments: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]],
        cached: int,
        memory: Float[Tensor, "n m w"] | None,
        looks: Int[Tensor, "b t"] | None,
    ) -> Float[Tensor, "s vocab"]:
        """The language model over all rows end to end, so that nothing is padded: the same logits from fewer tokens."""
        kept = segments != PADDING
        kept[:, :cached] = False
        rows, _ = kept.nonzero(as_tuple=True)
        mask = attention_mask(segments[kept][None], self.language.dtype, rows=rows[None])
        mask = F.pad(mask, (cached, 0))  # the cached prefix is everyone's
        place = rearrange(rearrange(kept, "b t -> (b t)").cumsum(0) - 1, "(b t) -> b t", b=len(kept))[at]
        cache = self._prefix_cache(input_ids[0, :cached], 1) if cached else None
        sight = self.sight(memory, None if looks is None else looks[kept][None], segments[kept][None], rows[None])
        at = (torch.zeros_like(place), place)
        return self.language(embeds[kept][None], mask, positions[kept][None], at, cache, sight)

    def prefill(
        self,
        input_ids: Int[Tensor, "b t"],
        segments: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        pixel_values: Float[Tensor, "n 3 y x"] | None = None,
        features: Float[Tensor, "n p v"] | None = None,
        asked: Sequence[str] = (),
        looks: Int[Tensor, "b t"] | None = None,
    ) -> tuple[Float[Tensor, "b vocab"], Cache, Sight | None]:
        """Logits after the last column (rows end there), and the cache and the sight to go on with."""
        slots, memory = self.see(pixel_values, features, asked)
        embeds = self.embed(input_ids, slots)
        rows = torch.arange(len(input_ids), device=input_ids.device)
        at = (rows, torch.full_like(rows, input_ids.shape[1] - 1))
        shared = self._constant_prefix(input_ids, segments, positions, at)
        cache = self._prefix_cache(input_ids[0, :shared], len(rows)) if shared else self.language.empty_cache()
        sight = self.sight(memory, looks, segments)
        logits = self._read(embeds, segments, positions, at, shared, cache, sight)
        return logits, cache, sight.of(slice(-1, None)) if sight else None

    def sight(
        self,
        memory: Float[Tensor, "n m w"] | None,
        looks: Int[Tensor, "b t"] | None,
        segments: Int[Tensor, "b t"],
        rows: Int[Tensor, "b t"] | None = None,
    ) -> Sight | None:
        """Who sees which picture inside the language model; None where the bridge has no blocks there."""
        if not self.bridge.blocks:
            return None
        assert memory is not None, "blocks inside the language model need memory to read"
        assert looks is not None, "blocks inside the language model need to know where the pictures stand"
        return sight(self.bridge, memory, looks, visible(segments, rows))

    def _read(
        self,
        embeds: Float[Tensor, "b t d"],
        segments: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]],
        cached: int,
        cache: Cache | None,
        sight: Sight | None,
    ) -> Float[Tensor, "s vocab"]:
        """The language model over the columns that are not cached yet."""
        longest = int(positions.max()) + 1
        if not self.language.shares(longest) and not contiguous(segments):
            raise ValueError(
                f"{self.language.name} cannot read texts of {longest} tokens packed, or padded amid a row: it has no "
                f"positions to restart, or its window of {self.language.window} is shorter; give it plain rows"
            )
        mask = attention_mask(segments, self.language.dtype, skip=cached)
        rows, columns = at
        return self.language(embeds[:, cached:], mask, positions[:, cached:], (rows, columns - cached), cache, sight)

    def see(
        self,
        pixel_values: Float[Tensor, "n 3 y x"] | None = None,
        features: Float[Tensor, "n p v"] | None = None,
        asked: Sequence[str] = (),
    ) -> Visual:
        """What the bridge makes of images, in its own precision.

        It runs even where there is no image, so that every process of a parallel run has it in its graph.
        """
        weight = next(self.bridge.parameters())
        if pixel_values is None:
            pixel_values = self.vision.preprocess([])
        seen: Tensor = self.vision(pixel_values.to(weight.device)) if features is None else features
        seen = seen.to(weight.device, weight.dtype)
        return self.bridge(seen, asked) if self.bridge.reads_instructions else self.bridge(seen)

    def embed(self, input_ids: Int[Tensor, "b t"], slots: Float[Tensor, "n k d"]) -> Float[Tensor, "b t d"]:
        """Token embeddings with the images' slots in their places."""
        is_image = input_ids == self.image_token_id
        text = self.language.embed(input_ids.masked_fill(is_image, 0))
        return fill_slots(text, is_image, slots.to(text.dtype))

    def _constant_prefix(
        self, input_ids: Tensor, segments: Tensor, positions: Tensor, at: tuple[Tensor, Tensor]
    ) -> int:
        """How many first columns are the same text in every row, so that their keys and values are a constant."""
        if self.bridge.blocks or not self.language.shares(int(positions.max()) + 1):
            return 0  # blocks train, and work on all text
        same = (input_ids == input_ids[0]) & (input_ids != self.image_token_id) & (segments == SHARED)
        length = int(same.all(0).long().cumprod(0).sum())
        length = min([length, int(at[1].min())] if len(at[1]) else [length])
        return length if length < input_ids.shape[1] else 0

    @torch.no_grad()
    def _prefix_cache(self, ids: Int[Tensor, "p"], rows: int) -> Cache:
        """A fresh cache that holds the prefix for each of `rows` rows; its content is kept from step to step."""
        key = tuple(ids.tolist())
        if self._prefix.ids != key:
            cache = self.language.empty_cache()
            steps = torch.arange(len(ids), device=ids.device)[None]
            none = ids.new_zeros(0)
            self.language(self.language.embed(ids[None]), torch.ones_like(ids[None]), steps, (none, none), cache)
            layers: Any = cache.layers
            self._prefix = Prefix(key, [(layer.keys, layer.values) for layer in layers])
        cache = self.language.empty_cache()
        for index, (keys, values) in enumerate(self._prefix.keys_values):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return cache


def fill_slots(
    embeds: Float[Tensor, "b t d"], is_image: Bool[Tensor, "b t"], slots: Float[Tensor, "n k d"]
) -> Float[Tensor, "b t d"]:
    """The j-th image position of the batch takes the j-th slot. ValueError unless their numbers are equal."""
    places, given = int(is_image.sum()), slots.shape[0] * slots.shape[1]
    if places != given:
        raise ValueError(
            f"the text has {places} image positions, but {slots.shape[0]} images x {slots.shape[1]} slots = {given}; "
            "each image needs one marker in the text, and each marker an image"
        )
    if not slots.shape[1]:  # and no graph for the layers before the first block
        return embeds
    rows, columns = is_image.nonzero(as_tuple=True)
    return embeds.index_put((rows, columns), rearrange(slots, "n k d -> (n k) d"))


def attention_mask(
    segments: Int[Tensor, "b t"], dtype: torch.dtype, skip: int = 0, rows: Int[Tensor, "b t"] | None = None
) -> Tensor:
    """Who sees whom, from the segments alone: 0 is shared by the row, 1, 2, … are its texts, -1 is padding.

    A position sees itself, what is shared and what belongs to its own text, never ahead. With two texts:

        segment   0 0 1 1 2 2 -
                0 x . . . . . .
                0 x x . . . . .
                1 x x x . . . .
                1 x x x x . . .
                2 x x . . x . .
                2 x x . . x x .
                - x x . . . . x

    Plain rows get the usual `b t` mask (1 = token, 0 = padding), others an additive `b 1 t t` one.
    `skip` leaves out the queries of as many first columns (their keys and values are cached).
    `rows` says of which row a position is, where several stand end to end: they do not see each other.
    """
    if rows is None and int(segments.max()) <= 1:
        return (segments != PADDING).long()
    sees = visible(segments, rows)
    blocked = torch.zeros(sees.shape, dtype=dtype, device=segments.device)
    blocked.masked_fill_(~sees, torch.finfo(dtype).min)
    return rearrange(blocked, "b q k -> b 1 q k")[:, :, skip:]


def visible(segments: Int[Tensor, "b t"], rows: Int[Tensor, "b t"] | None = None) -> Bool[Tensor, "b t t"]:
    """The crosses of `attention_mask`."""
    query, key = rearrange(segments, "b t -> b t 1"), rearrange(segments, "b t -> b 1 t")
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    sees = ((key == query) | (key == SHARED)) & causal
    return sees if rows is None else sees & (rearrange(rows, "b t -> b t 1") == rearrange(rows, "b t -> b 1 t"))


def contiguous(segments: Int[Tensor, "b t"]) -> bool:
    """Whether every row is one text, with padding on one side only: then columns are as far apart as positions."""
    padding = segments == PADDING
    return bool((segments <= SHARED).all() and ((padding[:, 1:] != padding[:, :-1]).sum(1) <= 1).all())


def predecessors(segments: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The column whose logits predict each position: the one before it in its own text.

    The first position of a text follows the last shared one:   segment  0 0 1 1 2 2   ->   0 0 1 2 1 4
    """
    columns = repeat(torch.arange(segments.shape[1], device=segments.device), "t -> b t", b=len(segments))
    last_shared = torch.where(segments == SHARED, columns, 0).amax(1, keepdim=True)
    starts = segments != segments.roll(1, dims=1)
    return torch.where(starts & (segments > 1), last_shared, (columns - 1).clamp(min=0))
