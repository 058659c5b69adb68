"""Attention and feed-forward, of which every bridge that is more than a projection is made, and who sees whom there."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

KeysValues = tuple[Float[Tensor, "b h _ c"], Float[Tensor, "b h _ c"]]


class Attention(nn.Module):
    """Multi-head attention (arXiv 1706.03762, section 3.2.2) from `width` to itself or to a memory of another width.

    Keys and values are made apart from the look at them, so that they can be kept, shared or joined. `head_dim` is
    the width of a head, by default such that all heads together have `width`; `norm` makes a norm of that width, for
    queries and keys.
    Raises ValueError where the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        memory_width: int | None = None,
        dropout: float = 0.0,
        head_dim: int | None = None,
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and width % heads:
            raise ValueError(f"{heads} heads do not divide the width {width}; choose a divisor of it")
        head_dim = head_dim or width // heads
        inner = heads * head_dim
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(memory_width or width, inner, bias=bias)
        self.value = nn.Linear(memory_width or width, inner, bias=bias)
        self.out = nn.Linear(inner, width, bias=bias)
        self.query_norm, self.key_norm = (norm(head_dim) if norm else nn.Identity() for _ in range(2))

    def keys_values(self, memory: Float[Tensor, "b s m"]) -> KeysValues:
        """What `forward` looks at."""
        keys, values = (
            rearrange(project(memory), "b s (h c) -> b h s c", h=self.heads) for project in (self.key, self.value)
        )
        return self.key_norm(keys), values

    def forward(
        self, x: Float[Tensor, "b q w"], seen: KeysValues, mask: Bool[Tensor, "#b 1 #q s"] | None = None
    ) -> Float[Tensor, "b q w"]:
        """`mask` is true where a query may look; None: everywhere."""
        query = self.query_norm(rearrange(self.query(x), "b q (h c) -> b h q c", h=self.heads))
        dropout = self.dropout if self.training else 0.0
        looked = F.scaled_dot_product_attention(query, *seen, attn_mask=mask, dropout_p=dropout)
        return self.out(rearrange(looked, "b h q c -> b q (h c)"))


class SquaredReLU(nn.Module):
    """Flamingo's (arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "squared_relu": SquaredReLU}
Activation = Literal["gelu", "relu", "squared_relu"]


class FeedForward(nn.Sequential):
    """Two linear layers with an activation in between: exact GELU, ReLU, or its square."""

    def __init__(self, width: int, inner: int, activation: Activation = "gelu", bias: bool = True) -> None:
        super().__init__(
            nn.Linear(width, inner, bias=bias), ACTIVATIONS[activation](), nn.Linear(inner, width, bias=bias)
        )


class GatedFeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202), as in Llama."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, "*b w"]) -> Float[Tensor, "*b w"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def joined(first: KeysValues, then: KeysValues) -> KeysValues:
    """Both to be looked at, one after the other."""
    return torch.cat([first[0], then[0]], dim=2), torch.cat([first[1], then[1]], dim=2)


def apart(queries: int, real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b 1 l l"]:
    """Queries see queries, text sees text: both are embedded as if alone (contrastive). 2 queries, 2 words, padding:

        q q w w -
    q   x x . . .
    q   x x . . .
    w   . . x x .
    w   . . x x .
    -   . . x x .
    """
    is_text = _is_text(queries, real)
    same = is_text[:, None] == is_text
    return same & together(queries, real)


def together(queries: int, real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b 1 1 l"]:
    """Everything sees everything but padding (matching, instructions). 2 queries, 2 words, padding:

        q q w w -
    *   x x x x .
    """
    seen = torch.cat([real.new_ones(len(real), queries), real], dim=1)
    return rearrange(seen, "b l -> b 1 1 l")


def writing(queries: int, real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b 1 l l"]:
    """Queries see queries; a word sees the queries, the words before and itself (captioning). 2 queries, 3 words:

        q q w w w
    q   x x . . .
    q   x x . . .
    w   x x x . .
    w   x x x x .
    w   x x x x x
    """
    is_text = _is_text(queries, real)
    causal = torch.ones(len(is_text), len(is_text), dtype=torch.bool, device=real.device).tril()
    return (~is_text | (is_text[:, None] & causal)) & together(queries, real)


def _is_text(queries: int, real: Bool[Tensor, "b t"]) -> Bool[Tensor, "l"]:
    return torch.arange(queries + real.shape[1], device=real.device) >= queries
