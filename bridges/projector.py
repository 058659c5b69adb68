"""Projection: every patch, or every merged group of patches, is mapped to the language model's width by itself.

Linear as in MiniGPT-4 (arXiv 2304.10592) and LLaVA (2304.08485), MLP as in LLaVA-1.5 (2310.03744), strips of four as in
MiniGPT-v2 (2310.09478), pixel shuffle as in Idefics3 (2408.12637), average pooling as in LLaVA-NeXT's video models.
"""

import math
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from bridges.base import Bridge, Visual

Merge = Literal["none", "average", "shuffle", "strip"]


class Projector(Bridge):
    """`merge` patches, optionally normalise them, then `depth` linear layers with exact GELU in between.

    merge:  `none`     one slot a patch
            `average`  pooled onto a `factor` x `factor` grid, whatever the grid of patches
            `shuffle`  each `factor` x `factor` block becomes one slot, its channels side by side
            `strip`    each `factor` patches in reading order become one slot, their channels side by side
    Raises ValueError where the grid is not square or `factor` does not fit it.
    """

    def __init__(
        self,
        vision_dim: int,
        num_patches: int,
        language_dim: int,
        num_layers: int,  # noqa: ARG002  the contract's; projections do not reach into the language model
        *,
        depth: int = 1,
        merge: Merge = "none",
        factor: int = 2,
        norm: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth {depth} of the projector: it needs at least one linear layer")
        self.merge: Merge = merge
        self.factor = factor
        self.num_slots = num_slots(num_patches, merge, factor)
        self.width = vision_dim * channels_merged(merge, factor)
        widths = [self.width] + [language_dim] * depth
        layers: list[nn.Module] = [nn.Linear(a, b, bias=bias) for a, b in pairwise(widths)]
        for place in range(depth - 1, 0, -1):
            layers.insert(place, nn.GELU())
        self.norm = nn.LayerNorm(self.width) if norm else nn.Identity()
        self.layers = nn.Sequential(*layers)

    @property
    def last(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[-1])

    def match_scale(self, embedding_rms: float) -> None:
        """Slots start at the RMS of the token embeddings: whatever comes in with `norm`, for unit RMS without."""
        last = self.last
        with torch.no_grad():  # the layers before shrink what they are given, so the last makes up for it
            inner = self.layers[:-1](torch.randn(256, self.width)).pow(2).mean().sqrt().item()
        nn.init.normal_(last.weight, std=embedding_rms / (inner * math.sqrt(last.in_features)))
        if last.bias is not None:
            nn.init.zeros_(last.bias)

    def reduced(self, features: Float[Tensor, "n p v"]) -> Float[Tensor, "n q v"]:
        """A grid that is pooled already is pooled onto itself."""
        return merge_patches(features, self.merge, self.factor) if self.merge == "average" else features

    def forward(self, features: Float[Tensor, "n p v"]) -> Visual:
        return Visual(self.layers(self.norm(merge_patches(features, self.merge, self.factor))))


def num_slots(num_patches: int, merge: Merge, factor: int) -> int:
    """Slots of an image of `num_patches` patches: a pure function, so text can be laid out before any image is seen."""
    if merge not in get_args(Merge):
        raise ValueError(f"merge {merge!r} of the projector: choose one of {', '.join(get_args(Merge))}")
    if factor < 1:
        raise ValueError(f"factor {factor} of the projector must be at least 1")
    if merge == "none":
        return num_patches
    if merge == "strip":
        if num_patches % factor:
            raise ValueError(f"strips of {factor} do not fill {num_patches} patches; choose a factor that divides it")
        return num_patches // factor
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"merge {merge!r} needs a square grid, {num_patches} patches are none; is the CLS token kept?")
    if merge == "average":
        if factor > side:
            raise ValueError(
                f"average pooling of a {side}x{side} grid onto {factor}x{factor}: choose a factor of at most {side}"
            )
        return factor * factor
    if side % factor:
        raise ValueError(
            f"pixel shuffle by {factor} does not fit a {side}x{side} grid; choose a factor that divides {side}"
        )
    return (side // factor) ** 2


def channels_merged(merge: Merge, factor: int) -> int:
    """How many patches' channels stand side by side in one slot's input."""
    return {"none": 1, "average": 1, "shuffle": factor * factor, "strip": factor}[merge]


def merge_patches(features: Float[Tensor, "n p v"], merge: Merge, factor: int) -> Float[Tensor, "n k c"]:
    """The patches of one slot brought together; c = v times `channels_merged`.

    `shuffle` has the order of Idefics3 (row in the block, column in the block, channel; channel fastest).
    """
    if merge == "none":
        return features
    if merge == "strip":
        return rearrange(features, "n (k s) v -> n k (s v)", s=factor)
    side = math.isqrt(features.shape[1])
    if merge == "shuffle":
        return rearrange(features, "n (h a w b) v -> n (h w) (a b v)", h=side // factor, a=factor, b=factor)
    if not len(features):  # pooling refuses an empty batch
        return features.new_zeros(0, factor * factor, features.shape[2])
    grid = rearrange(features, "n (h w) v -> n v h w", h=side)
    return rearrange(F.adaptive_avg_pool2d(grid, factor), "n v h w -> n (h w) v")
