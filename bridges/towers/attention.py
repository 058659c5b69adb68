"""Attention over few positions on a CPU: plain products, which there are done sooner than the fused kernel.

Heads that share keys are one product, so that keys and values are not copied for each of them.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHORT = "short"  # what transformers calls this attention
MOST = {torch.float32: 2**18, torch.float64: 2**18, torch.bfloat16: 2**21}
"""Scores of the heads that share keys, in one row; with more of them the kernel is as fast (measured). It computes in
float32 what is given in bfloat16, so that products win for longer there."""


def is_plain(model: Any) -> bool:
    """Whether a model's attention is the usual one, and can be replaced: no cap on its scores, no sinks, no biases."""
    return bool(model._supports_attention_backend) and model.config._attn_implementation in ("sdpa", SHORT)


def take_short(model: Any) -> None:
    """From now on what is short is attended to by plain products, if the model's attention can be replaced."""
    if is_plain(model):
        model.set_attn_implementation(SHORT)


def attend(
    module: Any,
    query: Float[Tensor, "b h t c"],
    key: Float[Tensor, "b g a c"],
    value: Float[Tensor, "b g a c"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "b t h c"], None]:
    """Attention under a mask `b 1 t a`, additive or true where a column is seen. `h / g` heads share keys.

    All else is left to transformers' sdpa: one new token, a mask that is not there or differs from head to head,
    dropout, biases, many positions, float16, an accelerator.
    """
    new, groups = query.shape[2], key.shape[1]
    most = MOST.get(query.dtype, 0) if query.device.type == "cpu" else 0
    short = new > 1 and query.shape[1] // groups * new * key.shape[2] <= most
    biased = dropout or kwargs.get("position_bias") is not None
    if not short or biased or attention_mask is None or attention_mask.shape[1] > 1:
        given: Any = dict(dropout=dropout, scaling=scaling, **kwargs)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query = rearrange(query * scale, "b (g r) t c -> b g (r t) c", g=groups)
    weights = weights_under(attention_mask, query @ key.mT)
    return rearrange(weights @ value, "b g (r t) c -> b t (g r) c", t=new), None


def weights_under(mask: Tensor, scores: Float[Tensor, "b g n a"]) -> Float[Tensor, "b g n a"]:
    """Softmax of scores under a mask `b 1 t a`, as in `attend`; n are the t positions of each head that shares keys."""
    scores = rearrange(scores, "b g (r t) a -> b g r t a", t=mask.shape[2])
    mask = rearrange(mask, "b one t a -> b one 1 t a")
    blocked = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, blocked) if mask.dtype == torch.bool else scores + mask
    return rearrange(scores.softmax(-1), "b g r t a -> b g (r t) a")


AttentionInterface.register(SHORT, attend)
AttentionMaskInterface.register(SHORT, sdpa_mask)
