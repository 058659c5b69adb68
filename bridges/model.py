"""The splice: slots of the bridge take the image's positions among the embeddings, and the language model reads on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import Cache

from bridges.base import Bridge, Visual
from bridges.layout import EVERYONES, PADDING, SHARED, attention_mask, contiguous, in_lines, needed, visible
from bridges.sight import Sight, check_looks, sight
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower

LONGEST_LINE = 1024  # tokens; longer rows are read as they are, without a mask of their square


@dataclass(frozen=True)
class Prefix:
    """What the language model keeps of text that stands before every row: computed once, since nothing in it trains."""

    ids: tuple[int, ...]
    keys_values: list[tuple[Tensor, Tensor]]


class BridgedModel(nn.Module):
    """A frozen vision tower, a bridge, a frozen language tower.

    All that trains is under `bridge`, and in the `adapters` of the towers, if they have any.
    """

    def __init__(self, vision: VisionTower, bridge: Bridge, language: LanguageTower, image_token_id: int) -> None:
        super().__init__()
        self.vision, self.bridge, self.language = vision, bridge, language
        self.image_token_id = image_token_id
        self.keeps_prefix = True
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
        check_looks(self.bridge, memory, looks)
        common = self._common_text(input_ids, segments, positions, at, looks)
        shared = common if self._prefix_is_constant() else 0
        kept = needed(segments, at)
        kept[:, :common] = False
        short = segments.shape[1] <= LONGEST_LINE and self.language.shares(int(positions.max()) + 1)
        if short and kept.any() and not kept[:, shared:].all():
            return self._read_in_lines(kept, embeds, input_ids, segments, positions, at, common, shared, memory, looks)
        cache = self._prefix_cache(input_ids[0, :shared], len(input_ids)) if shared else None
        return self._read(embeds, segments, positions, at, shared, cache, self.sight(memory, looks, segments))

    def _read_in_lines(
        self,
        kept: Bool[Tensor, "b t"],
        embeds: Float[Tensor, "b t d"],
        input_ids: Int[Tensor, "b t"],
        segments: Int[Tensor, "b t"],
        positions: Int[Tensor, "b t"],
        at: tuple[Int[Tensor, "s"], Int[Tensor, "s"]],
        common: int,
        cached: int,
        memory: Float[Tensor, "n m w"] | None,
        looks: Int[Tensor, "b t"] | None,
    ) -> Float[Tensor, "s vocab"]:
        """The language model over rows end to end in a few lines, so that little is padded: the same logits from fewer
        tokens. Only positions that are `kept` are read, and the first `common` ones of all rows once: from a cache, or,
        where they have a part in the gradient, at the beginning of each line."""
        first = common - cached
        index = in_lines(kept.sum(1).tolist(), self.language.dim, first).to(kept.device)
        index = torch.where(index < 0, index, kept.flatten().nonzero()[:, 0][index])  # of the kept -> of all positions
        index = torch.cat([torch.arange(first, device=kept.device).expand(len(index), -1), index], dim=1)
        padding = index < 0

        def line(x: Tensor, fill: int) -> Tensor:
            return x.flatten(0, 1)[index].masked_fill(padding, fill)

        rows, texts = torch.where(padding, -1, index // kept.shape[1]), line(segments, PADDING)
        rows[:, :first] = EVERYONES
        mask = attention_mask(texts, self.language.dtype, rows=rows)
        mask = F.pad(mask, (cached, 0))  # the cached prefix is everyone's
        place = torch.zeros(kept.numel(), dtype=torch.long, device=kept.device)
        place[index[~padding]] = torch.arange(index.numel(), device=kept.device)[~padding.flatten()]
        place = rearrange(place, "(b t) -> b t", b=len(kept))[at]
        cache = self._prefix_cache(input_ids[0, :cached], len(index)) if cached else None
        sight = self.sight(memory, None if looks is None else line(looks, 0), texts, rows)
        at = (place // index.shape[1], place % index.shape[1])
        return self.language(embeds.flatten(0, 1)[index], mask, line(positions, 0), at, cache, sight)

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
        check_looks(self.bridge, memory, looks)
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
        """How many first columns are the same text in every row, if their keys and values are a constant."""
        return self._common_text(input_ids, segments, positions, at) if self._prefix_is_constant() else 0

    def _prefix_is_constant(self) -> bool:
        """Blocks and adapters train, and work on all text; and what is computed again would be cached again."""
        trains = self.bridge.blocks or (self.language.adapters and torch.is_grad_enabled())
        return not trains and not self.language.gradient_checkpointing

    def _common_text(
        self,
        input_ids: Tensor,
        segments: Tensor,
        positions: Tensor,
        at: tuple[Tensor, Tensor],
        looks: Tensor | None = None,
    ) -> int:
        """How many first columns are the same text in every row, before any picture and any of the positions `at`."""
        if not self.keeps_prefix or not self.language.shares(int(positions.max()) + 1):
            return 0
        same = (input_ids == input_ids[0]) & (input_ids != self.image_token_id) & (segments == SHARED)
        if self.bridge.blocks and looks is not None:  # a picture's tag is words there
            same &= looks == 0
        length = int(same.all(0).long().cumprod(0).sum())
        length = min([length, int(at[1].min())] if len(at[1]) else [length])
        return length if length < input_ids.shape[1] else 0

    @torch.no_grad()
    def _prefix_cache(self, ids: Int[Tensor, "p"], rows: int) -> Cache:
        """A fresh cache that holds the prefix for each of `rows` rows.

        Its content is kept from call to call, but where an adapter may have been trained in between.
        """
        key = tuple(ids.tolist())
        if self._prefix.ids != key or self.language.adapters:
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
