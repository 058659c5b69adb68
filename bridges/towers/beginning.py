"""A beginning that many rows follow: its keys and values are there once, and are read once for all rows.

Its part of the attention is one product for the queries of all rows (Hydragen, arXiv 2402.05099); each row's own part
is beside it in the same softmax.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from bridges.towers import attention

APART = "beginning"  # what transformers calls this attention
FEW = 16  # new tokens of a row: with more, writing their scores takes longer than a copy of the beginning for each row

KeysValues = tuple[Float[Tensor, "1 g p c"], Float[Tensor, "1 g p c"]]


class Following(DynamicLayer):
    """What rows add to a beginning, in one layer. Where the model cannot read that `apart` it is told all of it."""

    def __init__(self, before: KeysValues, apart: bool) -> None:
        super().__init__()
        self.before, self.apart = before, apart

    def update(
        self,
        key_states: Float[Tensor, "b g t c"],
        value_states: Float[Tensor, "b g t c"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        own = super().update(key_states, value_states, *args, **kwargs)
        if not self.apart:
            return whole(self.before, own)
        keys: Any = own[0]
        keys.before = self.before  # the attention gets these keys and nothing else of the cache
        return own

    def get_seq_length(self) -> int:
        return self.before[0].shape[2] + super().get_seq_length()


class Followers(Cache):
    """A cache of rows that follow a beginning, which has been read: its keys and values by layer."""

    def __init__(self, before: Sequence[KeysValues], apart: bool) -> None:
        super().__init__(layers=[Following(layer, apart) for layer in before])
        self.apart = apart


@contextmanager
def read_apart(config: Any, cache: Cache | None) -> Iterator[None]:
    """Meanwhile a model with this config reads the beginning of such a cache once for all rows."""
    if not isinstance(cache, Followers) or not cache.apart:
        yield
        return
    before, config._attn_implementation = config._attn_implementation, APART
    try:
        yield
    finally:
        config._attn_implementation = before


def whole(before: KeysValues, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A copy of the beginning for each row, and what the row added."""
    keys, values = (torch.cat([x.expand(len(y), -1, -1, -1), y], dim=2) for x, y in zip(before, own, strict=True))
    return keys, values


def attend(
    module: Any,
    query: Float[Tensor, "b h t c"],
    key: Float[Tensor, "b g o c"],
    value: Float[Tensor, "b g o c"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b t h c"], None]:
    """Attention to the beginning that the keys follow and to the keys; a group of heads shares keys.

    The mask is over both, `b 1 t p+o`, additive or true where a column is seen; without one all is.
    """
    whole_key: Any = key
    keys, values = before = whole_key.before
    rows, _, new, _ = query.shape
    groups, shared = key.shape[1], keys.shape[2]
    if new > FEW:
        told = whole(before, (key, value))
        return attention.attend(module, query, *told, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = rearrange(query * scale, "b (g r) t c -> b g (r t) c", g=groups)
    scores = rearrange(rearrange(query, "b g n c -> g (b n) c") @ keys[0].mT, "g (b n) p -> b g n p", b=rows)
    scores = torch.cat([scores, query @ key.mT], dim=-1).float()
    weights = scores.softmax(-1) if attention_mask is None else attention.weights_under(attention_mask, scores)
    weights = weights.to(value.dtype)
    told = rearrange(weights[..., :shared], "b g n p -> g (b n) p") @ values[0]
    told = rearrange(told, "g (b n) c -> b g n c", b=rows) + weights[..., shared:] @ value
    return rearrange(told, "b g (r t) c -> b t (g r) c", t=new), None


AttentionInterface.register(APART, attend)
AttentionMaskInterface.register(APART, sdpa_mask)
