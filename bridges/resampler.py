"""Perceiver Resampler: any number of features becomes a few latents (Flamingo, arXiv 2204.14198, sections 2.1, A.1.1).

Here the latents fill slots. `flamingo.py` lets blocks inside the language model read them instead.
"""

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from bridges.base import Bridge, Visual
from bridges.layers import Activation, Attention, FeedForward


class Perceiver(nn.Module):
    """`latents` learned vectors look at the features and at themselves, `depth` times; each picture by itself.

    In every layer keys and values are those of the normalised features and of the normalised latents, in one softmax.
    `frames`, if any, are times that can be told apart: features are then those of several frames, one after another.
    """

    def __init__(
        self,
        width: int,
        latents: int,
        depth: int,
        heads: int,
        head_dim: int,
        multiple: int = 4,
        activation: Activation = "gelu",
        qk_norm: bool = False,
        frames: int = 0,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.frames = nn.Parameter(torch.randn(frames, width)) if frames else None
        self.layers = nn.ModuleList(
            PerceiverLayer(width, heads, head_dim, multiple, activation, qk_norm) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Float[Tensor, "n p v"], frames: int = 1) -> Float[Tensor, "n m v"]:
        """Raises ValueError for more `frames` than have a place in time."""
        if self.frames is not None:
            if frames > len(self.frames):
                raise ValueError(f"{frames} frames, and only {len(self.frames)} places in time; raise `frames`")
            features = features + repeat(self.frames[:frames], "f v -> (f p) v", p=features.shape[1] // frames)
        latents = repeat(self.latents, "m v -> n m v", n=len(features))
        for layer in self.layers:
            latents = layer(features, latents)
        return self.norm(latents)


class PerceiverLayer(nn.Module):
    """One look, and a feed-forward."""

    def __init__(
        self, width: int, heads: int, head_dim: int, multiple: int, activation: Activation, qk_norm: bool
    ) -> None:
        super().__init__()
        self.feature_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        norm = nn.LayerNorm if qk_norm else None
        self.attention = Attention(width, heads, head_dim=head_dim, bias=False, norm=norm)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = FeedForward(width, multiple * width, activation, bias=False)

    def forward(self, features: Float[Tensor, "n p v"], latents: Float[Tensor, "n m v"]) -> Float[Tensor, "n m v"]:
        seen = self.latent_norm(latents)
        both = torch.cat([self.feature_norm(features), seen], dim=1)
        latents = latents + self.attention(seen, self.attention.keys_values(both))
        return latents + self.feed(self.feed_norm(latents))


class Resampler(Bridge):
    """A Perceiver whose `latents` are mapped to the language model's width, one slot each."""

    def __init__(
        self,
        vision_dim: int,
        num_patches: int,  # noqa: ARG002  the contract's; any number of patches can be looked at
        language_dim: int,
        num_layers: int,  # noqa: ARG002  the contract's; it does not reach into the language model
        *,
        latents: int = 64,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        multiple: int = 4,
        activation: Activation = "gelu",
        qk_norm: bool = False,
        frames: int = 0,
    ) -> None:
        super().__init__()
        if min(latents, depth) < 1:
            raise ValueError(f"a resampler of {latents} latents and depth {depth}: it needs at least one of each")
        self.num_slots = latents
        self.perceiver = Perceiver(vision_dim, latents, depth, heads, head_dim, multiple, activation, qk_norm, frames)
        self.projection = nn.Linear(vision_dim, language_dim)

    def match_scale(self, embedding_rms: float) -> None:
        """What leaves the last layer norm has RMS 1."""
        nn.init.normal_(self.projection.weight, std=embedding_rms * self.projection.in_features**-0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, features: Float[Tensor, "n p v"]) -> Visual:
        return Visual(self.projection(self.perceiver(features)))
