"""Attention and feed-forward: what every bridge that is more than a projection is made of."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

KeysValues = tuple[Float[Tensor, "b h _ c"], Float[Tensor, "b h _ c"]]


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2.2) from `width` to itself or to a memory of another width.

    Keys and values are made apart from the look at them, so that they can be kept, shared or joined.
    Raises ValueError where the heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, memory_width: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide the width {width}; choose a divisor of it")
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width or width, width)
        self.value = nn.Linear(memory_width or width, width)
        self.out = nn.Linear(width, width)

    def keys_values(self, memory: Float[Tensor, "b s m"]) -> KeysValues:
        """What `forward` looks at."""
        keys, values = (
            rearrange(project(memory), "b s (h c) -> b h s c", h=self.heads) for project in (self.key, self.value)
        )
        return keys, values

    def forward(
        self, x: Float[Tensor, "b q w"], seen: KeysValues, mask: Bool[Tensor, "#b 1 #q s"] | None = None
    ) -> Float[Tensor, "b q w"]:
        """`mask` is true where a query may look; None: everywhere."""
        query = rearrange(self.query(x), "b q (h c) -> b h q c", h=self.heads)
        dropout = self.dropout if self.training else 0.0
        looked = F.scaled_dot_product_attention(query, *seen, attn_mask=mask, dropout_p=dropout)
        return self.out(rearrange(looked, "b h q c -> b q (h c)"))


class FeedForward(nn.Sequential):
    """Two linear layers with exact GELU in between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def joined(first: KeysValues, then: KeysValues) -> KeysValues:
    """Both to be looked at, one after the other."""
    return torch.cat([first[0], then[0]], dim=2), torch.cat([first[1], then[1]], dim=2)
