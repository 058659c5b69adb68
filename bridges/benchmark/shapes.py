"""Vision towers that are only a shape, with random weights: what a step costs does not depend on what they see."""

from pathlib import Path
from typing import Any

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from bridges.towers.efficientnet import write_processor

SHAPES: dict[str, dict[str, Any]] = {
    "siglip-b": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )
}


def shape(name: str, folder: Path) -> None:
    """Write an encoder of this shape, the same each time, and its image processor."""
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**SHAPES[name])).save_pretrained(folder)
    write_processor(folder, SHAPES[name]["image_size"])
