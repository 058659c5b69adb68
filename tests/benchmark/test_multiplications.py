"""Counting what is multiplied, and towers that are only a shape to count with."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from bridges.benchmark import shapes
from bridges.benchmark.multiplications import counted, peak
from bridges.benchmark.train import settled
from bridges.recipe import recipe_from
from bridges.towers.language import LanguageTower
from bridges.towers.vision import VisionTower


def test_attention_on_a_cpu_is_counted() -> None:
    heads, length, width = 2, 16, 8
    q, k, v = (torch.randn(1, heads, length, width, requires_grad=True) for _ in range(3))
    _, flops = counted(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward())
    once = 2 * heads * length * length * width
    assert flops == 2 * once + 5 * once  # scores and their sum of values; backward, scores again


def test_a_product_is_twice_its_multiplications_and_the_peak_is_a_rate() -> None:
    left, right = torch.ones(32, 48), torch.ones(48, 64)
    found, flops = counted(lambda: left @ right)
    assert flops == 2 * 32 * 48 * 64
    assert torch.equal(found, left @ right)
    assert peak(torch.device("cpu"), torch.float32) > 1e9


def test_towers_of_a_shape_are_written_and_read_like_any_other(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    monkeypatch.setitem(shapes.VISION, "small", {**small, "image_size": 32, "patch_size": 8})
    monkeypatch.setitem(shapes.LANGUAGE, "small", small)
    shapes.vision_shape("small", tmp_path / "vision")
    shapes.language_shape("small", tmp_path / "language", str(tiny_llama))
    assert VisionTower(str(tmp_path / "vision")).num_patches == 16
    language = LanguageTower(str(tmp_path / "language"))
    assert (language.dim, language.num_layers) == (32, 2)
    assert len(language.tokenizer) == language.model.config.vocab_size


@pytest.mark.parametrize(("name", "billions"), [("llama-1b", (1.0, 1.3)), ("llama-7b", (6.5, 7.0))])
def test_shapes_are_as_large_as_their_names_say(name: str, billions: tuple[float, float]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shapes.LlamaConfig(**shapes.LANGUAGE[name], vocab_size=49152 if name == "llama-1b" else 32000)
        )
    size = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions[0] < size < billions[1]


def test_other_towers_than_the_recipes_take_part(tiny_clip: Path, tiny_llama: Path, tmp_path: Path) -> None:
    given = {"output": "runs/x", "vision": {"name": "a"}, "language": {"name": "b"}, "bridge": {"name": "projector"}}
    recipe = settled(recipe_from(given), str(tiny_clip), str(tiny_llama), 3, None, tmp_path)
    assert (recipe.vision.name, recipe.language.name, recipe.train.batch) == (str(tiny_clip), str(tiny_llama), 3)
