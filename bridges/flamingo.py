"""Gated cross-attention: blocks between the language model's frozen layers read what a resampler makes of pictures.

Flamingo (arXiv 2204.14198, section 2.2 and figure 4), OpenFlamingo (2308.01390), IDEFICS (transformers' `idefics`).
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bridges.base import Bridge, Visual
from bridges.layers import Activation, Attention, FeedForward, GatedFeedForward, KeysValues
from bridges.resampler import Perceiver

Gate = Literal["scalar", "vector", "none"]
Norm = Literal["layer", "rms"]


class Flamingo(Bridge):
    """`latents` vectors a picture, and a gated block before every `every`-th layer, from `offset` on.

    resampler:  `latents`, `depth` (0: none, the blocks read the features themselves), `resampler_heads` of
                `resampler_head_dim`, `multiple`, `activation`, `frames`
    words:      what the blocks read is mapped to the language model's width, where `train.regression` can begin, and
                what a fresh block looks at it passes on as it is: then it is words that the gates let through
    blocks:     `every`, `offset` (0: before layers 0, every, …; OpenFlamingo: every - 1), `heads` of `head_dim`,
                `inner` width of their feed-forward (by default 4 x the language model's), `swiglu`, `norm: rms` and
                `qk_norm` as in IDEFICS
    gate:       `scalar` tanh(0) as in the paper, `vector` one for each channel, `none` with last weights of zero;
                `gate_speed` multiplies a gate's learning rate
    sees:       `last` only the last picture before a token, as in the paper, or `all` before it
    tag:        what stands in the text where a picture does: the `words` `<image>`, in the language model's own tokens,
                or a `learnt` vector, the one slot (a new token with a trained embedding, as OpenFlamingo and IDEFICS
                have it; then no layer is without a graph)
    A token without a picture before it gets nothing from the attention; the feed-forward works on it all the same.
    Raises ValueError where no layer gets a block.
    """

    def __init__(
        self,
        vision_dim: int,
        num_patches: int,  # noqa: ARG002  the contract's; any number of patches can be looked at
        language_dim: int,
        num_layers: int,
        *,
        latents: int = 64,
        depth: int = 6,
        resampler_heads: int = 8,
        resampler_head_dim: int = 64,
        multiple: int = 4,
        activation: Activation = "gelu",
        frames: int = 0,
        words: bool = False,
        every: int = 1,
        offset: int = 0,
        heads: int = 8,
        head_dim: int = 64,
        inner: int | None = None,
        swiglu: bool = False,
        norm: Norm = "layer",
        qk_norm: bool = False,
        gate: Gate = "scalar",
        gate_speed: float = 1.0,
        sees: Literal["last", "all"] = "last",
        tag: Literal["words", "learnt"] = "words",
    ) -> None:
        super().__init__()
        places = range(offset, num_layers, every) if every > 0 else range(0)
        if not places or every > num_layers:
            raise ValueError(
                f"blocks before every {every}. layer from {offset} on: the language model has {num_layers} layers; "
                "choose a smaller every or offset"
            )
        self.sees = sees
        self.tag: Tensor
        if tag == "learnt":
            self.tag = nn.Parameter(torch.randn(1, language_dim))
        else:
            self.register_buffer("tag", torch.zeros(0, language_dim), persistent=False)
        self.num_slots = len(self.tag)
        self.perceiver = (
            Perceiver(
                vision_dim, latents, depth, resampler_heads, resampler_head_dim, multiple, activation, qk_norm, frames
            )
            if depth
            else nn.LayerNorm(vision_dim)
        )
        self.words = nn.Linear(vision_dim, language_dim) if words else None
        memory_dim = language_dim if words else vision_dim
        made: Callable[[], GatedBlock] = lambda: GatedBlock(  # noqa: E731
            language_dim, memory_dim, heads, head_dim, inner, activation, swiglu, norm, qk_norm, gate, gate_speed
        )
        self.blocks = nn.ModuleDict({str(place): made() for place in places})
        if words and gate != "none":
            for block in self.blocks.values():
                cast(GatedBlock, block).pass_on()

    @property
    def last(self) -> nn.Linear | None:
        return self.words

    def match_scale(self, embedding_rms: float) -> None:
        self.tag.data *= embedding_rms

    def watched(self) -> dict[str, dict[str, float]]:
        """How far open the gates are: the mean of |tanh|, 0 at the beginning."""
        blocks: Any = self.blocks
        opened = {f"layer {layer}": block.opened() for layer, block in blocks.items()}
        parts = next(iter(opened.values()))
        return {f"{part} gates": {layer: gates[part] for layer, gates in opened.items()} for part in parts}

    def forward(self, features: Float[Tensor, "n p v"]) -> Visual:
        memory = self.perceiver(features)
        memory = memory if self.words is None else self.words(memory)
        return Visual(repeat(self.tag, "k d -> n k d", n=len(memory)), memory)


class GatedBlock(nn.Module):
    """x + tanh(gate) attention(norm(x)), then the same with a feed-forward. With gates at 0 it changes nothing."""

    def __init__(
        self,
        width: int,
        memory_width: int,
        heads: int,
        head_dim: int,
        inner: int | None,
        activation: Activation,
        swiglu: bool,
        norm: Norm,
        qk_norm: bool,
        gate: Gate,
        gate_speed: float,
    ) -> None:
        super().__init__()
        new: Any = nn.LayerNorm if norm == "layer" else nn.RMSNorm
        eps = {} if norm == "layer" else {"eps": 1e-6}
        self.gate_speed = gate_speed
        self.norm, self.feed_norm = new(width, **eps), new(width, **eps)
        heads_norm = (lambda size: nn.RMSNorm(size, eps=1e-6)) if qk_norm else None
        self.attention = Attention(width, heads, memory_width, head_dim=head_dim, bias=False, norm=heads_norm)
        inner = inner or 4 * width
        self.feed = GatedFeedForward(width, inner) if swiglu else FeedForward(width, inner, activation, bias=False)
        if gate == "none":
            last: Any = self.feed.down if isinstance(self.feed, GatedFeedForward) else self.feed[-1]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(self.attention.out.weight)
            self.attention_gate = self.feed_gate = None
        else:
            size = width if gate == "vector" else 1
            self.attention_gate, self.feed_gate = (nn.Parameter(torch.zeros(size)) for _ in range(2))

    @torch.no_grad()
    def pass_on(self) -> None:
        """Begin as if what is seen were added as it is, or as much of it as the heads together are wide."""
        nn.init.orthogonal_(self.attention.value.weight)
        self.attention.out.weight.copy_(self.attention.value.weight.T)

    def keys_values(self, memory: Float[Tensor, "n m v"]) -> KeysValues:
        """Of each picture, for any number of texts and tokens."""
        return self.attention.keys_values(memory)

    def forward(
        self, hidden: Float[Tensor, "b t d"], seen: KeysValues, mask: Bool[Tensor, "b 1 t s"]
    ) -> Float[Tensor, "b t d"]:
        """`mask` is true where a position sees; a position that sees nothing gets exactly zero from the attention."""
        some = mask.any(-1)
        looked = self.attention(self.norm(hidden), seen, mask | ~some[..., None])
        looked = looked * some[:, 0, :, None].to(looked.dtype)
        hidden = hidden + self._gated(self.attention_gate, looked)
        return hidden + self._gated(self.feed_gate, self.feed(self.feed_norm(hidden)))

    def opened(self) -> dict[str, float]:
        """The mean of |tanh| of each gate, if it has any."""
        gates = {"attention": self.attention_gate, "feed-forward": self.feed_gate}
        return {k: torch.tanh(self.gate_speed * g).abs().mean().item() for k, g in gates.items() if g is not None}

    def _gated(self, gate: Tensor | None, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """A gate's own learning rate: under Adam, which knows no scale, a factor on it is a factor on its rate."""
        return x if gate is None else torch.tanh(self.gate_speed * gate) * x
