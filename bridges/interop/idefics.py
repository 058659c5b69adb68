"""IDEFICS as transformers names it: resampler and gated blocks, which are our `flamingo`."""

import re
from collections.abc import Iterable

# One pattern after another, on names without what stands before the resampler's or the block's own modules.
SPELLINGS = [
    (r"blocks\.(\d+)\.0\.", r"layers.\1.attention."),
    (r"blocks\.(\d+)\.1\.", r"layers.\1."),
    (r"attention\.context_layer_norm", "feature_norm"),
    (r"attention\.latents_layer_norm", "latent_norm"),
    (r"\bln\b", "feed_norm"),
    (r"\bfc\b", "feed.0"),
    (r"\bc_proj\b", "feed.2"),
    (r"\bcross_attn\.", "attention."),
    (r"\bq_proj", "query"),
    (r"\bk_proj", "key"),
    (r"\bv_proj", "value"),
    (r"\bo_proj|\boutput_proj", "out"),
    (r"\bq_layer_norm", "query_norm"),
    (r"\bk_layer_norm", "key_norm"),
    (r"\blayer_norm", "norm"),
    (r"alpha_cross_attn", "attention_gate"),
    (r"alpha_dense", "feed_gate"),
    (r"input_layernorm", "norm"),
    (r"post_attention_layernorm", "feed_norm"),
    (r"mlp\.(\w+)_proj", r"feed.\1"),
]


def spell(name: str) -> str:
    """Our name of a tensor of a resampler or of a block."""
    for pattern, ours in SPELLINGS:
        name = re.sub(pattern, ours, name)
    return name


def names(theirs: Iterable[str], every: int) -> dict[str, str]:
    """Our tensor -> that of an IdeficsForVisionText2Text, of all that are neither Llama's nor the vision tower's.

    Gates have one dimension here. Block m stands before layer m x `every`.
    """
    found = {}
    for name in theirs:
        if name.startswith("model.perceiver_resampler."):
            found["perceiver." + spell(name.removeprefix("model.perceiver_resampler."))] = name
        elif block := re.match(r"model\.gated_cross_attn_layers\.(\d+)\.(.*)", name):
            found[f"blocks.{int(block[1]) * every}.{spell(block[2])}"] = name
    return found
