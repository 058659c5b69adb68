"""The same model as transformers has it: its own class around the same frozen towers, with the same bridge.

One of LlavaForConditionalGeneration, Blip2ForConditionalGeneration and IdeficsForVisionText2Text, as the recipe's
bridge is a projector, a Q-Former or Flamingo's. Their vision tower is ours, called inside their step: they cannot take
every encoder, would keep all its hidden states, and have no pooling of patches.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from bridges.flamingo import Flamingo
from bridges.interop import idefics, llava
from bridges.interop.blip2 import names as blip2_names
from bridges.projector import Projector, merge_patches
from bridges.qformer import QFormer
from bridges.towers.vision import VisionTower

Build = Callable[[VisionTower, Any, Any, int], tuple[nn.Module, dict[str, str]]]
"""Of towers, our bridge (its sizes) and the id of their image token: the model, and our tensor -> theirs for all that
trains."""


class Seen(nn.Module):
    """Pixels to the features that our bridge reads, in what their vision models return."""

    def __init__(self, vision: VisionTower, dtype: torch.dtype, merged: Projector | None = None) -> None:
        super().__init__()
        self.vision, self.dtype = vision, dtype
        self.post_layernorm: nn.Module = nn.Identity()
        self.how = (merged.merge, merged.factor) if merged is not None else None

    def forward(self, pixel_values: Float[Tensor, "n 3 y x"], **_: Any) -> BaseModelOutputWithPooling:
        features = self.vision(pixel_values).to(self.dtype)
        if self.how is not None:
            features = merge_patches(features, *self.how)
        features = self.post_layernorm(features)
        found: Any = features
        return BaseModelOutputWithPooling(last_hidden_state=found, hidden_states=(found,))


def llava_of(
    vision: VisionTower, language: Any, bridge: Projector, image_id: int
) -> tuple[LlavaForConditionalGeneration, dict[str, str]]:
    """Raises ValueError for a projector that is not LLaVA's two layers."""
    if len(bridge.layers) != 3 or not isinstance(bridge.norm, nn.Identity) or bridge.layers[0].bias is None:
        raise ValueError("transformers' LLaVA has a projector of depth 2 with biases and without a norm; make it so")
    encoder: Any = CLIPVisionConfig(hidden_size=bridge.width, num_hidden_layers=1, num_attention_heads=1)
    config = LlavaConfig(
        vision_config=encoder,
        text_config=language.config,
        image_token_index=image_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    with torch.device("meta"):
        theirs = LlavaForConditionalGeneration(config)
    inner: Any = theirs.model
    inner.vision_tower = Seen(vision, language.dtype, bridge)
    inner.language_model, theirs.lm_head = language.model, language.lm_head
    inner.multi_modal_projector = LlavaMultiModalProjector(config).to(language.dtype)
    return theirs, llava.NAMES


def blip2_of(
    vision: VisionTower, language: Any, bridge: QFormer, image_id: int
) -> tuple[Blip2ForConditionalGeneration, dict[str, str]]:
    """Its Q-Former stays in fp32, as its own from_pretrained would have it. ValueError with dropout."""
    if bridge.dropout.p or bridge.reads != "nothing":
        raise ValueError("to compare steps the qformer needs dropout: 0.0, and reads: nothing")
    first: Any = bridge.layers[0]
    layers: Any = bridge.layers
    sizes = Blip2QFormerConfig(
        hidden_size=bridge.queries.shape[1],
        num_hidden_layers=len(layers),
        num_attention_heads=first.attention.heads,
        intermediate_size=first.feed[0].out_features,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        cross_attention_frequency=next((i for i in range(1, len(layers)) if layers[i].cross is not None), len(layers)),
        encoder_hidden_size=vision.dim,
    )
    encoder = Blip2VisionConfig(hidden_size=vision.dim, num_hidden_layers=1, num_attention_heads=1)
    config = Blip2Config(
        vision_config=encoder,
        qformer_config=sizes,
        text_config=language.config,
        num_query_tokens=bridge.num_slots,
        image_token_index=image_id,
    )
    with torch.device("meta"):
        theirs = Blip2ForConditionalGeneration(config)
    tower = Seen(vision, language.dtype)
    tower.post_layernorm = nn.LayerNorm(vision.dim, eps=bridge.vision_norm.eps).to(language.dtype)
    whole: Any = theirs
    whole.vision_model, whole.language_model = tower, language
    whole.qformer = Blip2QFormerModel(whole.config.qformer_config)
    whole.query_tokens = nn.Parameter(torch.zeros(1, *bridge.queries.shape))
    whole.language_projection = nn.Linear(sizes.hidden_size, language.config.hidden_size, dtype=language.dtype)
    exist = dict(theirs.named_parameters())
    return theirs, {ours: name for ours, name in blip2_names(len(layers), "blip-2").items() if name in exist}


def idefics_of(
    vision: VisionTower,
    language: Any,
    bridge: Flamingo,
    image_id: int,  # noqa: ARG001  the tag is words
) -> tuple[IdeficsForVisionText2Text, dict[str, str]]:
    """Its decoder layers are Llama's without grouped heads, so theirs are given ours as a projection of its own.

    Raises ValueError where the bridge is not IDEFICS's, or the language model is no Llama.
    """
    text, places = language.config, [int(place) for place in bridge.blocks]
    if text.model_type != "llama" or places[0] or bridge.num_slots or isinstance(bridge.perceiver, nn.LayerNorm):
        raise ValueError(
            "IDEFICS is a Llama with a resampler (depth 1 or more), offset 0 and tag: words; make the recipe so"
        )
    every = places[1] if len(places) > 1 else text.num_hidden_layers
    theirs = IdeficsForVisionText2Text(idefics_config(text, bridge, every, vision.dim))
    inner: Any = theirs.model
    inner.vision_model = Seen(vision, language.dtype)
    names = idefics.names([name for name, _ in theirs.named_parameters()], every)
    for name in names.values():
        theirs.get_parameter(name).data = theirs.get_parameter(name).data.to(language.dtype)
    for name, tensor in language.state_dict().items():
        if not name.endswith(("k_proj.weight", "v_proj.weight")):
            theirs.get_parameter(name).data = tensor
    for layer, its in zip(inner.layers, language.model.layers, strict=True):
        attention = its.self_attn
        layer.self_attn.k_proj = Repeated(attention.k_proj, attention.head_dim, attention.num_key_value_groups)
        layer.self_attn.v_proj = Repeated(attention.v_proj, attention.head_dim, attention.num_key_value_groups)
        layer.input_layernorm.variance_epsilon = text.rms_norm_eps
        layer.post_attention_layernorm.variance_epsilon = text.rms_norm_eps
    inner.norm.variance_epsilon = text.rms_norm_eps
    return theirs, names


def idefics_config(text: Any, bridge: Flamingo, every: int, vision_dim: int) -> IdeficsConfig:
    """Around a Llama's config `text`; a block stands before `every`-th layer."""
    block: Any = next(iter(bridge.blocks.values()))
    resampler: Any = bridge.perceiver
    looks = resampler.layers[0].attention
    return IdeficsConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        rope_parameters=text.rope_parameters,
        max_position_embeddings=text.max_position_embeddings,
        cross_layer_interval=every,
        alpha_type="float" if block.attention_gate.numel() == 1 else "vector",
        qk_layer_norms=isinstance(block.attention.query_norm, nn.RMSNorm),
        use_resampler=True,
        vision_config=dict(embed_dim=vision_dim, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16),
        perceiver_config=dict(
            use_resampler=True,
            resampler_n_latents=len(resampler.latents),
            resampler_depth=len(resampler.layers),
            resampler_n_heads=looks.heads,
            resampler_head_dim=looks.query.out_features // looks.heads,
            qk_layer_norms_perceiver=isinstance(looks.query_norm, nn.LayerNorm),
        ),
    )


class Repeated(nn.Module):
    """Keys or values of a few heads, each for a group of queries: what grouped heads compute, for a layer without."""

    def __init__(self, inner: nn.Module, head_dim: int, times: int) -> None:
        super().__init__()
        self.inner, self.head_dim, self.times = inner, head_dim, times

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t e"]:
        return repeat(self.inner(x), "b t (h c) -> b t (h r c)", c=self.head_dim, r=self.times)


PEERS: dict[type, Build] = {Projector: llava_of, QFormer: blip2_of, Flamingo: idefics_of}
