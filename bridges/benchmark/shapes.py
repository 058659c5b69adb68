"""Vision towers that are only a shape, with random weights: what a step costs does not depend on what they see."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

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
    size = SHAPES[name]["image_size"]
    preprocessing = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
