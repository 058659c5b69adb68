"""Towers that are only a shape, with random weights: what a step costs does not depend on what they know."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from bridges.towers.bundled import resolve
from bridges.towers.efficientnet import write_processor
from bridges.towers.precision import fastest_device, fastest_dtype

VISION: dict[str, dict[str, Any]] = {
    "siglip-b": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    | dict(image_size=224, patch_size=16),
    "vit-l": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    | dict(image_size=224, patch_size=14),
    "vit-l-336": dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    | dict(image_size=336, patch_size=14),
}
LANGUAGE: dict[str, dict[str, Any]] = {
    "llama-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32)
    | dict(num_key_value_heads=8, tie_word_embeddings=True),
    "llama-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}
"""Of Llama 3.2 1B and Llama 2 7B, with the vocabulary of the tokenizer that is given to them."""


def vision_shape(name: str, folder: Path) -> None:
    """Write an encoder of this shape, the same each time, and its image processor."""
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**VISION[name])).save_pretrained(folder)
    write_processor(folder, VISION[name]["image_size"])


def language_shape(name: str, folder: Path, tokenizer: str) -> None:
    """Write a language model of this shape, in the dtype that this machine is fastest in, and that tokenizer."""
    torch.manual_seed(0)
    words = AutoTokenizer.from_pretrained(resolve(tokenizer))
    config = LlamaConfig(**LANGUAGE[name], vocab_size=len(words), max_position_embeddings=4096, dtype=fastest_dtype())
    ends: dict[str, Any] = dict(bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id)
    config.update(ends | {"pad_token_id": words.pad_token_id})
    with torch.device(fastest_device()):
        model: Any = LlamaForCausalLM(config)
        model.to(fastest_dtype()).save_pretrained(folder)
    words.save_pretrained(folder)
